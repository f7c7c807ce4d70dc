"""`ldt export`: a detector for mmdet or for a runtime."""

import re
from pathlib import Path
from typing import Any, cast

import click

from ldt.build import data_of
from ldt.data.datamodule import DetectionDataModule
from ldt.data.folders import open_folder
from ldt.deployment import to_mmdet
from ldt.deployment.to_runtime import Images, Runtime, check_out, export_file, resized
from ldt.detectors.checkpoints import read, resize_steps
from ldt.runs.files import holds_run
from ldt.runs.refusal import refusing
from ldt.runs.run import checkpoint_of, open_run

MMDET = "mmdet"


def run(checkpoint: Path, out: Path, form: str, trust: bool, **options: Any) -> None:
    """Export the detector of a checkpoint.

    Args:
        checkpoint: of a run, its directory, or what :meth:`ldt.api.PruningResult.save` wrote.
        out: a folder for mmdet, a file for a runtime.
        form: ``mmdet``, ``onnx`` or ``openvino``.
        trust: see :func:`ldt.load_pruned`.
        options: those of the command.
    """
    with refusing():
        checkpoint = checkpoint_of(checkpoint)
        given = [name for name, value in options.items() if value]
        if form == MMDET and given:
            name = given[0].replace("_", "-")
            raise ValueError(f"--{name} is for a file of a runtime: add --format onnx or openvino")
    if form == MMDET:
        with refusing():
            written = to_mmdet.export(checkpoint, out, trust)
        click.echo(f"written: {written / to_mmdet.CONFIG}, {written / to_mmdet.WEIGHTS}")
        return
    with refusing():
        check_out(out, cast(Runtime, form))  # before data are read
        size = parse_size(options["size"])
        images = Images(options["images"], find_data(checkpoint, options["data"], size, trust))
    written = export_file(
        checkpoint,
        out,
        cast(Runtime, form),
        raw=options["raw"],
        size=size,
        max_detections=options["max_detections"],
        quantised=options["int8"],
        images=images,
        force=options["force"],
        trust=trust,
        tell=click.echo,
    )
    weights = written.with_suffix(".bin")
    click.echo(f"written: {written}" + (f", {weights}" if form == "openvino" else ""))


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Return height and width of a text such as 320x640."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if match is None:
        raise ValueError(f"--size {text}; allowed: height x width in pixels, e.g. --size 320x640")
    return int(match[1]), int(match[2])


def find_data(
    checkpoint: Path,
    folder: Path | None = None,
    size: tuple[int, int] | None = None,
    trust: bool = False,
    files: dict[str, str] | None = None,
) -> DetectionDataModule | None:
    """Return the data that were given, or those of the checkpoint's run; None if neither is.

    Args:
        checkpoint: its classes and the size of its images are those of the data.
        folder: of data in COCO's or KITTI's layout.
        size: (height, width) of images instead.
        trust: see :func:`ldt.load_pruned`.
        files: see :func:`ldt.data.folders.open_folder`.
    """
    if folder is None and not holds_run(checkpoint.absolute().parent):
        return None
    content = read(checkpoint, trust)
    steps, classes = resize_steps(content, checkpoint), content["ldt"]["classes"]
    if folder is None:
        try:
            data = data_of(open_run(checkpoint.absolute().parent), trust)
        except FileNotFoundError:  # a run of elsewhere, without its data
            return None
    else:
        data = open_folder(folder, {"classes": tuple(classes)}, files or {})
        data.setup("fit")
    data.resize = resized(steps, size)
    return data
