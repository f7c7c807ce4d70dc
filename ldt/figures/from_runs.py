"""Pictures of a finished run, saved in its folder."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ldt.data.datamodule import DetectionDataModule
from ldt.data.summary import NAMES
from ldt.detectors.checkpoints import detector_of, read
from ldt.evaluation import kept_detections
from ldt.evaluation.confusion import confusion_matrix
from ldt.evaluation.gradcam import heatmap
from ldt.evaluation.metrics import MAX_DETECTIONS, precision_curves
from ldt.evaluation.neck_statistics import NeckSpace, neck_spaces
from ldt.figures.accuracy import draw_class_ap, draw_confusion, draw_precision_recall
from ldt.figures.attention import Attention, View
from ldt.figures.channels import draw_channels
from ldt.figures.curves import draw_curve
from ldt.figures.detections import Scene, ShownBoxes, draw_detections
from ldt.figures.discriminants import draw_discriminants
from ldt.figures.labels import draw_labels
from ldt.figures.shrinking import draw_shrinking
from ldt.figures.style import save
from ldt.figures.training import draw_training
from ldt.objects import Instances, corners
from ldt.pruning import structure
from ldt.runs.files import detections, picture_folder, round_checkpoint
from ldt.runs.formatting import number
from ldt.runs.run import training_log

if TYPE_CHECKING:
    from mmdet.models.detectors import BaseDetector

log = logging.getLogger(__name__)

ACCURACY = ("precision_recall", "class_ap", "confusion")  # figures of kept detections
METRICS = ("AP", "AP50", "AP75", "mAP", "kitti_moderate")  # shown over the epochs
SHOWN_PARTS = ("backbone", "neck")
ENOUGH = 256  # maximum validation images whose objects are shown


def draw_run(
    summary: Mapping[str, Any],
    folder: Path,
    data: DetectionDataModule,
    pictures: int,
    limit: float | None = None,
    max_detections: int = MAX_DETECTIONS,
) -> None:
    """Draw a run's figures into ``<folder>/pictures``.

    These are ``results.png`` (losses and metrics over epochs), ``metric_vs_params.png``, for pruned
    runs ``channels.png`` and ``shrinking.png``, and from the kept detections of the base and the
    last round ``precision_recall.png``, ``class_ap.png`` and ``confusion.png``.
    Those that run detectors on validation images are ``detections.png`` (ground truth, base and
    last round) and, with LDT, ``discriminants.png`` of the base, unless there are too few objects.

    Args:
        summary: ``summary.json`` of the run.
        folder: the run's directory, with ``round-<t>.ckpt`` of every round.
        data: data module after ``setup``; its validation images are shown.
        pictures: number of evenly spaced validation images in ``detections.png``; 0: no detector
            is run, and both figures that need one are omitted.
        limit: ``trainer.limit_val_batches``, a number of batches or a share of them as a float;
            ``discriminants.png`` is of no more images.
        max_detections: detections per image and class that count for AP.

    Raises:
        ValueError: a checkpoint is damaged.
        FileNotFoundError: a checkpoint is missing.
    """
    target, rows, metric = picture_folder(folder), summary["rounds"], summary["metric"]
    files = [folder / round_checkpoint(row["round"]) for row in rows]
    ends = [0, -1] if len(rows) > 1 else [0]
    if pictures:
        titles = [title(rows[end], metric) for end in ends]
        shown = scenes([files[end] for end in ends], data, pictures)
        save(draw_detections(shown, data.classes, titles), target / "detections.png")
    # where nothing was trained and no validation image has an object, there is nothing to show
    _save_if_any(lambda: draw_training(training_log(folder), METRICS), target / "results.png")
    save(draw_curve(rows, metric), target / "metric_vs_params.png")
    kept = {end_title(rows[end]): folder / detections(rows[end]["round"]) for end in ends}
    if all(file.is_file() for file in kept.values()):
        for name, figure in accuracy_figures(kept, max_detections=max_detections).items():
            save(figure, target / f"{name}.png")
    if len(files) > 1:
        networks = [channels(file) for file in files]
        save(draw_channels(networks[0], networks[-1]), target / "channels.png")
        names = [side_title(row, metric) for row in rows]
        save(draw_shrinking(networks, names), target / "shrinking.png")
    if pictures and summary.get("ldt"):
        images = min(ENOUGH, _validated(data, limit))
        base = title(rows[0], metric)
        _save_if_any(lambda: _strongest(files[0], base, data, images), target / "discriminants.png")


def accuracy_figures(
    kept: Mapping[str, Path],
    names: Sequence[str] = ACCURACY,
    max_detections: int = MAX_DETECTIONS,
) -> dict[str, Figure]:
    """Draw the figures of kept detections by their names, empty if there is no object.

    Args:
        kept: files with detections by the detector's name, one detector or base and pruned.
        names: of the figures, of :data:`ACCURACY`.
        max_detections: detections per image and class that count for AP.

    Raises:
        FileNotFoundError: a file is missing.
        DamagedError: a file cannot be read.
    """
    found = {name: kept_detections.load(file) for name, file in kept.items()}
    classes = next(iter(found.values()))[1]
    images = {name: images for name, (images, _) in found.items()}
    if not any(len(image.truths.labels) for own in images.values() for image in own):
        return {}
    count = len(classes)

    @cache
    def curves() -> dict[str, np.ndarray]:
        return {n: precision_curves(own, count, max_detections) for n, own in images.items()}

    draws = {
        "precision_recall": lambda: draw_precision_recall(
            {name: own[0] for name, own in curves().items()}, classes
        ),
        "class_ap": lambda: draw_class_ap(
            {name: own.mean(axis=(0, 1)) for name, own in curves().items()}, classes
        ),
        "confusion": lambda: draw_confusion(
            {name: confusion_matrix(own, count) for name, own in images.items()}, classes
        ),
    }
    return {name: draws[name]() for name in names}


def draw_labels_of(data: DetectionDataModule, folder: Path) -> None:
    """Draw what the splits of a run hold into ``<folder>/pictures/labels.png``."""
    counts = {name: data.object_counts(split) for split, name in NAMES.items()}
    areas = {
        name: [area for image in data.facts(split) for area in image.areas]
        for split, name in NAMES.items()
    }
    save(draw_labels(counts, areas, data.classes), picture_folder(folder) / "labels.png")


def _validated(data: DetectionDataModule, limit: float | None) -> int:
    """Count the images of a validation; see :func:`draw_run`."""
    if isinstance(limit, int):
        return limit * data.val_batch_size
    share = 1.0 if limit is None else limit
    return int(share * len(data.val_dataloader())) * data.val_batch_size


def _save_if_any(draw: Callable[[], Figure], file: Path) -> None:
    """Save a figure; if there is nothing to draw, log why."""
    try:
        figure = draw()
    except ValueError as error:
        log.warning("no %s: %s", file.name, error)
    else:
        save(figure, file)


def _strongest(checkpoint: Path, name: str, data: DetectionDataModule, images: int) -> Figure:
    """Draw the discriminant space of a detector's strongest scale."""
    best = max(spaces(checkpoint, data, images), key=lambda space: space.power)
    return draw_discriminants([best], [name], class_names(data))


def class_names(data: DetectionDataModule) -> list[str]:
    """Return the names of all labels in label order; that of the background (-1) is last."""
    return [*data.classes, "background"]


def title(row: Mapping[str, Any], metric: str, name: str | None = None) -> str:
    """Two-line title: the round's name (or the given one), its metric and size."""
    name = name or end_title(row)
    return f"{name}\n{number(row.get(metric), 3)} {metric}, {number(row['params'], 2, 1e-6)} M"


def end_title(row: Mapping[str, Any]) -> str:
    """Short name of a detector: ``base`` or ``round 2``."""
    return "base" if row["round"] == 0 else f"round {row['round']}"


def side_title(row: Mapping[str, Any], metric: str) -> str:
    """:func:`title` in three short lines."""
    return title(row, metric).replace(", ", "\n")


def channels(checkpoint: Path) -> dict[str, int]:
    """Output channels of the layers of backbone and neck, in network order."""
    sizes = structure.channels(read(checkpoint)["ldt"]["structure"])
    return {name: n for name, n in sizes.items() if name.split(".")[0] in SHOWN_PARTS}


def spaces(
    checkpoint: Path, data: DetectionDataModule, images: int | None = None
) -> list[NeckSpace]:
    """Compute the discriminant space of each scale from objects of the first validation images.

    Raises:
        ValueError: there are fewer than two classes with two objects.
    """
    detector, neck, background = _load(checkpoint)
    loader = data.probe_dataloader("val", data.val_batch_size)
    batches = None if images is None else max(1, images // data.val_batch_size)
    return neck_spaces(detector, islice(loader, batches), neck, background=background)


def scenes(files: Sequence[Path], data: DetectionDataModule, pictures: int) -> list[Scene]:
    """Run each checkpoint's detector on evenly spaced validation images."""
    items = _items(data, pictures)
    found = [_detect(_load(file)[0], items) for file in files]
    return [_scene(item, list(boxes)) for item, *boxes in zip(items, *found, strict=True)]


def views(files: Sequence[Path], data: DetectionDataModule, pictures: int) -> list[View]:
    """Compute attention maps of each checkpoint's detector on evenly spaced validation images."""
    items = _items(data, pictures)
    looked = []
    for file in files:
        detector, neck, _ = _load(file)
        maps = [heatmap(detector, item, neck) for item in items]
        looked.append([
            Attention(_content(item, found), corners)
            for item, (found, corners) in zip(items, maps, strict=True)
        ])  # fmt: skip
    shown = [_scene(item, []) for item in items]
    return [
        View(scene.pixels, scene.size, scene.truth.corners, list(seen))
        for scene, *seen in zip(shown, *looked, strict=True)
    ]


def _load(checkpoint: Path) -> "tuple[BaseDetector, str, bool]":
    """Load the detector, on a GPU if available; return its neck's name and `background` too."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    content = read(checkpoint)
    record = content["ldt"]
    return detector_of(content, device), record.get("neck", "auto"), record.get("background", False)


def _items(data: DetectionDataModule, pictures: int) -> list[dict[str, Any]]:
    dataset: Any = data.val_dataloader().dataset
    count = min(pictures, len(dataset))
    return [dataset[int((i + 0.5) * len(dataset) / count)] for i in range(count)]


@torch.no_grad()
def _detect(detector: "BaseDetector", items: Iterable[dict[str, Any]]) -> list[ShownBoxes]:
    """Detect objects in original-image pixels, one image at a time (sizes may differ)."""
    found = []
    for item in items:
        batch = {"inputs": [item["inputs"]], "data_samples": [item["data_samples"]]}
        data = detector.data_preprocessor(batch, False)
        (sample,) = detector(**data, mode="predict")
        found.append(_boxes(sample.pred_instances))
    return found


def _boxes(instances: Any) -> ShownBoxes:
    scores = instances.scores.numpy(force=True) if "scores" in instances else None
    return ShownBoxes(_corners(instances), instances.labels.numpy(force=True), scores)


def _corners(instances: Instances) -> np.ndarray:
    return corners(instances).numpy(force=True).copy()


def _scene(item: dict[str, Any], found: Sequence[ShownBoxes]) -> Scene:
    """Build a scene from the unpadded network input, ground truth and detections."""
    sample = item["data_samples"]
    pixels = item["inputs"].flip(0).permute(1, 2, 0).numpy(force=True)  # BGR to RGB
    height, width = sample.ori_shape[:2]
    return Scene(
        _content(item, pixels),
        (height, width),
        _boxes(sample.gt_instances),
        _corners(sample.ignored_instances),
        found,
    )


def _content(item: dict[str, Any], whole: np.ndarray) -> np.ndarray:
    """Crop the padding from a map [h, w, ...] over the network's input."""
    sample = item["data_samples"]
    (height, width), (scale_x, scale_y) = sample.ori_shape[:2], sample.scale_factor
    return whole[: round(height * scale_y), : round(width * scale_x)]
