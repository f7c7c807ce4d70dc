"""One run, from its configuration to its summary: the only orchestration there is."""

import contextlib
import hashlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import FileLock, Timeout
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from ldt import profiling, report
from ldt.callbacks.checkpoints import WholeCheckpoints, resumable
from ldt.callbacks.ema import ExponentialMovingAverage
from ldt.callbacks.gradual import GradualPruning
from ldt.callbacks.ldt_loss import LDTLoss
from ldt.callbacks.plan import Plan
from ldt.callbacks.progress import PlainEpochs, PlainProgress
from ldt.callbacks.prune_retrain import PruneRetrain
from ldt.callbacks.seeds import EpochSeeds
from ldt.config import DETAILS, MethodConfig, PruneConfig
from ldt.data.datamodule import DetectionDataModule
from ldt.detectors import model_config, quiet
from ldt.module import DetectorModule
from ldt.pruning.budget import Limits
from ldt.records import read_json, write_json, write_text

log = logging.getLogger(__name__)


OBJECTIVES = ("AP", "AP50", "AP75", "mAP", "params", "multiply_adds", "latency_ms")


def run(config: DictConfig, folder: Path, in_sweep: bool = False) -> float | tuple[float, ...]:
    """Train, prune, retrain, measure and report one configuration in its own folder.

    A finished run returns at once; an unfinished one goes on from ``last.ckpt``.

    Args:
        config: composed by Hydra.
        folder: the run's directory; its name is the run's identity.
        in_sweep: record a failure and return, so that the other jobs of the sweep go on.

    Returns:
        The headline metric of the last round, or the ``objectives`` of the configuration; nan for a
        failed job of a sweep.

    Raises:
        ValueError: bad configuration, or the folder holds a run of another one, which is left as
            it is.
    """
    with _alone(folder):
        try:
            plain = _claim(config, folder)
        except ValueError:
            if in_sweep:
                log.exception("%s is refused", folder.name)
                return _result(config, {})
            raise
        summary = read_json(folder / "summary.json")
        try:
            if summary.get("status") != "finished":
                summary = _execute(config, plain, folder)
            else:
                log.info("%s is finished already", folder)
            _show(config, summary, folder)
        except KeyboardInterrupt:
            _record(folder, {"status": "interrupted"})
            log.warning("interrupted; the same command goes on from the last finished epoch")
            sys.exit(130)
        except Exception as error:
            _record(folder, {"status": "failed", "error": f"{type(error).__name__}: {error}"})
            if in_sweep:
                log.exception("%s failed", folder.name)
                return _result(config, {})  # the other jobs of the sweep go on
            raise
    return _result(config, summary["rounds"][-1])


def _result(config: DictConfig, row: Mapping[str, float]) -> float | tuple[float, ...]:
    names = config.objectives or [config.dataset.metric]
    values = [float(row.get(name, float("nan"))) for name in names]
    return tuple(values) if len(values) > 1 else values[0]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second command for the same folder waiting until the first has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    if rank_zero_only.rank:  # a process of the same run
        yield
        return
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("%s is being run by another process: waiting for its end", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _claim(config: DictConfig, folder: Path) -> dict[str, Any]:
    """The resolved configuration; the folder is this configuration's from now on."""
    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    file = folder / "config.yaml"
    if file.is_file():
        known: Any = OmegaConf.to_container(OmegaConf.load(file))
        differing = report.differences(_essential(known), _essential(plain))
        if differing:
            listed = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, old, new in differing)
            raise ValueError(
                f"{folder} holds a run of another configuration ({listed}). Choose another "
                "study=<name> or run_name=<name>, or remove the folder"
            )
    write_text(file, OmegaConf.to_yaml(plain))
    return plain


def _essential(plain: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what does not change the result."""
    aside = ("logger", "objectives")
    kept = {key: value for key, value in plain.items() if key not in aside}
    for dotted in DETAILS:
        group, key = dotted.split(".")
        kept[group] = {k: v for k, v in kept.get(group, {}).items() if k != key}
    return kept


@rank_zero_only
def _record(folder: Path, state: dict[str, str]) -> None:
    """A run that ended early says so; one that was trained to its end stays finished."""
    if read_json(folder / "summary.json").get("status") != "finished":
        write_json(folder / "summary.json", state)


def _execute(config: DictConfig, plain: dict[str, Any], folder: Path) -> dict[str, Any]:
    plan = _plan(config)
    for name in config.objectives:
        if name not in OBJECTIVES:
            raise ValueError(
                f"objectives={name!r} is not known; choose from {', '.join(OBJECTIVES)}"
            )
    if config.base not in ("own", "shared"):
        raise ValueError(f"base={config.base!r}; choose own or shared")
    if config.base == "shared" and plan.rounds and plan.base_epochs:
        checkpoint = _shared_base(config, plain, folder.parent)
        continued = {
            "recipe": {"epochs": 0},
            "detector": {"checkpoint": str(checkpoint)},
            "ldt": {"warmup_epochs": 0},  # the base has had it
        }
        config = OmegaConf.merge(config, continued)  # type: ignore[assignment]
        return _execute(config, OmegaConf.to_container(config, resolve=True), folder)  # type: ignore[arg-type]
    quiet()
    L.seed_everything(config.seed, workers=True, verbose=False)
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    criterion = instantiate(config.method.criterion)
    data = build_data(config)
    data.prepare_data()
    data.setup("fit")
    module = build_module(config, plain, data)
    loop = PruneRetrain(
        plan,
        criterion,
        folder,
        gradual=GradualPruning(**config.method.gradual) if config.method.gradual else None,
        latency_runs=config.report.latency_runs,
        validate_every=config.trainer.validate_every,
    )
    about = {
        "environment": profiling.environment(),
        "git": profiling.git_state(Path(__file__).parent),
    }
    write_json(folder / "split.json", data.split_ids())
    write_json(folder / "environment.json", about)
    trainer = _trainer(config, plan, loop, folder)
    resume = resumable(folder)
    if plan.base_epochs == 0 and resume is None:
        trainer.validate(module, datamodule=data, verbose=False)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except SystemExit as error:
        if trainer.interrupted:  # how Lightning ends after Ctrl-C
            raise KeyboardInterrupt from error
        raise
    if len(loop.rows) <= plan.rounds:
        raise RuntimeError(
            f"training stopped after {len(loop.rows)} of {plan.rounds + 1} phases; the same "
            "command goes on from the last checkpoint"
        )
    summary = {
        "status": "finished",
        "run": folder.name,
        "study": config.study,
        "detector": config.detector.name,
        "dataset": config.dataset.name,
        "method": config.method.name,
        "ldt": config.ldt.enabled,
        "metric": config.dataset.metric,
        "seed": config.seed,
        "input_size": list(module.input_size),
        "plan": {"rate": plan.rate, "rounds": plan.rounds, "budget": plan.budget},
        "rounds": loop.rows,
        "left_whole": loop.left_whole,
        "checkpoint": f"round-{plan.rounds}.ckpt",
        **about,
    }
    if trainer.is_global_zero:
        write_json(folder / "summary.json", summary)
    return summary


def _shared_base(config: DictConfig, plain: dict[str, Any], study: Path) -> Path:
    """The trained base of all runs that differ only in what they prune; a run of its own."""
    base = config.copy()
    base.ldt.enabled = plain["ldt"]["enabled"]
    base.method = MethodConfig(name="none")
    base.prune = PruneConfig(rate=0.5, rounds=0)
    base.base, base.run_name = "own", ""
    text = json.dumps(_essential(OmegaConf.to_container(base, resolve=True)), sort_keys=True)  # type: ignore[arg-type]
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    kind = "ldt" if base.ldt.enabled else "plain"
    base.run_name = f"base-{base.dataset.name}-{base.detector.name}-{kind}-s{base.seed}-{digest}"
    folder = study / base.run_name
    if read_json(folder / "summary.json").get("status") != "finished":
        run(base, folder)
    return folder / "round-0.ckpt"


@rank_zero_only
def _show(config: DictConfig, summary: dict[str, Any], folder: Path) -> None:
    """Draw a finished run once (where that fails, the same command draws again) and print it."""
    if not summary.get("drawn"):
        data = build_data(config)
        data.prepare_data()
        data.setup("validate")
        report.draw_run(summary, folder, data, config.report.pictures)
        write_json(folder / "summary.json", summary | {"drawn": True})
    report.print_run(summary, folder)


def _plan(config: DictConfig) -> Plan:
    prune, recipe = config.prune, config.recipe
    return Plan(
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
        model_config(
            detector["config"], detector["options"], len(data.classes), detector["pretrained"]
        ),
        data.classes,
        plain["recipe"],
        (-(-height // 32) * 32, -(-width // 32) * 32),  # as batches are padded
        neck=detector["neck"],
        predictors=detector["predictors"],
        checkpoint=detector["checkpoint"],
    )


def _trainer(config: DictConfig, plan: Plan, loop: PruneRetrain, folder: Path) -> L.Trainer:
    terminal = sys.stdout.isatty()
    callbacks: list[L.Callback] = [RichProgressBar() if terminal else PlainProgress()]
    callbacks.append(EpochSeeds(config.seed))
    if config.ldt.enabled:
        terms = {key: value for key, value in config.ldt.items() if key != "enabled"}
        callbacks.append(LDTLoss(**terms))
    if config.recipe.ema is not None:
        callbacks.append(ExponentialMovingAverage(momentum=config.recipe.ema))
    callbacks.append(loop)
    if config.recipe.plain_epochs:
        callbacks.append(PlainEpochs(loop.is_last_epoch, config.recipe.plain_epochs))
    callbacks.append(  # last, so that it saves what the loop has made of the model
        ModelCheckpoint(
            folder,
            filename="last",
            every_n_epochs=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
    )
    attempts = len(list(folder.glob("logs*")))  # CSVLogger empties a folder that it finds
    logs = f"logs-{attempts + 1}" if attempts else "logs"
    loggers: list[Any] = [CSVLogger(folder, name="", version=logs)]
    if config.logger:
        loggers.append(instantiate(config.logger, save_dir=str(folder)))
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
            plugins=[WholeCheckpoints()],
            num_sanity_val_steps=0,
            default_root_dir=folder,
            enable_model_summary=False,
        )


class StudyTable(Callback):
    """After a sweep, prints every run of the study; ends with an error if a job failed."""

    def __init__(self) -> None:
        self.refused = 0  # jobs whose folder belongs to another run

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Called by Hydra after each job."""
        value = job_return.return_value if job_return.status == JobStatus.COMPLETED else None
        values = value if isinstance(value, tuple) else (value,)
        self.refused += any(isinstance(v, float) and math.isnan(v) for v in values)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra in the launching process."""
        with contextlib.suppress(FileNotFoundError):
            failed = report.print_study(Path(config.hydra.sweep.dir))
            if failed or self.refused:
                sys.exit(1)
