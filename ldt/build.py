"""Build data, model, callbacks and trainer from a config; invalid values raise before training."""

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from torch_pruning.pruner.importance import Importance

from ldt.callbacks.checkpoint_io import AtomicCheckpointIO
from ldt.callbacks.distillation import Distillation, check_head
from ldt.callbacks.ema import ExponentialMovingAverage
from ldt.callbacks.ldt_loss import LDTLoss
from ldt.callbacks.lightning_internals import (
    ignore_signals,
    lift_step_limit,
    set_max_epochs,
    starts_processes,
)
from ldt.callbacks.progress import RunProgress
from ldt.callbacks.seeds import EpochSeeds
from ldt.callbacks.yolox_mode_switch import YOLOXModeSwitch
from ldt.config import as_dict
from ldt.config.keys import check_names
from ldt.config.values import check_against_schema, check_arguments, typed
from ldt.data.datamodule import DetectionDataModule
from ldt.data.summary import check_data
from ldt.detectors.checkpoints import read
from ldt.detectors.models import input_settings, model_config, quiet, raise_max_per_img
from ldt.evaluation.metrics import MAX_DETECTIONS
from ldt.loop.gradual_masking import GradualPruning
from ldt.loop.prune_retrain import PruneRetrain
from ldt.loop.schedule import PruningSchedule, default_round_to
from ldt.module import DetectorModule, find_optimizer, restored
from ldt.progress.steps import Steps
from ldt.pruning.budget import Limits
from ldt.pruning.costs import parse_budget
from ldt.recipe import PARAMWISE, check_recipe, micro_batch, set_keys
from ldt.runs import files, inputs
from ldt.runs.identity import canonical_precision
from ldt.runs.refusal import KINDS, refusing
from ldt.runs.run import Run, load_config
from ldt.runtimes.latency_table import LatencyTarget

log = logging.getLogger(__name__)
# keys of dataset that are not passed to the data module
LABELS_OF_DATA = ("name", "metric", "scales", "max_detections")
OURS = ("validate_every", "threads", "compile")  # keys of trainer that Lightning does not have


def check_config(config: DictConfig) -> None:
    """Check choices, and that the configured classes accept their keys, before anything is built.

    Raises:
        ValueError: a value is not allowed or a class does not accept a key; the message names the
            key and what is allowed or the closest argument.
    """
    plain = as_dict(config)
    method, recipe = plain["method"], plain["recipe"]
    check_against_schema(plain)
    check_recipe(recipe)
    _check_target("method.criterion", method["criterion"])
    check_arguments("method.gradual", GradualPruning, method["gradual"] or {})
    _check_target("logger", plain["logger"], passed=["save_dir"])
    _check_target("dataset", _of_data(plain["dataset"]), passed=_for_data(config))
    _check_gradual(method["gradual"], plain["trainer"])
    _check_average(recipe["ema"], plain["trainer"].get("precision"))
    check_names("recipe.paramwise", recipe["paramwise"], PARAMWISE)
    optimizer, keys = find_optimizer(recipe["optimizer"].get("type")), set_keys(recipe["optimizer"])
    check_arguments("recipe.optimizer", optimizer, keys, ["type"], ["params"])
    _check_input(plain)


def _check_input(plain: dict[str, Any]) -> None:
    """Check that the training pipeline of an mmdet config has the input size of the data.

    Raises:
        ValueError: it has another one.
    """
    if plain["recipe"]["augment"] != "config":
        return
    dataset, path = plain["dataset"], plain["detector"]["config"]
    theirs = input_settings(path)
    ours = {"keep_ratio": dataset.get("keep_ratio", True), "pad": plain["detector"]["pad"]}
    ours["scale"] = tuple(dataset["scale"])
    keys = {"scale": "dataset.scale", "keep_ratio": "dataset.keep_ratio", "pad": "detector.pad"}
    needed = [f"{keys[key]}={typed(theirs[key])}" for key in keys if theirs[key] != ours[key]]
    if needed:
        raise ValueError(
            f"recipe.augment=config trains as {path} says, whose input is another: type "
            f"{' '.join(needed)}, or recipe.augment=flip"
        )


def _check_gradual(gradual: dict[str, Any] | None, trainer: dict[str, Any]) -> None:
    """Refuse what falsifies the gradients that masking collects while training."""
    precision = trainer.get("precision")
    if gradual and canonical_precision(precision) == "16-mixed":
        raise ValueError(
            f"trainer.precision={precision} scales gradients, which method.gradual collects: type "
            "trainer.precision=bf16-mixed"
        )
    if gradual and trainer.get("compile"):
        raise ValueError(
            "trainer.compile=true hides the layers whose gradients method.gradual collects: type "
            "trainer.compile=false"
        )


def _check_average(momentum: float | None, precision: object) -> None:
    """Refuse a moving average whose steps are lost to rounding."""
    if momentum is not None and canonical_precision(precision) in ("16-true", "bf16-true"):
        raise ValueError(
            f"trainer.precision={precision} rounds off the steps of the moving average, "
            f"recipe.ema={momentum:g}: type trainer.precision=bf16-mixed, or recipe.ema=null"
        )


def _check_target(where: str, given: dict[str, Any] | None, passed: Iterable[str] = ()) -> None:
    """Check a node of the configuration that Hydra instantiates."""
    if not given:
        return
    if "_target_" not in given:
        known = f"type {where}=<name of an option>, or {where}._target_=<a class>"
        raise ValueError(f"{where} has keys ({', '.join(given)}) but no class: {known}")
    check_arguments(where, get_object(given["_target_"]), given, not_these=passed)


def build_schedule(config: DictConfig) -> PruningSchedule:
    """Build the pruning schedule from a configuration."""
    prune, recipe = config.prune, config.recipe
    return PruningSchedule(
        rate=prune.rate,
        rounds=prune.rounds if config.method.criterion else 0,
        base_epochs=recipe.epochs,
        retrain_epochs=recipe.retrain_epochs,
        budget=prune.budget,
        ranking=config.method.ranking,
        inner_rounds=config.method.inner_rounds,
        scope=tuple(prune.scope),
        limits=Limits(prune.max_layer_rate, prune.min_channels, _round_to(prune)),
        images=prune.images,
        batch_size=prune.batch_size,
        retrain_lr=recipe.retrain_lr,
        repair=prune.repair,
        latency=LatencyTarget(**prune.latency),
        channels=prune.channels,
        weights=prune.weights,
    )


def _round_to(prune: DictConfig) -> int:
    """Return the number that widths are multiples of."""
    if prune.round_to != "auto":
        return prune.round_to
    return default_round_to(parse_budget(prune.budget))


def distilled(plain: dict[str, Any]) -> dict[str, float]:
    """Return the keys of distillation; none if it is off."""
    keys = plain.get("distill") or {}
    return keys if keys.get("neck") or keys.get("head") else {}


def build_loop(config: DictConfig, plan: PruningSchedule, folder: Path) -> PruneRetrain:
    """Build the prune-retrain loop and its criterion."""
    method = config.method
    criterion = build_criterion(config)
    return PruneRetrain(
        plan,
        criterion,
        folder,
        gradual=GradualPruning(**method.gradual) if method.gradual else None,
        latency_runs=config.report.latency_runs,
        runtimes=config.report.get("runtimes", ()),
        validate_every=config.trainer.validate_every,
        keep_detections=config.report.detections,
        before_retraining=config.report.get("before_retraining", False),
    )


def build_criterion(config: DictConfig) -> Importance | None:
    """Build the pruning criterion; None if the method does not prune."""
    return _instantiate(config.method.criterion)


def _instantiate(node: DictConfig | dict[str, Any] | None, **options: Any) -> Any:
    """Build what a node of the configuration names; what it refuses is raised as it is."""
    try:
        return instantiate(node, **options)
    except InstantiationException as error:
        if isinstance(error.__cause__, KINDS):
            raise error.__cause__ from None
        raise


def build_data(config: DictConfig) -> DetectionDataModule:
    """Build the data module."""
    return _instantiate(_of_data(config.dataset), _convert_="all", **_for_data(config))


def _of_data(dataset: Any) -> dict[str, Any]:
    """Return the dataset keys to pass to the data module; null keeps the default."""
    return {k: v for k, v in dataset.items() if k not in LABELS_OF_DATA and v is not None}


def _for_data(config: DictConfig) -> dict[str, Any]:
    """Arguments of the data module that come from other config groups."""
    recipe = as_dict(config.recipe)
    detector = as_dict(config.detector)
    return {
        "batch_size": config.recipe.batch_size,
        "seed": config.seed,
        **{key: recipe[key] for key in ("augment", "pipeline", "plain_pipeline")},
        **{key: detector[key] for key in ("pad", "mosaic_scale", "mixup")},
    }


def build_module(
    config: DictConfig, plain: dict[str, Any], data: DetectionDataModule
) -> DetectorModule:
    """Build the detector module for the classes of the data."""
    detector, (width, height) = plain["detector"], data.scale
    if not data.classes:
        raise ValueError(
            f"{type(data).__name__} has no classes after setup: set its `classes`, the names in "
            "label order"
        )
    if plain["recipe"]["epochs"] == 0 and detector["checkpoint"] is None:
        raise ValueError(
            "recipe.epochs=0 skips base training, so weights are needed: detector.checkpoint=<file>"
        )
    background = check_labels(config, data)
    module = DetectorModule(
        _model_config(plain, len(data.classes)),
        data.classes,
        plain["recipe"],
        (-(-height // 32) * 32, -(-width // 32) * 32),  # as batches are padded
        neck=detector["neck"],
        predictors=detector["predictors"],
        checkpoint=detector["checkpoint"],
        resize=data.resize,
        background=background,
        max_detections=max_detections(plain),
        compiled=bool(plain["trainer"].get("compile")),
    )
    if distilled(plain).get("head"):
        check_head(module.adapter)
    if module.untrained and plain["recipe"]["epochs"] == 0:
        _check_untrained(build_schedule(config), str(detector["checkpoint"]), data.classes)
    return module


def _check_untrained(plan: PruningSchedule, checkpoint: str, classes: Sequence[str]) -> None:
    """Warn about predictors that are not trained before pruning.

    Raises:
        ValueError: nor are they trained afterwards.
    """
    told = (
        f"detector.checkpoint={checkpoint} has predictors for another number of classes than the "
        f"{len(classes)} of the data, and recipe.epochs=0 leaves the new ones untrained"
    )
    if not plan.total_epochs:
        raise ValueError(
            f"{told}: type recipe.epochs=12, or dataset.classes=[...] with the classes of the file"
        )
    log.warning(
        "%s: the round `base` measures nothing, and criteria that use the detection loss see "
        "noise; type recipe.epochs=12 to train them first",
        told,
    )


def check_labels(config: DictConfig, data: DetectionDataModule) -> bool:
    """Check that the labels suffice for the method; return whether the background is a class.

    Raises:
        ValueError: the training images have no object, or only one class for a method that needs
            two.
    """
    check_data(data)
    data.training_set()  # raises if the filter of the data leaves no image
    counts = data.object_counts("train")
    single, background = sum(count >= 2 for count in counts) < 2, config.ldt.background
    if single and background is False and _needs_two_classes(config):
        found = ", ".join(f"{n} {name}" for name, n in zip(data.classes, counts, strict=True) if n)
        raise ValueError(
            f"method={config.method.name} needs two classes with two objects each, but the "
            f"training images have {found}: type ldt.background=true, or method=l1"
        )
    return single if background == "auto" else bool(background)


def _needs_two_classes(config: DictConfig) -> bool:
    criterion = config.method.criterion or {}
    by_classes = criterion.get("source") in ("neck", "power", "discriminant")
    return bool(config.ldt.enabled or by_classes)


def _model_config(plain: dict[str, Any], n_classes: int) -> dict[str, Any]:
    own = plain["detector"]
    model = model_config(own["config"], own["options"], n_classes, own["pretrained"])
    if (most := max_detections(plain)) > MAX_DETECTIONS:
        raise_max_per_img(model, most)
    return model


def max_detections(plain: dict[str, Any]) -> int:
    """Return how many detections per image and class count for AP."""
    return plain["dataset"].get("max_detections", MAX_DETECTIONS)  # not in every data set's schema


def build_steps(config: DictConfig, plan: PruningSchedule, data: DetectionDataModule) -> Steps:
    """Build the steps of a run, for its display."""
    return Steps.of_run(
        plan.base_epochs,
        plan.retrain_epochs,
        plan.rounds,
        train_images=len(data.training_set()),
        val_images=len(data.dataset("val")),
        score_images=plan.images * (1 + plan.inner_rounds),  # once before, for batch norms
        masks=bool(config.method.gradual),
    )


def read_inputs(plain: dict[str, Any], data: DetectionDataModule) -> inputs.Inputs:
    """Compute the fingerprints of a run's inputs (:mod:`ldt.runs.inputs`).

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: an input cannot be read.
    """
    model = _model_config(plain, len(data.classes))
    return inputs.record(data.fingerprint(), model, plain["detector"]["checkpoint"])


def read_inputs_without_data(plain: dict[str, Any], run: Run) -> inputs.Inputs:
    """Compute the fingerprints of a finished run's inputs, taking those of its data as recorded.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: an input cannot be read.
    """
    classes = read(run.checkpoint())["ldt"]["classes"]
    data, model = inputs.recorded(run.folder).get("data", {}), _model_config(plain, len(classes))
    return inputs.record(data, model, plain["detector"]["checkpoint"])


def data_of(run: Run, trust: bool = False) -> DetectionDataModule:
    """Load the data of a run from the most recent recorded location that still exists."""
    with refusing():
        config = load_config(run.folder, trust)
        known = inputs.recorded(run.folder).get("places", [])
        places = [place for place in reversed(known) if Path(place).is_dir()]
        if places and not Path(config.dataset.root or places[0]).is_dir():
            config.dataset.root = places[0]
        data = build_data(config)
    data.prepare_data()
    data.setup("fit")
    return data


def module_of(run: Run, trust: bool = False) -> DetectorModule:
    """Load the detector of a run's selected round as a module in eval mode."""
    with refusing():
        recipe = as_dict(load_config(run.folder, trust).recipe)
        checkpoint = read(run.checkpoint(), trust)
    return restored(checkpoint, recipe)


@contextlib.contextmanager
def opened_logger(config: DictConfig, folder: Path) -> Iterator[Logger | None]:
    """Open the configured logger, if any; a W&B run is finished when the block exits."""
    logger: Any = _instantiate(config.logger, save_dir=str(folder)) if config.logger else None
    with logger if hasattr(logger, "__exit__") else contextlib.nullcontext():
        if logger is not None:
            logger.log_hyperparams(as_dict(config))
        yield logger


def build_trainer(
    config: DictConfig,
    plan: PruningSchedule,
    loop: PruneRetrain,
    folder: Path,
) -> L.Trainer:
    """Build the trainer with the callbacks of a run and a CSV logger.

    Raises:
        ValueError: ``recipe.batch_size`` is not divisible among the processes.
    """
    # the first key for older configurations, which lack it
    plain: dict[str, Any] = {"enable_model_summary": False, **as_dict(config.trainer)}
    given: dict[str, Any] = {
        key: value for key, value in plain.items() if key not in OURS and value is not None
    }
    given |= {
        "max_epochs": max(1, plan.total_epochs),  # with 0, a fit would end before it begins
        "gradient_clip_val": config.recipe.clip_grad,
        "callbacks": _callbacks(config, loop, folder),
        "logger": CSVLogger(folder, name="", version=files.next_logs(folder)),
        "plugins": [AtomicCheckpointIO(folder / files.CONFIG)],
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "accelerator": _accelerator(str(plain.get("accelerator", "auto"))),
    }
    trainer: Any = _lightning_trainer(given)
    ignore_signals(trainer)
    if trainer.fast_dev_run:  # applies to each phase; Lightning would stop after the first epoch
        set_max_epochs(trainer, plan.total_epochs)
        lift_step_limit(trainer)
    micro_batch(config.recipe.batch_size, trainer.world_size, trainer.accumulate_grad_batches)
    return trainer


def _lightning_trainer(given: dict[str, Any]) -> L.Trainer:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return L.Trainer(**given)
    except (MisconfigurationException, TypeError) as error:  # the latter for other devices
        raise ValueError(f"Lightning refuses a key of trainer: {error}") from error


def check_processes(config: DictConfig) -> bool:
    """Check that a batch divides among the processes; return whether the trainer will start some.

    Raises:
        ValueError: it does not.
    """
    given = {key: config.trainer[key] for key in ("devices", "strategy", "num_nodes")}
    if given == {"devices": 1, "strategy": "auto", "num_nodes": 1}:
        return False
    quiet()
    bare = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    accelerator = _accelerator(config.trainer.accelerator)
    trainer = _lightning_trainer({**given, **bare, "accelerator": accelerator})
    parts = config.trainer.accumulate_grad_batches
    micro_batch(config.recipe.batch_size, trainer.world_size, parts)
    return starts_processes(trainer)


def _accelerator(asked: str) -> str:
    """Return Lightning's accelerator: never Apple's GPUs, which ``auto`` and ``gpu`` mean on a Mac.

    Raises:
        ValueError: they are asked for.
    """
    if asked not in ("auto", "gpu", "mps") or not MPSAccelerator.is_available():
        return asked
    if asked == "auto":
        return "cpu"
    raise ValueError(
        f"trainer.accelerator={asked}: Apple's GPUs (MPS) have no float64, which the discriminants "
        "and the criteria need: type trainer=cpu"
    )


def _check_plain_epochs(config: DictConfig, schedule: PruningSchedule) -> None:
    """Warn of phases that are as short as their last epochs without mosaic."""
    plain, phases = config.recipe.plain_epochs, {"recipe.epochs": schedule.base_epochs}
    if schedule.rounds:
        phases["recipe.retrain_epochs"] = schedule.retrain_epochs
    short = [f"{key}={epochs}" for key, epochs in phases.items() if 0 < epochs <= plain]
    if short:
        log.warning(
            "recipe.plain_epochs=%d: with %s no epoch has the full augmentation (mosaic); type a "
            "smaller recipe.plain_epochs",
            plain,
            " and ".join(short),
        )


def _callbacks(config: DictConfig, loop: PruneRetrain, folder: Path) -> list[L.Callback]:
    """Build the callbacks of a run in the order in which Lightning calls them."""
    callbacks: list[L.Callback] = []
    if config.trainer.get("enable_progress_bar", True):
        callbacks.append(RunProgress(loop, config.recipe.batch_size))
    callbacks.append(EpochSeeds(config.seed))
    if config.ldt.enabled:
        others = ("enabled", "background")
        terms = {key: value for key, value in config.ldt.items() if key not in others}
        callbacks.append(LDTLoss(**terms))
    if distill := distilled(as_dict(config)):
        callbacks.append(Distillation(folder, loop.schedule.scope, **distill))
    if config.recipe.ema is not None:
        callbacks.append(ExponentialMovingAverage(momentum=config.recipe.ema))
    callbacks.append(loop)
    if config.recipe.plain_epochs:
        _check_plain_epochs(config, loop.schedule)
        plain, l1 = config.recipe.plain_epochs, config.recipe.plain_l1
        callbacks.append(YOLOXModeSwitch(loop.is_last_epoch, plain, l1))
    callbacks.append(  # last, so that it saves the model after pruning
        ModelCheckpoint(
            folder,
            filename="last",
            every_n_epochs=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
    )
    return callbacks
