"""Pictures of runs, scaled down for embedding in one page."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ldt.runs import files
from ldt.runs.run import Run

WIDEST = 1400  # maximum width of an embedded picture in pixels
QUALITY = 82  # of WebP


@dataclass(frozen=True)
class Picture:
    """An embedded picture: file name, run, and content as a data URL."""

    name: str
    run: Run
    url: str


@dataclass(frozen=True)
class Album:
    """Pictures by file name, and the number of those omitted for size; damaged ones are neither."""

    pictures: dict[str, list[Picture]]
    left_out: int


def album(runs: Iterable[Run], megabytes: float) -> Album:
    """Collect the pictures of the runs' ``pictures/`` folders, scaled down, up to a total size.

    If they exceed the limit, each kind of picture is shown for the same number of runs. A warning
    names each damaged one.

    Args:
        runs: the runs in order.
        megabytes: limit on the total size of the embedded pictures.
    """
    drawn = [(file, run) for run in runs for file in files.pictures(run.folder)]
    kinds = dict.fromkeys(sorted(file.name for file, _ in drawn))
    queues = {kind: [(f, run) for f, run in drawn if f.name == kind] for kind in kinds}
    found: dict[str, list[Picture]] = {kind: [] for kind in kinds}
    room, damaged = megabytes * 1e6, 0
    for place in range(max(map(len, queues.values()), default=0)):
        for kind, queue in queues.items():
            if room > 0 and place < len(queue):
                file, run = queue[place]
                url = files.tolerated(lambda file=file: _url(file), "")
                damaged += not url
                room -= len(url)
                if url and room >= 0:
                    found[kind].append(Picture(file.stem, run, url))
    shown = {kind.removesuffix(".png"): own for kind, own in found.items() if own}
    return Album(shown, len(drawn) - damaged - sum(map(len, shown.values())))


def _url(file: Path) -> str:
    """Encode a picture as WebP in a data URL; raise DamagedError if it cannot be read."""
    with (
        files.reading(file, "the page lacks it"),
        files.open_regular(file) as content,
        Image.open(content) as image,
    ):
        image.thumbnail((WIDEST, 4 * WIDEST), reducing_gap=2.0)
        data = io.BytesIO()
        image.convert("RGB").save(data, "WEBP", quality=QUALITY, method=2)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
