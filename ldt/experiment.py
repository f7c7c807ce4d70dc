"""One run, from its configuration to its summary: the only orchestration there is."""

import contextlib
import hashlib
import json
import logging
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import FileLock, Timeout
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from ldt import report
from ldt.build import (
    build_data,
    build_loop,
    build_module,
    build_schedule,
    build_trainer,
    opened_logger,
)
from ldt.callbacks.checkpoint_io import resumable
from ldt.config import DETAILS, MethodConfig, PruneConfig
from ldt.data.datamodule import DetectionDataModule
from ldt.detectors.models import quiet
from ldt.evaluation import layers, profiling
from ldt.figures import from_runs
from ldt.loop.prune_retrain import PruneRetrain
from ldt.loop.schedule import PruningSchedule
from ldt.module import DetectorModule
from ldt.runs.files import read_json, write_json, write_text
from ldt.runs.refusal import KINDS, is_refusal, refusing

log = logging.getLogger(__name__)
REFUSALS = (*KINDS, HydraException, MisconfigurationException)  # while a run is being set up

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
            with refusing(*REFUSALS):
                plain = _claim(config, folder)
        except REFUSALS as error:
            if in_sweep:
                log.error("%s is refused: %s", folder.name, error)
                return _result(config, {})
            raise
        summary = read_json(folder / "summary.json")
        try:
            if summary.get("drawn"):
                log.info("%s is finished already", folder)
                _show(config, summary, folder)
            else:
                with contextlib.ExitStack() as opened:
                    with refusing(*REFUSALS):
                        logger = opened.enter_context(opened_logger(config, folder))
                    if summary.get("status") != "finished":
                        summary = _execute(config, plain, folder, logger)
                    _show(config, summary, folder)
        except KeyboardInterrupt:
            _record(folder, {"status": "interrupted"})
            log.warning("interrupted; the same command goes on from the last finished epoch")
            sys.exit(130)
        except Exception as error:
            _record(folder, {"status": "failed", "error": f"{type(error).__name__}: {error}"})
            if in_sweep:
                log.error("%s failed: %s", folder.name, error, exc_info=not is_refusal(error))
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


def _execute(
    config: DictConfig, plain: dict[str, Any], folder: Path, logger: Logger | None
) -> dict[str, Any]:
    with refusing(*REFUSALS):
        plan = build_schedule(config)
        _check_choices(config)
    if config.base == "shared" and plan.base_epochs:
        base = _shared_base(config, plain, folder.parent)
        if not plan.rounds:
            return _adopt(base, folder)
        continued = {
            "recipe": {"epochs": 0},
            "detector": {"checkpoint": str(base / "round-0.ckpt")},
            "ldt": {"warmup_epochs": 0},  # the base has had it
        }
        config = OmegaConf.merge(config, continued)  # type: ignore[assignment]
        return _execute(config, OmegaConf.to_container(config, resolve=True), folder, logger)  # type: ignore[arg-type]
    with refusing(*REFUSALS):
        loop, trainer, data, module = _set_up(config, plain, plan, folder, logger)
    about = {
        "environment": profiling.environment(),
        "git": profiling.git_state(Path(__file__).parent),
    }
    write_json(folder / "split.json", data.split_ids())
    write_json(folder / "environment.json", about)
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
        "input_size": list(module.adapter.input_size),
        "plan": {"rate": plan.rate, "rounds": plan.rounds, "budget": config.prune.budget},
        "rounds": loop.rows,
        "left_whole": loop.excluded,
        "checkpoint": f"round-{plan.rounds}.ckpt",
        **about,
    }
    if trainer.is_global_zero:
        write_json(folder / "summary.json", summary)
    return summary


def _set_up(
    config: DictConfig,
    plain: dict[str, Any],
    plan: PruningSchedule,
    folder: Path,
    logger: Logger | None,
) -> tuple[PruneRetrain, L.Trainer, DetectionDataModule, DetectorModule]:
    """Build everything that training needs, and read the data."""
    quiet()
    L.seed_everything(config.seed, workers=True, verbose=False)
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    loop = build_loop(config, plan, folder)
    trainer = build_trainer(config, plan, loop, folder, logger)
    data = build_data(config)
    data.prepare_data()
    data.setup("fit")
    return loop, trainer, data, build_module(config, plain, data)


def _check_choices(config: DictConfig) -> None:
    for name in config.objectives:
        if name not in OBJECTIVES:
            raise ValueError(
                f"objectives={name!r} is not known; choose from {', '.join(OBJECTIVES)}"
            )
    if config.base not in ("own", "shared"):
        raise ValueError(f"base={config.base!r}; choose own or shared")


def _shared_base(config: DictConfig, plain: dict[str, Any], study: Path) -> Path:
    """The folder of the trained base of all runs that differ only in what they prune."""
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
    return folder


def _adopt(base: Path, folder: Path) -> dict[str, Any]:
    """The summary of a run that is the shared base and no more; it gets the base's files."""
    summary = read_json(base / "summary.json") | {"run": folder.name, "drawn": False}
    if rank_zero_only.rank == 0:
        for name in ("round-0.ckpt", "rounds.csv", "split.json", "environment.json"):
            shutil.copyfile(base / name, folder / name)
        for logs in base.glob("logs*"):
            shutil.copytree(logs, folder / logs.name, dirs_exist_ok=True)
        write_json(folder / "summary.json", summary)
    return summary


@rank_zero_only
def _show(config: DictConfig, summary: dict[str, Any], folder: Path) -> None:
    """Draw a finished run once (where that fails, the same command draws again) and print it."""
    if not summary.get("drawn"):
        data = build_data(config)
        data.prepare_data()
        data.setup("validate")
        layers.write_inventory(folder)
        from_runs.draw_run(summary, folder, data, config.report.pictures)
        write_json(folder / "summary.json", summary | {"drawn": True})
    report.print_run(summary, folder)


class StudyTable(Callback):
    """After a sweep, prints its study; ends with an error if a run of the study has failed."""

    def __init__(self) -> None:
        self.jobs = 0
        self.refused = 0  # jobs without a result

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Called by Hydra after each job."""
        self.jobs += 1
        value = job_return.return_value if job_return.status == JobStatus.COMPLETED else None
        values = value if isinstance(value, tuple) else (value,)
        self.refused += any(isinstance(v, float) and math.isnan(v) for v in values)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra in the launching process."""
        with contextlib.suppress(FileNotFoundError):
            failed = report.print_study(Path(config.hydra.sweep.dir))
            if failed or self.refused:
                sys.exit(1 if failed or self.refused < self.jobs else 2)
