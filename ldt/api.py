"""Prune a detector in a few lines, without a training recipe, Hydra or Lightning.

>>> import ldt
>>> result = ldt.prune(detector, images, rate=0.3, criterion="ldt", budget="macs")
>>> print(result)
>>> result.save("pruned.ckpt")
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torch_pruning.pruner.importance import Importance

from ldt.config.kinds import Repair
from ldt.config.values import Count, Seed, Share, check_arguments, check_value, check_values
from ldt.criteria.methods import find_method
from ldt.detectors.adapter import Calibration, Detector, RawBatch
from ldt.detectors.checkpoints import pruning_record
from ldt.detectors.forward import evaluating
from ldt.detectors.opening import OpenedDetector, open_detector
from ldt.evaluation.layers import layers
from ldt.evaluation.metrics import MAX_DETECTIONS, DetectionMetrics
from ldt.evaluation.sensitivity import (
    RATES,
    Measure,
    Sensitivity,
    Tell,
    mean_loss,
    measure_sensitivity,
)
from ldt.loop.pruning_round import Unpruned, check_schedule, latency_table, prune_round
from ldt.loop.pruning_round import repair as repair_norms
from ldt.loop.round_record import RoundRecord
from ldt.loop.schedule import PruningSchedule, default_round_to
from ldt.pruning.budget import Limits
from ldt.pruning.costs import parse_budget
from ldt.runs.files import check_folder_of, writing
from ldt.runs.refusal import renaming
from ldt.runtimes.latency_table import LatencyTarget


class CalibrationData(Protocol):
    """A data module of ours."""

    def calibration_dataloader(self, images: int, batch_size: int) -> DataLoader:
        """Return calibration images, the same at every call."""
        ...


Images = Iterable[RawBatch] | Dataset | CalibrationData
LayerSizes = dict[str, dict[str, int]]
KEYS = ("out", "params", "multiply_adds")  # of a layer's sizes
ALLOWED_IMAGES = (
    "give a data loader of mmdet's batches, a data set of mmdet's (both have the keys inputs and "
    "data_samples), or a data module of ldt"
)
NO_IMAGE = "images holds no image; criteria need some labelled ones"
ARGUMENTS = {  # what messages about keys of the configuration name here
    "prune.rate": "rate",
    "prune.scope": "scope",
    "prune.budget": "budget",
    "prune.repair": "repair",
    "prune.max_layer_rate": "limits.max_layer_rate",
    "prune.min_channels": "limits.min_channels",
    "prune.round_to": "limits.round_to",
    "prune.latency": "latency",
    "detector.neck": "neck",
    "detector.predictors": "predictors",
    "detector.config": "config",
    "detector.checkpoint": "weights",
}


@dataclass
class PruningResult:
    """A pruned detector and what pruning changed.

    Attributes:
        detector: the pruned mmdet detector.
        before, after: ``in``, ``out``, ``params`` and ``multiply_adds`` of every layer.
        excluded: layers of the scope that could not be pruned, with the reason.
        record: the scores, and the channels that were removed.

    Example:
        >>> result = ldt.prune(detector, images, rate=0.3)
        >>> list(result.table())
        ['channels', 'kept', 'params', 'params_kept', 'macs', 'macs_kept']
    """

    detector: nn.Module = field(repr=False)
    before: LayerSizes = field(repr=False)
    after: LayerSizes = field(repr=False)
    excluded: dict[str, str] = field(repr=False)
    record: RoundRecord = field(repr=False)
    _about: dict[str, Any] | None = field(repr=False)

    def table(self) -> pd.DataFrame:
        """Return a row per pruned layer, and the whole network's as the last one.

        Columns: output ``channels`` and those that are ``kept``; ``params`` and ``macs`` (of one
        image of the input size) before, and ``params_kept`` and ``macs_kept``.
        """
        rows = {
            name: _row(size, self.after[name])
            for name, size in self.before.items()
            if size["out"] and size != self.after[name]
        }
        return pd.DataFrame.from_dict({**rows, "(network)": _row(*self._totals())}, "index")

    def _totals(self) -> tuple[dict[str, int], dict[str, int]]:
        before, after = (
            {key: sum(size[key] for size in sizes.values()) for key in KEYS}
            for sizes in (self.before, self.after)
        )
        return before, after

    def __str__(self) -> str:
        before, after = self._totals()
        told = [
            f"{before[key] / unit:.3f} -> {after[key] / unit:.3f} {name} "
            f"(-{1 - after[key] / before[key]:.1%})"
            for key, unit, name in (
                ("params", 1e6, "M parameters"),
                ("multiply_adds", 1e9, "GMACs"),
            )
        ]
        if latency := self.record.latency:
            told.append(
                f"{latency['measured_ms']:.2f} ms ({latency['asked_ms']:.2f} asked for, "
                f"{latency['predicted_ms']:.2f} by the table of its layers)"
            )
        return f"{type(self.detector).__name__}: {', '.join(told)}\n{self.table().to_string()}"

    def save(self, path: str | Path) -> Path:
        """Write a checkpoint that :func:`ldt.load_pruned` opens; return its path.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the config of the unpruned detector is not known.
        """
        check_folder_of(path)
        if self._about is None:
            raise ValueError(
                "a checkpoint holds the config that the unpruned detector is built from, which "
                "is not known here; give it: ldt.prune(..., config='my_config.py')"
            )
        state = {f"detector.{key}": value for key, value in self.detector.state_dict().items()}
        with writing(Path(path)) as draft:
            torch.save({"state_dict": state, "ldt": self._about}, draft)
        return Path(path)


@renaming(ARGUMENTS)
def prune(
    detector: nn.Module | Config | str | Path,
    images: Images,
    *,
    rate: float | None = None,
    keep: float | None = None,
    criterion: str | Importance = "ldt",
    budget: str = "params",
    ranking: str | None = None,
    scope: Sequence[str] = PruningSchedule.scope,
    limits: Limits | None = None,
    latency: LatencyTarget | Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    config: Config | str | Path | None = None,
    classes: Sequence[str] | None = None,
    resize: Sequence[dict[str, Any]] | None = None,
    calibration_images: int = PruningSchedule.images,
    batch_size: int = PruningSchedule.batch_size,
    input_size: tuple[int, int] | None = None,
    neck: str | None = None,
    predictors: Sequence[str] | None = None,
    repair: Repair = "bn",
    inplace: bool = False,
    seed: int = 0,
    trust: bool = False,
) -> PruningResult:
    """Remove the least useful channels of a detector, structurally, without training.

    Args:
        detector: an mmdet detector that is built already, an mmdet config (a file, a packaged one
            such as ``mmdet::gfl/gfl_r50_fpn_1x_coco.py``, an mmengine ``Config``), a checkpoint
            of ldt, or a model of transformers or torchvision, of which a copy is taken.
        images: labelled images for calibration: a data loader of mmdet's batches, a data set of
            mmdet's (boxes in the coordinates of the network input), or a data module of ours.
        rate: share of the budget to remove, in (0, 1).
        keep: share of the budget to keep; give either, or a latency to reach.
        criterion: the name of a method of ``conf/method`` (``ldt``, ``group_fisher``, ``chip``,
            ``hrank``, ``px``, ``taylor``, ``obd``, ``l1``, ``l2``, ``lamp``, ``fpgm``,
            ``random``) or an instance.
        budget: ``params``, ``macs`` (``flops`` means the same) or ``latency``.
        ranking: how scores of different layers are compared; the method's own by default.
        scope: parts of the detector that lose filters.
        limits: how far a layer may shrink; with a latency budget its widths are multiples of 16 by
            default.
        latency: of the latency budget: ``runtime`` (``eager``, ``onnxruntime``, ``openvino``),
            ``threads``, and ``target_ms``, a latency to reach in place of a rate.
        weights: of a config's detector.
        config: the mmdet config of a detector that is built already, for :meth:`save`.
        classes: names in label order, for :meth:`save`.
        resize: the steps that bring an image to the network's input size, as mmdet's configs have
            them, for :meth:`save`: `ldt.export` and `ldt.predict` need them.
        calibration_images: at most so many images are looked at.
        batch_size: images in a batch, where ``images`` is a data set.
        input_size: (height, width) that MACs are counted for; that of the first batch by default.
        neck: name of the module whose output feeds the head; found by itself.
        predictors: layers whose outputs are never pruned; found by themselves.
        repair: what is adapted to the removal, on the same images: ``none``, ``bn`` (statistics of
            batch norms) or ``lstsq`` (also the weights that read removed channels, by least
            squares).
        inplace: prune the given detector itself, not a copy.
        seed: of what criteria draw at random.
        trust: of a checkpoint, see :func:`ldt.load_pruned`.

    Returns:
        The pruned detector, with a table and :meth:`~PruningResult.save`.

    Raises:
        ValueError: a value outside of what is allowed, or no image with an object.
        FileNotFoundError: a config or weights file does not exist.
        UnreachableRateError: the rate is not reachable within the scope and per-layer limits.

    Example:
        >>> result = ldt.prune(detector, images, rate=0.3, criterion="ldt", budget="macs")
        >>> type(result.detector).__name__  # an ordinary mmdet detector, as it was given
        'GFL'
        >>> network = result.table().loc["(network)"]
        >>> print(f"{1 - network['macs_kept'] / network['macs']:.1f}")
        0.3
    """
    check_values(
        scope=(scope, Sequence[str], ["backbone"]),
        limits=(limits, Limits | None, None),
        classes=(classes, Sequence[str] | None, ["car", "person"]),
        resize=(resize, Sequence[dict[str, Any]] | None, [{"type": "Resize", "scale": (640, 480)}]),
        calibration_images=(calibration_images, Count, 32),
        batch_size=(batch_size, Count, 16),
        input_size=(input_size, tuple[Count, Count] | None, (480, 640)),
        neck=(neck, str | None, "neck"),
        predictors=(predictors, Sequence[str] | None, ["bbox_head.gfl_cls"]),
        seed=(seed, Seed, 0),
    )
    method = find_method(criterion, ranking)
    target = _target(latency)
    multiple = default_round_to(parse_budget(budget))
    schedule = PruningSchedule.one_shot(
        _rate(rate, keep, target),
        budget=budget,
        latency=target,
        ranking=method.ranking,
        inner_rounds=method.inner_rounds,
        scope=tuple(scope),
        limits=limits or Limits(round_to=multiple),
        images=calibration_images,
        batch_size=batch_size,
        repair=repair,
    )
    names = classes or getattr(images, "classes", None)
    opened = open_detector(detector, weights, names, config, trust)
    if opened.untrained:
        warnings.warn(f"{detector}: the detector has random weights; give weights=", stacklevel=2)
    if isinstance(detector, nn.Module) and not inplace:
        opened.model = deepcopy(opened.model)
    batches = calibration_batches(images, calibration_images, batch_size)
    if steps := resize or getattr(images, "resize", None):
        opened.record = {**opened.record, "resize": steps}
    adapter = _adapter(opened, batches, input_size, neck, predictors)
    return _prune(adapter, opened, batches, schedule, method.criterion, seed)


def _prune(
    detector: Detector,
    opened: OpenedDetector,
    batches: DataLoader,
    schedule: PruningSchedule,
    criterion: Importance,
    seed: int,
) -> PruningResult:
    calibration = Calibration(detector, batches)
    before = layers(detector.model, detector.input_size)
    unpruned = Unpruned.of(detector, latency_table(schedule, detector.example().device))
    schedule = schedule.aimed(unpruned.costs.get("latency", 0.0))
    check_schedule(detector, schedule, unpruned)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        record = prune_round(detector, criterion, calibration, schedule, 1, unpruned)
    repair_norms(detector, calibration, schedule)
    about = None
    if opened.config is not None:
        resize = opened.record.get("resize", ())
        about = pruning_record(detector, opened.config, opened.classes, resize)
    after = layers(detector.model, detector.input_size)
    return PruningResult(detector.model, before, after, record.excluded, record, about)


def _target(given: LatencyTarget | Mapping[str, Any] | None) -> LatencyTarget:
    if isinstance(given, LatencyTarget):
        return given
    check_value("latency", given, Mapping[str, Any] | None, {"runtime": "onnxruntime"})
    check_arguments("latency", LatencyTarget, given or {})
    return LatencyTarget(**(given or {}))


def _rate(rate: float | None, keep: float | None, target: LatencyTarget) -> float:
    if target.target_ms is not None:
        if (rate, keep) != (None, None):
            raise ValueError("give either latency's target_ms or a rate")
        return 0.5  # until the unpruned detector is timed
    if (rate is None) == (keep is None):
        raise ValueError("give either rate= (the share to remove) or keep= (the share to keep)")
    name, given = ("rate", rate) if keep is None else ("keep", keep)
    check_value(name, given, Share, 0.3)
    return 1 - keep if keep is not None else rate  # type: ignore[return-value]


@renaming(ARGUMENTS)
def sensitivity(
    detector: nn.Module | Config | str | Path,
    images: Images,
    *,
    criteria: Sequence[str | Importance] = ("ldt",),
    rates: Sequence[float] = RATES,
    measure: Measure = "loss",
    validation: Images | None = None,
    validation_images: int = 8,
    scope: Sequence[str] = PruningSchedule.scope,
    weights: str | Path | None = None,
    classes: Sequence[str] | None = None,
    calibration_images: int = PruningSchedule.images,
    batch_size: int = PruningSchedule.batch_size,
    input_size: tuple[int, int] | None = None,
    neck: str | None = None,
    predictors: Sequence[str] | None = None,
    seed: int = 0,
    trust: bool = False,
    tell: Tell = lambda *_: None,
) -> Sensitivity:
    """Measure how the loss or AP changes without channels of a single group, for every group.

    Nothing is trained or repaired; the detector stays as it is.

    Args:
        detector: see :func:`ldt.prune`.
        images: labelled images for the criteria, see :func:`ldt.prune`.
        criteria: each a name or an instance, see :func:`ldt.prune`; an instance goes by the name
            of its class, and further ones of that class are numbered.
        rates: shares of a group's channels to remove, those of the lowest scores.
        measure: ``loss``, the detection loss, or ``AP``.
        validation: what is measured on: for the loss such images as ``images``, for AP batches or
            a data set as :func:`ldt.evaluate` takes them. By default the validation images of a
            data module of ours, or for the loss ``images``.
        validation_images: at most so many are measured on.
        scope: parts of the detector whose groups are measured.
        weights: of a config's detector.
        classes: names in label order.
        calibration_images: at most so many of ``images`` are looked at.
        batch_size: images in a batch, where ``images`` is a data set.
        input_size: (height, width) to trace with; that of the first batch by default.
        neck: name of the module whose output feeds the head; found by itself.
        predictors: layers whose outputs are never pruned; found by themselves.
        seed: of what criteria and losses draw at random.
        trust: of a checkpoint, see :func:`ldt.load_pruned`.
        tell: is called with what is done, how much of it, and of how much.

    Raises:
        ValueError: a value outside of what is allowed, or no image with an object.
        FileNotFoundError: a config or weights file does not exist.
    """
    check_values(
        rates=(rates, Sequence[Share], [0.3, 0.6]),
        measure=(measure, Measure, "loss"),
        validation_images=(validation_images, Count, 8),
        calibration_images=(calibration_images, Count, 32),
        batch_size=(batch_size, Count, 16),
        scope=(scope, Sequence[str], ["backbone"]),
        seed=(seed, Seed, 0),
    )
    found = _named(criteria)
    names = classes or getattr(images, "classes", None)
    opened = open_detector(detector, weights, names, trust=trust)
    batches = calibration_batches(images, calibration_images, batch_size)
    module = _adapter(opened, batches, input_size, neck, predictors)
    shown = calibration_batches(_shown(images, validation, measure), validation_images, batch_size)
    read = _kept([*shown])  # from the disk once

    def measured() -> float:
        if measure == "AP":
            return evaluate(module.model, read, opened.classes)["AP"]
        return mean_loss(module, Calibration(module, read))

    given = (Calibration(module, batches), measured, rates, scope, seed, tell)
    return Sensitivity(measure, *measure_sensitivity(module, found, *given))


def _named(criteria: Sequence[str | Importance]) -> dict[str, Importance]:
    """Return criteria by name; instances of one class are numbered from the second on."""
    found: dict[str, Importance] = {}
    seen: Counter[str] = Counter()
    for each in criteria:
        name = each if isinstance(each, str) else type(each).__name__
        if not isinstance(each, str):
            seen[name] += 1
            name += f" {seen[name]}" * (seen[name] > 1)
        found[name] = find_method(each).criterion
    if not found:
        raise ValueError("criteria names none; give at least one, e.g. criteria=['l1']")
    return found


def _shown(images: Any, validation: Images | None, measure: Measure) -> Images:
    """Return what is measured on."""
    if validation is not None:
        return validation
    if hasattr(images, "probe_dataloader"):
        images.setup("fit")
        loader = images.val_dataloader() if measure == "AP" else images.probe_dataloader("val", 1)
        return loader.dataset
    if measure == "AP":
        raise ValueError("measure='AP' needs validation=: images as ldt.evaluate takes them")
    return images


def calibration_batches(images: Images, limit: int, batch_size: int) -> DataLoader:
    """Return collated batches of at most ``limit`` images, the same at every pass.

    Args:
        images: a data module of ours; a data set, of which evenly spread images are taken; or
            collated batches, of which the first ones are kept in memory (a shuffled loader would
            give others at each pass).
        limit: most images.
        batch_size: where ``images`` are not batches already.

    Raises:
        ValueError: there is no image, or ``images`` is something else.
    """
    module: Any = images
    if hasattr(images, "calibration_dataloader"):
        module.setup("fit")
        return module.calibration_dataloader(limit, batch_size)
    if not isinstance(images, Iterable | Dataset) or isinstance(images, str | Mapping | Tensor):
        raise ValueError(f"images is a {type(images).__name__}; {ALLOWED_IMAGES}")
    if hasattr(images, "__len__") and not len(module):
        raise ValueError(NO_IMAGE)
    if hasattr(images, "__getitem__") and not isinstance(_samples(module[0]), list):
        count = min(limit, len(module))
        chosen = Subset(module, [index * len(module) // count for index in range(count)])
        return DataLoader(chosen, batch_size, collate_fn=pseudo_collate)
    found: list[RawBatch] = []
    for batch in module:
        _samples(batch)
        room = limit - sum(len(earlier["data_samples"]) for earlier in found)
        found.append({key: list(islice(value, room)) for key, value in batch.items()})
        if len(found[-1]["data_samples"]) == room:
            break
    if not found:
        raise ValueError(NO_IMAGE)
    return _kept(found)


def _kept(batches: list[RawBatch]) -> DataLoader:
    """Return batches again and again, as copies: mmdet's preprocessors change the samples."""
    return DataLoader(batches, batch_size=None, collate_fn=deepcopy)  # type: ignore[arg-type]


def _samples(item: object) -> Any:
    """Return the labels of an item or batch of ``images``."""
    if not isinstance(item, Mapping) or not {"inputs", "data_samples"} <= item.keys():
        raise ValueError(f"images holds a {type(item).__name__}; {ALLOWED_IMAGES}")
    return item["data_samples"]


def _adapter(
    opened: OpenedDetector,
    batches: DataLoader,
    input_size: tuple[int, int] | None,
    neck: str | None,
    predictors: Sequence[str] | None,
) -> Detector:
    record = opened.record
    height, width = input_size or record.get("input_size") or _size_of_first(opened.model, batches)
    neck = str(neck or record.get("neck", "auto"))
    return Detector(
        opened.model,
        (height, width),
        neck,
        predictors or record.get("predictors"),
        background=record.get("background", len(opened.classes) == 1),
    )


def _size_of_first(model: Any, batches: DataLoader) -> tuple[int, int]:
    """(height, width) of the first batch as the network sees it."""
    images = model.data_preprocessor(next(iter(batches)), False)["inputs"]
    return images.shape[2], images.shape[3]


def _row(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    names = ("channels", "kept", "params", "params_kept", "macs", "macs_kept")
    return dict(zip(names, (sizes[key] for key in KEYS for sizes in (before, after)), strict=True))


@torch.no_grad()
def evaluate(
    detector: nn.Module,
    loader: Iterable[RawBatch],
    classes: Sequence[str] | None = None,
    max_detections: int = MAX_DETECTIONS,
) -> dict[str, float]:
    """Return COCO's and VOC's metrics (``AP``, ``AP50``, ``AP75``, ``mAP``, ...) of a detector.

    Images of KITTI have KITTI's own too (``kitti_easy``, ``kitti_moderate``, ``kitti_hard``).

    Args:
        detector: an mmdet detector.
        loader: batches with boxes in the coordinates of the original images (mmdet's test
            pipelines, ``val_dataloader`` of our data modules).
        classes: names in label order; the detector's by default.
        max_detections: detections per image and class that count for AP; the detector's own limit
            (`max_per_img`) is not changed.

    Example:
        >>> found = ldt.evaluate(detector, images.val_dataloader(), images.classes)
        >>> 0 <= found["AP"] <= found["AP50"]
        True

    Raises:
        ValueError: ``loader`` or ``detector`` is something else.
    """
    if not isinstance(loader, Iterable):
        raise ValueError(f"loader is a {type(loader).__name__}; give batches of a data loader")
    names = tuple(classes or open_detector(detector).classes)
    metrics = DetectionMetrics(names, max_detections)
    step: Any = detector.test_step
    with evaluating(detector):
        for batch in loader:
            metrics.update(step(batch))
    return metrics.compute()
