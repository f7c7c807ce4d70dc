"""The pictures of a finished run, in its folder."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldt.checkpoints import load_pruned, read
from ldt.data.datamodule import DetectionDataModule
from ldt.figures.channels import draw_channels
from ldt.figures.curves import draw_curve
from ldt.figures.detections import Boxes, Scene, draw_detections
from ldt.figures.style import save
from ldt.pruning import structure
from ldt.report import number

SHOWN_PARTS = ("backbone", "neck")


def draw_run(
    summary: Mapping[str, Any], folder: Path, data: DetectionDataModule, pictures: int
) -> None:
    """Write a run's figures into ``<folder>/pictures``.

    ``detections.png`` (ground truth, base and last round on some validation images),
    ``map_vs_params.png`` and, where something was pruned, ``channels.png``.

    Args:
        summary: of the run.
        folder: the run's directory, with ``round-<t>.ckpt`` of the first and the last round.
        data: set up; its validation images are shown.
        pictures: validation images in ``detections.png``, evenly spread; 0 leaves it out.

    Raises:
        ValueError: ``pictures`` is negative, or a checkpoint is damaged.
        FileNotFoundError: a checkpoint is missing.
    """
    if pictures < 0:
        raise ValueError(
            f"report.pictures={pictures} must be 0 (no pictures of detections) or more"
        )
    target, rows = folder / "pictures", summary["rounds"]
    ends = [rows[0], rows[-1]] if len(rows) > 1 else rows
    files = [folder / f"round-{row['round']}.ckpt" for row in ends]
    if pictures:
        titles = [_title(row, summary["metric"]) for row in ends]
        figure = draw_detections(_scenes(files, data, pictures), data.classes, titles)
        save(figure, target / "detections.png")
    save(draw_curve(rows, summary["metric"]), target / "map_vs_params.png")
    if len(files) > 1:
        original, kept = (_channels(file) for file in files)
        save(draw_channels(original, kept), target / "channels.png")


def _title(row: Mapping[str, Any], metric: str) -> str:
    name = "base" if row["round"] == 0 else f"round {row['round']}"
    return f"{name}\n{number(row.get(metric), 3)} {metric}, {number(row['params'], 2, 1e-6)} M"


def _channels(checkpoint: Path) -> dict[str, int]:
    """Output channels of the layers of backbone and neck, in network order."""
    sizes = structure.channels(read(checkpoint)["ldt"]["structure"])
    return {name: n for name, n in sizes.items() if name.split(".")[0] in SHOWN_PARTS}


def _scenes(files: Sequence[Path], data: DetectionDataModule, pictures: int) -> list[Scene]:
    """Validation images, evenly spread, with the detections of each checkpoint's detector."""
    dataset: Any = data.val_dataloader().dataset
    count = min(pictures, len(dataset))
    items = [dataset[int((i + 0.5) * len(dataset) / count)] for i in range(count)]
    found = [_detect(load_pruned(file), items) for file in files]
    return [_scene(item, list(boxes)) for item, *boxes in zip(items, *found, strict=True)]


@torch.no_grad()
def _detect(detector: Any, items: Iterable[dict[str, Any]]) -> list[Boxes]:
    """Detections in pixels of the original images, one image at a time (sizes may differ)."""
    found = []
    for item in items:
        batch = {"inputs": [item["inputs"]], "data_samples": [item["data_samples"]]}
        data = detector.data_preprocessor(batch, False)
        (sample,) = detector(**data, mode="predict")
        found.append(_boxes(sample.pred_instances))
    return found


def _boxes(instances: Any) -> Boxes:
    scores = instances.scores.numpy(force=True) if "scores" in instances else None
    return Boxes(_corners(instances), instances.labels.numpy(force=True), scores)


def _corners(instances: Any) -> np.ndarray:
    boxes = getattr(instances.bboxes, "tensor", instances.bboxes)
    return boxes.numpy(force=True).copy()


def _scene(item: dict[str, Any], found: Sequence[Boxes]) -> Scene:
    """The network's input without its padding, and what belongs to it."""
    sample, pixels = item["data_samples"], item["inputs"]
    (height, width), (scale_x, scale_y) = sample.ori_shape[:2], sample.scale_factor
    content = pixels[:, : round(height * scale_y), : round(width * scale_x)]
    return Scene(
        content.flip(0).permute(1, 2, 0).numpy(force=True),  # BGR to RGB
        (height, width),
        _boxes(sample.gt_instances),
        _corners(sample.ignored_instances),
        found,
    )
