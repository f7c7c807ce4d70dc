"""From a configuration to the objects of a run; what is wrong with it is told before training."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import lightning as L
from hydra.utils import get_class, instantiate
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError
from torch_pruning.pruner.importance import Importance

from ldt.callbacks.checkpoint_io import AtomicCheckpointIO
from ldt.callbacks.ema import ExponentialMovingAverage
from ldt.callbacks.ldt_loss import LDTLoss
from ldt.callbacks.progress import LogProgress
from ldt.callbacks.seeds import EpochSeeds
from ldt.callbacks.yolox_mode_switch import YOLOXModeSwitch
from ldt.data.datamodule import DetectionDataModule
from ldt.detectors.checkpoints import read
from ldt.detectors.models import model_config
from ldt.loop.gradual_masking import GradualPruning
from ldt.loop.prune_retrain import PruneRetrain
from ldt.loop.schedule import PruningSchedule
from ldt.module import DetectorModule, restored
from ldt.pruning.budget import Limits
from ldt.recipe import check_recipe
from ldt.runs import files, inputs
from ldt.runs.run import Run, load_config


def build_schedule(config: DictConfig) -> PruningSchedule:
    """What a configuration removes and when."""
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
        limits=Limits(prune.max_layer_rate, prune.min_channels),
        images=prune.images,
        batch_size=prune.batch_size,
        retrain_lr=recipe.retrain_lr,
    )


def build_loop(config: DictConfig, plan: PruningSchedule, folder: Path) -> PruneRetrain:
    """The prune-retrain loop of a configuration, with its criterion."""
    method = config.method
    check_recipe(config.recipe)
    criterion = build_criterion(config)
    if method.gradual:
        _check_types("method.gradual", GradualPruning, method.gradual)
    return PruneRetrain(
        plan,
        criterion,
        folder,
        gradual=GradualPruning(**method.gradual) if method.gradual else None,
        latency_runs=config.report.latency_runs,
        validate_every=config.trainer.validate_every,
    )


def build_criterion(config: DictConfig) -> Importance | None:
    """The criterion of a configuration; None where nothing is pruned."""
    given = config.method.criterion
    if given:
        _check_types("method.criterion", get_class(given._target_), given)
    return instantiate(given)


def _check_types(where: str, kind: Any, given: DictConfig) -> None:
    """ValueError for a value that is not what the class asks for, naming its key."""
    hints = get_type_hints(kind.__init__)
    for key, value in given.items():
        if key in hints:
            try:
                TypeAdapter(hints[str(key)]).validate_python(value, strict=isinstance(value, str))
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise ValueError(f"{where}.{key}={value!r}: {reason}") from error


def build_data(config: DictConfig) -> DetectionDataModule:
    """The data module of a configuration."""
    own = {k: v for k, v in config.dataset.items() if k not in ("name", "metric", "scales")}
    return instantiate(
        own,
        _convert_="all",
        batch_size=config.recipe.batch_size,
        seed=config.seed,
        augment=config.recipe.augment,
        pad=config.detector.pad,
    )


def build_module(
    config: DictConfig, plain: dict[str, Any], data: DetectionDataModule
) -> DetectorModule:
    """The detector of a configuration, for the classes of its data."""
    detector, (width, height) = plain["detector"], data.scale
    if plain["recipe"]["epochs"] == 0 and detector["checkpoint"] is None:
        raise ValueError(
            "recipe.epochs=0 prunes at once, so weights are needed: detector.checkpoint=<file>"
        )
    return DetectorModule(
        _model_config(plain, data),
        data.classes,
        plain["recipe"],
        (-(-height // 32) * 32, -(-width // 32) * 32),  # as batches are padded
        neck=detector["neck"],
        predictors=detector["predictors"],
        checkpoint=detector["checkpoint"],
        resize=data.resize,
    )


def _model_config(plain: dict[str, Any], data: DetectionDataModule) -> dict[str, Any]:
    own = plain["detector"]
    return model_config(own["config"], own["options"], len(data.classes), own["pretrained"])


def read_inputs(plain: dict[str, Any], data: DetectionDataModule) -> inputs.Inputs:
    """Fingerprint all that a run reads (:mod:`ldt.runs.inputs`).

    Raises:
        FileNotFoundError: some of it is missing.
        ValueError: it cannot be read.
    """
    model, weights = _model_config(plain, data), plain["detector"]["checkpoint"]
    return inputs.record(data.fingerprint(), model, weights)


def data_of(run: Run) -> DetectionDataModule:
    """Read the data of a run, from the last place that it was started with and that is there."""
    config = load_config(run.folder)
    known = files.read_json(run.folder / files.INPUTS).get("places", [])
    places = [place for place in reversed(known) if Path(place).is_dir()]
    if places and not Path(config.dataset.root or places[0]).is_dir():
        config.dataset.root = places[0]
    data = build_data(config)
    data.prepare_data()
    data.setup("fit")
    return data


def module_of(run: Run) -> DetectorModule:
    """Load the detector of a run's round as criteria see it, in eval mode."""
    recipe: Any = OmegaConf.to_container(load_config(run.folder).recipe, resolve=True)
    return restored(read(run.checkpoint()), recipe)


@contextlib.contextmanager
def opened_logger(config: DictConfig, folder: Path) -> Iterator[Logger | None]:
    """The logger beside the CSV files, if one is asked for; a W&B run ends as the block does."""
    logger: Any = instantiate(config.logger, save_dir=str(folder)) if config.logger else None
    with logger if hasattr(logger, "__exit__") else contextlib.nullcontext():
        if logger is not None:
            plain: Any = OmegaConf.to_container(config, resolve=True)
            logger.log_hyperparams(plain)
        yield logger


def build_trainer(
    config: DictConfig,
    plan: PruningSchedule,
    loop: PruneRetrain,
    folder: Path,
    logger: Logger | None = None,
) -> L.Trainer:
    """Lightning's trainer with the callbacks of a run, its CSV files and a further logger."""
    terminal = sys.stdout.isatty()
    callbacks: list[L.Callback] = [RichProgressBar() if terminal else LogProgress()]
    callbacks.append(EpochSeeds(config.seed))
    if config.ldt.enabled:
        terms = {key: value for key, value in config.ldt.items() if key != "enabled"}
        callbacks.append(LDTLoss(**terms))
    if config.recipe.ema is not None:
        callbacks.append(ExponentialMovingAverage(momentum=config.recipe.ema))
    callbacks.append(loop)
    if config.recipe.plain_epochs:
        callbacks.append(YOLOXModeSwitch(loop.is_last_epoch, config.recipe.plain_epochs))
    callbacks.append(  # last, so that it saves what the loop has made of the model
        ModelCheckpoint(
            folder,
            filename="last",
            every_n_epochs=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
    )
    loggers: list[Logger] = [CSVLogger(folder, name="", version=files.next_logs(folder))]
    if logger is not None:
        loggers.append(logger)
    own = config.trainer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return L.Trainer(
            accelerator=own.accelerator,
            devices=own.devices,
            strategy=own.strategy,
            num_nodes=own.num_nodes,
            precision=own.precision,
            deterministic=own.deterministic,
            sync_batchnorm=own.sync_batchnorm,
            log_every_n_steps=own.log_every_n_steps,
            limit_train_batches=own.limit_train_batches,
            limit_val_batches=own.limit_val_batches,
            max_epochs=plan.total_epochs,
            gradient_clip_val=config.recipe.clip_grad,
            callbacks=callbacks,
            logger=loggers,
            plugins=[AtomicCheckpointIO()],
            num_sanity_val_steps=0,
            default_root_dir=folder,
            enable_model_summary=False,
        )
