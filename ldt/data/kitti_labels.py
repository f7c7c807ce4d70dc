"""Layout and label files of KITTI's object detection benchmark."""

import math
from pathlib import Path
from typing import NamedTuple

TYPES = (  # all object types in KITTI's label files
    *("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram"),
    *("Misc", "DontCare"),
)
CLASSES = ("Car", "Pedestrian", "Cyclist")  # those of the benchmark
SETS = Path("ImageSets")
COLUMNS = 15  # type, truncation, occlusion, angle, box (4), size (3), position (3), rotation


class KittiObject(NamedTuple):
    """One labelled object; boxes are (x1, y1, x2, y2) in pixels.

    Attributes:
        name: its type, one of `TYPES` or one's own.
        box: its box, clipped to the image.
        labelled: its box as it stands in the label.
        truncation: share of the object outside the image.
        occlusion: 0 visible, 1 partly, 2 largely hidden, 3 unknown.
    """

    name: str
    box: tuple[float, ...]
    labelled: tuple[float, ...]
    truncation: float
    occlusion: float


def parse_label(label: Path | str, width: int, height: int) -> list[KittiObject]:
    """Parse a KITTI label, given as a file or as text, of an image of `width` x `height` pixels.

    Boxes are clipped to the image: KITTI's boxes may extend beyond it by about a pixel. Types need
    not be KITTI's. The score of a detector's result is not used.

    Raises:
        ValueError: wrong number of columns, a value that is not a number, or a box that is empty
            or entirely outside the image; the message names file and line.
    """
    if isinstance(label, Path):
        source, text = str(label), label.read_text(encoding="utf-8-sig", errors="replace")
    else:
        source, text = "label", label
    return [
        _parse_line(line, f"{source}, line {number}", width, height)
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]


def _parse_line(line: str, where: str, width: int, height: int) -> KittiObject:
    name, *rest = line.split()
    if len(rest) + 1 not in (COLUMNS, COLUMNS + 1):
        raise ValueError(
            f"{where}: found {len(rest) + 1} columns, expected KITTI's {COLUMNS}: type, "
            "truncation, occlusion, angle, box (4), size (3), position (3), rotation (and perhaps "
            f"a score); in {line!r}"
        )
    try:
        numbers = [float(value) for value in rest]
    except ValueError as error:
        raise ValueError(f"{where}: expected numbers after the type, {error}") from error
    x1, y1, x2, y2 = box = numbers[3:7]
    clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    good = all(map(math.isfinite, box)) and clipped[2] > clipped[0] and clipped[3] > clipped[1]
    if not good:
        raise ValueError(
            f"{where}: the box {tuple(box)} is empty or wholly outside the image of "
            f"{width}x{height} pixels; expected x1 < x2 and y1 < y2, in pixels, partly inside"
        )
    return KittiObject(name, clipped, tuple(box), numbers[0], numbers[1])
