"""Orchestration of a run, from its configuration to its summary."""

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldt import progress, report
from ldt.build import (
    build_data,
    build_loop,
    build_module,
    build_schedule,
    build_steps,
    build_trainer,
    check_config,
    max_detections,
    opened_logger,
    read_inputs,
    read_inputs_without_data,
)
from ldt.callbacks.checkpoint_io import resumable
from ldt.callbacks.lightning_internals import end_processes, was_interrupted
from ldt.config import MethodConfig, PruneConfig, as_dict, conf_dir, register
from ldt.config.keys import check_keys, check_places
from ldt.config.messages import explained
from ldt.config.paths import expand_home, quote_paths
from ldt.data.datamodule import DetectionDataModule
from ldt.detectors.models import quiet
from ldt.evaluation import layers
from ldt.figures import from_runs
from ldt.loop.prune_retrain import PruneRetrain
from ldt.loop.schedule import PruningSchedule
from ldt.module import DetectorModule
from ldt.progress.console import FILE_ONLY
from ldt.progress.steps import DRAW
from ldt.report.banner import command, describe_device, print_banner
from ldt.runs import DONE, files, identity, inputs, provenance
from ldt.runs.files import read_json, write_json, write_text
from ldt.runs.records import stored_config
from ldt.runs.refusal import KINDS, Failed, Refused, is_refusal, one_line, refusing
from ldt.runs.run import Run, open_run
from ldt.runs.signals import interrupting
from ldt.runtimes import latency_table
from ldt.runtimes.latency_table import LatencyTable

log = logging.getLogger(__name__)
REFUSALS = (*KINDS, HydraException, MisconfigurationException)  # user errors during setup


def run(config: DictConfig, folder: Path, in_sweep: bool = False) -> float | tuple[float, ...]:
    """Train, prune, retrain, measure and report one configuration in its run directory.

    A finished run returns immediately; an unfinished one resumes from ``last.ckpt``.

    Args:
        config: the configuration composed by Hydra.
        folder: the run's directory; its name identifies the run.
        in_sweep: log and record an error instead of raising it, so that the sweep continues.

    Returns:
        The headline metric of the last round, or the configured ``objectives``; NaN for a failed
        job of a sweep.

    Raises:
        ldt.runs.identity.OtherRunError: the folder holds a run with a different configuration
            or with different data, weights or code; it is not modified.
        ValueError: the configuration is invalid or a file of the run is damaged.
    """
    fresh = not files.holds_run(folder)
    try:
        with interrupting(requeues=rank_zero_only.rank == 0):
            expand_home(config)
            with refusing(*REFUSALS):
                plain = check(config)
            with (
                progress.running("reading the data and building the detector"),
                files.alone(folder, waits=rank_zero_only.rank == 0),
                _recording(folder),
            ):
                summary = _finish(config, plain, folder)
    except KeyboardInterrupt:
        log.warning("interrupted; the same command resumes from the last finished epoch")
        sys.exit(130)
    except Exception as error:
        if is_refusal(error) and fresh and rank_zero_only.rank == 0:
            files.discard(folder)
        if not in_sweep:
            raise
        return result(config, {}, _tell(error, folder))  # the sweep continues with its other jobs
    return result(config, summary["rounds"][-1])


def _tell(error: Exception, folder: Path) -> Failed:
    """Tell why a job of a sweep has no result; return what stands for it."""
    if is_refusal(error):  # not logged: the log file may be that of another run
        print(f"error: {folder.name}: {one_line(error)}", file=sys.stderr)
        return Refused("nan")
    log.error("%s failed: %s", folder.name, error, exc_info=True)
    return Failed("nan")


@contextlib.contextmanager
def _recording(folder: Path) -> Iterator[None]:
    """Record the reason if the block ends early; of several processes, that of the first one.

    The others only lose their connections to it. A finished run keeps its summary.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # the latter of the run of a shared base
        record_end(folder, {"status": "interrupted"})
        raise
    except Exception as error:
        if not is_refusal(error):
            record_end(folder, {"status": "failed", "error": f"{type(error).__name__}: {error}"})
        raise


def record_end(folder: Path, state: dict[str, str]) -> None:
    """Write why a run ended early, unless there is a summary of this start."""
    try:
        files.write_first(folder / files.SUMMARY, state)
    except OSError as error:  # must not hide the reason
        log.warning("the end of the run cannot be recorded: %s", error)


def check(config: DictConfig) -> dict[str, Any]:
    """Check all that needs neither data nor model; return the configuration resolved."""
    check_keys(config)
    check_places(config)
    plain = as_dict(config, throw_on_missing=True)
    check_config(config)
    build_schedule(config)
    return plain


def _finish(config: DictConfig, plain: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Complete the run (training, figures) where needed and return its summary."""
    with refusing(*REFUSALS):
        known = stored_config(folder)
        if not known and (folder / files.CONFIG).exists():
            raise ValueError(f"{folder / files.CONFIG} is empty; remove the folder to run it again")
        identity.claim(folder, plain, known)
        summary = read_json(folder / files.SUMMARY)
        finished = summary.get("status") == DONE
        if finished or files.has_checkpoint(folder):
            _check_inputs(config, plain, folder, finished)
    if summary.get("drawn"):
        log.info("%s is already finished", folder)
        _show(config, summary, folder)
        return summary
    with contextlib.ExitStack() as opened:
        open_log = partial(_open_log, config, folder, opened)
        if finished:
            open_log()
        else:
            if rank_zero_only.rank == 0:  # of an earlier start
                (folder / files.SUMMARY).unlink(missing_ok=True)
            summary = _execute(config, plain, folder, open_log)
        _show(config, summary, folder)
    return summary


def _open_log(config: DictConfig, folder: Path, opened: contextlib.ExitStack) -> list[Logger]:
    """Open the configured logger until the run ends; called when nothing can be refused any more.

    Returns:
        The logger, or an empty list where none is configured.
    """
    with refusing(*REFUSALS):
        logger = opened.enter_context(opened_logger(config, folder))
    return [] if logger is None else [logger]


def result(
    config: DictConfig, row: Mapping[str, float], missing: float = float("nan")
) -> float | tuple[float, ...]:
    """Return the configured objectives of a row, or its headline metric; ``missing`` for others."""
    names = config.objectives or [config.dataset.metric]
    values = [row.get(name, missing) for name in names]
    return tuple(values) if len(values) > 1 else values[0]


def _check_inputs(config: DictConfig, plain: dict[str, Any], folder: Path, finished: bool) -> None:
    """Raise if the run used different inputs; all ranks check, only rank zero records them."""
    place = inputs.place_of(plain)
    try:
        now = read_inputs(plain, build_data(config)) | _times_of(folder)
    except (*REFUSALS, OSError) as error:
        if not finished or place is None or Path(place).exists():
            raise  # something of it is there and cannot be read: that is a change
        log.warning("%s: the data of the run cannot be checked: %s", folder, error)
        now = read_inputs_without_data(plain, open_run(folder))
        inputs.check(folder, now | _times_of(folder))
    else:
        writes = rank_zero_only.rank == 0 and os.access(folder, os.W_OK)
        inputs.settle(folder, now, place, finished, writes)


def _times_of(folder: Path) -> inputs.Inputs:
    """Return the fingerprint of a started run's table of times, as a part of its inputs."""
    content = latency_table.stored(folder)
    return {inputs.LATENCY: latency_table.fingerprint(content)} if content else {}


def _execute(
    config: DictConfig, plain: dict[str, Any], folder: Path, open_log: Callable[[], list[Logger]]
) -> dict[str, Any]:
    plan = build_schedule(config)
    if config.base == "shared" and plan.base_epochs:
        base = _shared_base(config, plain, folder.parent)
        if not plan.rounds:
            open_log()
            return _adopt(base, folder, plain)
        continued = {
            "recipe": {"epochs": 0},
            "detector": {"checkpoint": str(base / files.round_checkpoint(0))},
            "ldt": {"warmup_epochs": 0},  # already applied while training the base
        }
        config = OmegaConf.merge(config, continued)  # type: ignore[assignment]
    return _train(config, plain, folder, open_log)


def _train(
    config: DictConfig,
    claimed: dict[str, Any],
    folder: Path,
    open_log: Callable[[], list[Logger]],
) -> dict[str, Any]:
    """Train the run to completion, from a shared base where there is one; return its summary.

    The folder is ``claimed`` for a configuration that does not name the base's weights.
    """
    with refusing(*REFUSALS), progress.held():
        plan = build_schedule(config)
        loop, trainer, data, module = _set_up(config, plan, folder)
        trainer.loggers = [*trainer.loggers, *open_log()]
        about = _claim(claimed, data, folder, loop.table)
        _announce(config, plan, loop, trainer, data, folder)
    _draw_labels(config, data, folder)
    resume = resumable(folder)
    progress.status(f"starting {trainer.world_size} process{'es' * (trainer.world_size > 1)}")
    if config.trainer.get("enable_progress_bar", True):
        progress.show(build_steps(config, plan, data))
    try:
        if plan.base_epochs == 0 and resume is None:
            trainer.validate(module, datamodule=data, verbose=False)
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except BaseException as error:
        end_processes(trainer)
        if isinstance(error, SystemExit) and was_interrupted(trainer):
            raise KeyboardInterrupt from error
        raise
    if len(loop.rows) <= plan.rounds:
        raise RuntimeError(
            f"training stopped after {len(loop.rows)} of {plan.rounds + 1} phases; the same "
            "command resumes from the last checkpoint"
        )
    summary = _summary(config, plan, loop, folder) | {
        "input_size": list(module.adapter.input_size),
        **about,
    }
    if trainer.is_global_zero:
        write_json(folder / files.SUMMARY, summary)
    return summary


@rank_zero_only
def _announce(
    config: DictConfig,
    plan: PruningSchedule,
    loop: PruneRetrain,
    trainer: L.Trainer,
    data: DetectionDataModule,
    folder: Path,
) -> None:
    """Print what the run is about to do; log the command and the configuration to its file."""
    told = f"command: {command()}\nin: {Path.cwd()}\nconfiguration:\n{OmegaConf.to_yaml(config)}"
    log.info(told, extra=FILE_ONLY)
    root, precision = trainer.strategy.root_device, str(trainer.precision)
    device = describe_device(root, trainer.world_size, precision)
    print_banner(as_dict(config), plan, data, loop.unpruned, device, folder)


@rank_zero_only
def _draw_labels(config: DictConfig, data: DetectionDataModule, folder: Path) -> None:
    """Draw what the data hold, while their annotations are in memory."""
    if config.report.figures:
        from_runs.draw_labels_of(data, folder)


def _summary(
    config: DictConfig, plan: PruningSchedule, loop: PruneRetrain, folder: Path
) -> dict[str, Any]:
    return {
        "status": DONE,
        "run": folder.name,
        "study": config.study,
        "detector": config.detector.name,
        "dataset": config.dataset.name,
        "method": config.method.name,
        "ldt": config.ldt.enabled,
        "metric": config.dataset.metric,
        "seed": config.seed,
        "plan": {"rate": loop.schedule.rate, "rounds": plan.rounds, "budget": config.prune.budget},
        "rounds": loop.rows,
        "left_whole": loop.excluded,
        "checkpoint": files.round_checkpoint(plan.rounds),
    }


def _set_up(
    config: DictConfig, plan: PruningSchedule, folder: Path
) -> tuple[PruneRetrain, L.Trainer, DetectionDataModule, DetectorModule]:
    """Build loop, trainer, data and module, and load the data."""
    quiet()
    L.seed_everything(config.seed, workers=True, verbose=False)
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    loop = build_loop(config, plan, folder)
    trainer = build_trainer(config, plan, loop, folder)
    inputs.check_processes(folder, trainer.world_size)
    plain = as_dict(config)
    data = build_data(config)
    data.prepare_data()
    data.setup("fit")
    module = build_module(config, plain, data)
    loop.check(module.adapter, trainer.strategy.root_device, latency_table.stored(folder))
    return loop, trainer, data, module


def _claim(
    plain: dict[str, Any], data: DetectionDataModule, folder: Path, table: LatencyTable | None
) -> dict[str, Any]:
    """Claim the folder for a run that is about to start: write what it is and what it reads.

    Returns:
        Software, hardware and commit, for the summary.
    """
    about = provenance.about(Path(__file__).parent)
    if rank_zero_only.rank == 0:
        if not files.has_checkpoint(folder):  # otherwise already checked and recorded
            now = read_inputs(plain, data)
            if table is not None:
                write_json(folder / files.LATENCY_TABLE, content := table.content())
                now[inputs.LATENCY] = latency_table.fingerprint(content)
            inputs.write(folder, now, inputs.place_of(plain))
        write_json(folder / files.SPLIT, data.split_ids())
        provenance.add_start(folder, about)
        _write_config(plain, folder)
    return about


def _write_config(plain: dict[str, Any], folder: Path) -> None:
    if not (folder / files.CONFIG).is_file():  # that of an earlier start is kept as it is
        write_text(folder / files.CONFIG, OmegaConf.to_yaml(plain))


def _shared_base(config: DictConfig, plain: dict[str, Any], study: Path) -> Path:
    """Train the base shared by all runs that differ only in pruning; return its folder."""
    base = config.copy()
    base.ldt.enabled = plain["ldt"]["enabled"]
    base.method = MethodConfig(name="none")
    base.prune = PruneConfig(rate=0.5, rounds=0)
    base.base, base.run_name = "own", ""
    own = as_dict(base)
    facts = identity.short_hash(identity.essence(own))
    kind = "ldt" if base.ldt.enabled else "plain"
    name = f"base-{base.dataset.name}-{base.detector.name}-{kind}-s{base.seed}-{facts}"
    folder = identity.find(study, own, "base-") or study / name
    base.run_name = folder.name
    if read_json(folder / files.SUMMARY).get("status") != DONE:
        run(base, folder)
        return folder
    with refusing(*REFUSALS):
        _check_inputs(base, own, folder, finished=True)
    return folder


def _adopt(base: Path, folder: Path, plain: dict[str, Any]) -> dict[str, Any]:
    """Copy the shared base's files to a run that prunes nothing; return its summary."""
    summary = read_json(base / files.SUMMARY) | {"run": folder.name, "drawn": False}
    if rank_zero_only.rank == 0:
        names = (files.round_checkpoint(0), files.ROUNDS, files.SPLIT, files.ENVIRONMENT)
        # not written by earlier versions, or by choice
        more = [name for name in (files.INPUTS, files.detections(0)) if (base / name).is_file()]
        for name in (*names, *more):
            with files.writing(folder / name) as draft:
                shutil.copyfile(base / name, draft)
        for logs in files.log_folders(base):
            shutil.copytree(logs, folder / logs.name, dirs_exist_ok=True)
        _write_config(plain, folder)
        write_json(folder / files.SUMMARY, summary)
    return summary


@rank_zero_only
def _show(config: DictConfig, summary: dict[str, Any], folder: Path) -> None:
    """Draw the figures of a finished run, unless already done, and print its results."""
    if config.report.figures and not summary.get("drawn"):
        progress.begin(DRAW)
        progress.status("drawing")
        data = build_data(config)
        data.prepare_data()
        data.setup("validate")
        layers.write_inventory(folder)
        limit = config.trainer.limit_val_batches
        most = max_detections(as_dict(config))
        from_runs.draw_run(summary, folder, data, config.report.pictures, limit, most)
        write_json(folder / files.SUMMARY, summary | {"drawn": True})
    report.print_run(summary, folder)


def train(*overrides: str, folder: str | Path | None = None) -> Run:
    """Train, prune, retrain and measure; the Python equivalent of ``python run.py <overrides>``.

    Args:
        overrides: Hydra overrides, as on the command line.
        folder: the run's directory; default: ``runs/<study>/<name>`` in the working directory.

    Returns:
        The finished run.

    Raises:
        ValueError: the configuration is invalid, or the folder holds another run.

    Example:
        >>> run = ldt.train("dataset.train=8", "dataset.val=4", "recipe.epochs=1",
        ...                 "recipe.retrain_epochs=1", "prune.images=8", "report.figures=false")
        roadscenes-gfl_tiny-ldt-params0.7-s0-...
        >>> list(run.rounds["round"])
        [0, 1, 2]
    """
    whole = _compose(overrides)
    config = without_hydra(whole)
    place = Path(whole.hydra.run.dir if folder is None else folder)
    run(config, place)
    return open_run(place)


def composed(*overrides: str) -> DictConfig:
    """Return the checked configuration of overrides, as `train` would run it.

    Raises:
        ValueError: the configuration is invalid.
    """
    config = without_hydra(_compose(overrides))
    with _explaining():
        expand_home(config)
        check(config)
    return config


def _compose(overrides: Sequence[str]) -> DictConfig:
    register()
    with _explaining(), initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", quote_paths(overrides), return_hydra_config=True)
    raise AssertionError("an error is raised, not suppressed")


@contextlib.contextmanager
def _explaining() -> Iterator[None]:
    """Raise errors of Hydra and OmegaConf about a configuration as ValueError, in one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explained(error)) from error


def without_hydra(whole: DictConfig) -> DictConfig:
    """Return a composed configuration without Hydra's part, which run names are derived from."""
    HydraConfig.instance().set_config(whole)
    keys = [str(key) for key in whole if key != "hydra"]
    return OmegaConf.masked_copy(whole, keys)
