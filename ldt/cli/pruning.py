"""The command `ldt prune`: show what pruning removes and its cost in AP, without training."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from mmengine.dataset import pseudo_collate
from torch.utils.data import DataLoader, Subset

from ldt.api import calibration_batches, evaluate, prune
from ldt.criteria.methods import find_method
from ldt.data.coco import CocoDataModule
from ldt.data.datamodule import DetectionDataModule
from ldt.data.kitti import KittiDataModule
from ldt.detectors.models import input_settings
from ldt.detectors.opening import OpenedDetector, open_detector
from ldt.loop.schedule import PruningSchedule
from ldt.pruning.costs import parse_budget
from ldt.runs.refusal import refusing


@dataclass(frozen=True)
class PruningCommand:
    """Arguments and options of `ldt prune`.

    Attributes:
        config: an mmdet config file or a packaged one.
        weights: weights of the detector.
        data: a folder in COCO's or KITTI's layout.
        rate: share of the budget to remove.
        criterion: name of a method.
        budget: ``params`` or ``macs``.
        ranking: how scores of different layers are compared; None: the method's default.
        images: number of calibration images.
        validate: number of validation images to measure AP on; 0 skips the measurement.
        out: checkpoint to write, or None.
        files: ``train_ann``, ``train_img``, ``val_ann`` and ``val_img`` of a custom data set in
            COCO format.
    """

    config: str
    weights: Path
    data: Path
    rate: float
    criterion: str
    budget: str
    ranking: str | None
    images: int
    validate: int
    out: Path | None
    files: dict[str, str]


def run(command: PruningCommand) -> None:
    """Prune the detector and print what was removed and the change in AP."""
    with refusing():
        _check_options(command)
        data = _open_data(command)
        data.setup("fit")
        opened = replace(open_detector(command.config, command.weights), classes=data.classes)
        _check_classes(opened, data)
        images = calibration_batches(data, command.images, 16)
    click.echo(f"{command.config}: {command.images} calibration images of {command.data}")
    before = _measure(opened.model, data, command.validate)
    with refusing():
        result = prune(
            opened.model,
            images,
            rate=command.rate,
            criterion=command.criterion,
            budget=command.budget,
            ranking=command.ranking,
            config=command.config,
            classes=data.classes,
            resize=data.resize,
            inplace=True,
        )
    click.echo(result)
    after = _measure(result.detector, data, command.validate)
    for name in before:
        click.echo(
            f"{name} on {command.validate} validation images, before any retraining: "
            f"{before[name]:.3f} -> {after[name]:.3f}"
        )
    if command.out is not None:
        click.echo(f"written: {result.save(command.out)}")


def _check_options(command: PruningCommand) -> None:
    """Check what needs no image, before anything is measured."""
    find_method(command.criterion, command.ranking)
    PruningSchedule(
        rate=command.rate,
        rounds=1,
        base_epochs=0,
        retrain_epochs=1,
        budget=parse_budget(command.budget),
    )
    if command.out is not None and not command.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {command.out}: there is no folder {command.out.parent}")


def _open_data(command: PruningCommand) -> DetectionDataModule:
    settings: dict[str, Any] = {"root": str(command.data), **input_settings(command.config)}
    if (command.data / "training" / "label_2").is_dir():
        return KittiDataModule(**settings)
    settings |= command.files
    return CocoDataModule(**settings)


def _check_classes(opened: OpenedDetector, data: DetectionDataModule) -> None:
    head: Any = getattr(opened.model, "bbox_head", None)
    classes = getattr(head, "num_classes", len(data.classes))
    if classes != len(data.classes):
        raise ValueError(
            f"the detector predicts {classes} classes, the data have {len(data.classes)} "
            f"({', '.join(data.classes[:5])}, ...): give the data set it was trained on"
        )


def _measure(detector: Any, data: DetectionDataModule, images: int) -> dict[str, float]:
    """AP and AP50 on evenly spread validation images."""
    if not images:
        return {}
    dataset: Any = data.val_dataloader().dataset
    count = min(images, len(dataset))
    chosen = Subset(dataset, [index * len(dataset) // count for index in range(count)])
    loader = DataLoader(chosen, data.val_batch_size, collate_fn=pseudo_collate)
    found = evaluate(detector, loader, data.classes)
    return {name: found[name] for name in ("AP", "AP50")}
