"""`ldt prune`: the effect of pruning without training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from torch import nn

from ldt.api import calibration_batches, evaluate, prune
from ldt.cli.subjects import open_subject
from ldt.criteria.methods import find_method
from ldt.data.datamodule import DetectionDataModule
from ldt.detectors.opening import SUFFIX
from ldt.loop.schedule import PruningSchedule
from ldt.runs.files import check_folder_of
from ldt.runs.refusal import refusing
from ldt.runtimes.latency_table import LatencyTarget

OPTIONS = {  # what messages about keys of the configuration name here
    "prune.rate": "--rate",
    "prune.budget": "--budget",
    "prune.latency.target_ms": "--target-ms",
    "prune.latency.runtime": "--runtime",
    "prune.latency.threads": "--threads",
    "prune.repair": "--repair",
    "detector.config": "CONFIG",
    "detector.checkpoint": "WEIGHTS",
    "Type dataset.root=": "DATA is such a folder: ",
    "type dataset.root=": "give DATA: ",
    "dataset.root": "DATA",
    "dataset.train_ann": "--train-ann",
    "dataset.train_img": "--train-img",
    "dataset.val_ann": "--val-ann",
    "dataset.val_img": "--val-img",
}


def run(
    given: Sequence[str],
    *,
    images: int,
    val: int,
    out: Path | None,
    files: dict[str, str],
    latency: dict[str, Any],
    trust: bool = False,
    **options: Any,
) -> None:
    """Prune the detector and print what was removed and the change in AP.

    Args:
        given: the detector and the data, see :func:`ldt.cli.subjects.open_subject`.
        images: calibration images.
        val: validation images that AP is measured on; 0 does not measure.
        out: the checkpoint to write, or None.
        files: ``train_ann``, ``train_img``, ``val_ann`` and ``val_img`` of one's own COCO files.
        trust: of a checkpoint, see :func:`ldt.load_pruned`.
        latency: that of :func:`ldt.prune`; null: not given.
        options: ``rate``, ``criterion``, ``budget``, ``ranking``, ``repair`` of :func:`ldt.prune`.
    """
    options["latency"] = {key: value for key, value in latency.items() if value is not None}
    with refusing():
        _check_options(out, **options)
        subject = open_subject(given, files, trust)
    detector, module = subject.detector, subject.data
    of = f" of {module.root}" if module.root else ""
    click.echo(f"{subject.name}: {images} calibration images{of}")
    with refusing():  # before anything is measured, since the rate may not be reachable
        result = prune(
            detector, module, calibration_images=images, config=subject.config, **options
        )
    click.echo(result)
    before = _measure(detector, module, val)
    after = _measure(result.detector, module, val)
    for name in before:
        click.echo(
            f"{name} on {val} validation images, before any retraining: "
            f"{before[name]:.3f} -> {after[name]:.3f}"
        )
    if out is not None:
        click.echo(f"written: {result.save(out)}")


def _check_options(
    out: Path | None,
    rate: float | None,
    criterion: str,
    budget: str,
    ranking: str | None,
    repair: object,
    latency: dict[str, Any],
) -> None:
    """Check what needs no image, before anything is measured."""
    find_method(criterion, ranking)
    if latency and budget != "latency":
        name = next(iter(latency)).replace("_", "-")
        raise ValueError(f"--{name} is for --budget latency; --budget {budget} was given")
    if (rate is None) == ("target_ms" not in latency):
        either = " or, with --budget latency, --target-ms (the latency to reach)"
        raise ValueError(f"give either --rate (the share to remove){either}")
    target = LatencyTarget(**latency)
    PruningSchedule.one_shot(
        0.5 if rate is None else rate, budget=budget, repair=repair, latency=target
    )
    if out is not None:
        check_folder_of(out)
        if out.suffix != SUFFIX:
            raise ValueError(f"--out {out}: the name of a checkpoint ends in {SUFFIX}")


def _measure(detector: nn.Module, data: DetectionDataModule, images: int) -> dict[str, float]:
    """AP and AP50 on evenly spread validation images."""
    if not images:
        return {}
    loader = calibration_batches(data.val_dataloader().dataset, images, data.val_batch_size)
    found = evaluate(detector, loader, data.classes)
    return {name: found[name] for name in ("AP", "AP50")}
