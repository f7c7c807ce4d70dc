"""`ldt run` and `python run.py`: compose configurations with Hydra and report errors in one line.

`hydra.main` would exit with 1 and print many lines for every error, so its internals are called.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
from hydra import version
from hydra._internal import hydra, utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ldt import progress
from ldt.cli.exit_codes import exit_codes
from ldt.cli.study_table import StudyTable, end_sweep
from ldt.config import as_dict, conf_dir, register
from ldt.config.keys import check_keys, check_names, check_places
from ldt.config.messages import explained
from ldt.config.paths import quote_paths
from ldt.config.places import check_files
from ldt.config.values import check_against_schema
from ldt.runs.files import discard_sweep, holds_run
from ldt.runs.refusal import refused


def _run(func: Callable[[], Any]) -> Any:
    """Let exceptions propagate to `exit_codes`; keep the results of a sweep."""
    found = func()
    if isinstance(found, list):
        Job.returned = [job for batch in found for job in batch]
    return found


utils.run_and_report = _run


class StrictLoader(ConfigLoaderImpl):
    """Config loader that rejects unknown keys after composition, before a run folder is created.

    Attributes:
        study: directory of the study of a sweep.
        checks_values: whether values are checked, too.
        checks_files: whether the files that they name are: a run is about to begin.
    """

    study: Path | None = None
    checks_values = True
    checks_files = False

    def load_configuration(self, *args: Any, **kwargs: Any) -> DictConfig:
        """Compose and check a configuration; Hydra calls it for runs, sweeps and their jobs."""
        config = super().load_configuration(*args, **kwargs)
        StrictLoader.study = Path(config.hydra.sweep.dir)
        check_places(config)
        check_keys(config)
        if self.checks_values:
            _check_values(config)
            if self.checks_files:
                _check_files(config)
        _check_hydra_keys(config.hydra)
        return config

    def load_sweep_config(self, *args: Any, **kwargs: Any) -> DictConfig:
        """Compose a job of a sweep without checking its values: the other jobs shall go on."""
        self.checks_values = False
        try:
            return super().load_sweep_config(*args, **kwargs)
        finally:
            self.checks_values = True


def _show_help(app: hydra.Hydra, config_name: str | None, args_parser: Any, args: Any) -> None:
    """Print the help of the composed configuration: Hydra's own has no meanings."""
    from ldt.cli.run_help import page

    print(page(app.compose_config(config_name, args.overrides, RunMode.RUN)), end="")


hydra.Hydra.app_help = _show_help  # type: ignore[method-assign]


def _check_values(config: DictConfig) -> None:
    """Check values before anything heavy is imported; `ldt.build.check_config` does it again."""
    check_against_schema(as_dict(config, resolve=False))


def _check_files(config: DictConfig) -> None:
    """Check that nothing is missing, neither a value nor a file, unless the run is there already.

    A finished run is shown where its data are gone.
    """
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    as_dict(own, resolve=False, throw_on_missing=True)
    try:
        check_files(config)  # no more of it is resolved: a recipe may read mmdet's config
    except (ValueError, FileNotFoundError):
        HydraConfig.instance().set_config(config)  # a run's name depends on it
        if not holds_run(Path(config.hydra.run.dir)):
            raise


def _check_hydra_keys(config: DictConfig) -> None:
    """Reject keys that were added to Hydra's own node or its groups.

    What is below these belongs to plugins, whose schemas do not declare all keys.
    """
    parts = {
        f"hydra.{key}": config[str(key)]
        for key in config
        if not OmegaConf.is_missing(config, str(key))
        and not OmegaConf.is_interpolation(config, str(key))
    }
    for where, node in {"hydra": config, **parts}.items():
        kind = OmegaConf.get_type(node)
        if isinstance(node, DictConfig) and is_dataclass(kind):
            known = [key.name for key in fields(kind)]
            # env: a group of Hydra without a schema
            check_names(where, {str(key): None for key in node}, [*known, "env"])


hydra.ConfigLoaderImpl = StrictLoader  # type: ignore[misc]


class Job:
    """Task function that Hydra calls for each configuration.

    Args:
        flags: Hydra's flags that the configuration of a job depends on.

    Attributes:
        begun: whether it has been called.
        returned: the jobs of a sweep that has ended, also those of other processes.
    """

    begun = False
    returned: Sequence[JobReturn] = ()

    def __init__(self, flags: Sequence[str] = ()) -> None:
        self.flags = flags

    def __call__(self, config: DictConfig) -> float | tuple[float, ...]:
        """Run one experiment.

        Returns:
            The headline metric of the last round, or the `objectives`.
        """
        self.begun = True
        job = HydraConfig.get()
        logging.captureWarnings(True)  # into the log, above the display
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings that bypass it
        with (
            exit_codes(explained),  # before Hydra prints its own error message
            progress.running("loading PyTorch and mmdet"),
        ):
            from ldt.experiment import run

            folder, in_sweep = Path(job.runtime.output_dir), job.mode == RunMode.MULTIRUN
            if in_sweep and _starts_processes(config):
                from ldt.cli.job_process import run_apart

                progress.pause()  # the job has a display of its own
                return run_apart(config, folder, self.flags)
            return run(config, folder, in_sweep)
        raise AssertionError("exit_codes ends the process after an error")


def _starts_processes(config: DictConfig) -> bool:
    """Return whether a job will start processes; False if it is invalid, which its run tells."""
    from ldt.build import check_processes

    try:
        return check_processes(config)
    except ValueError:
        return False


COMPOSE_ALL = Sweeper.validate_batch_is_legal


def _validate(sweeper: Sweeper, batch: Sequence[Sequence[str]]) -> None:
    """Compose the jobs of a sweep; before any begins, raise if all of them have the same error."""
    COMPOSE_ALL(sweeper, batch)
    StudyTable.progress.add(batch)
    assert sweeper.config is not None
    assert sweeper.hydra_context is not None
    errors: dict[str, Exception] = {}
    for overrides in batch:
        loader = sweeper.hydra_context.config_loader
        try:
            return _check_job(loader.load_sweep_config(sweeper.config, list(overrides)))
        except Exception as error:  # told by the job, unless it is every job's
            errors[explained(error)] = error
    if len(errors) == 1:
        raise next(iter(errors.values()))


def _check_job(config: DictConfig) -> None:
    """Check what needs neither data nor model, nor the machine that another launcher would use."""
    _check_values(config)
    _check_files(config)
    from ldt.build import check_processes
    from ldt.experiment import check, without_hydra

    own = without_hydra(config)
    check(own)
    if str(config.hydra.launcher._target_).endswith(".BasicLauncher"):
        check_processes(own)


Sweeper.validate_batch_is_legal = _validate  # type: ignore[assignment]


def main(arguments: Sequence[str] | None = None) -> None:
    """Compose a configuration and run it, or run a sweep with ``-m``.

    Args:
        arguments: Hydra overrides and flags; default: the arguments of the process.

    Raises:
        SystemExit: with a nonzero exit code (:mod:`ldt.cli.exit_codes`).
    """
    with exit_codes(explained):
        if "${" in os.getcwd():
            raise refused(
                ValueError(f"{os.getcwd()}: Hydra cannot work in a folder with ${{ in its name")
            )
        version.setbase("1.3")
        register()
        parser = utils.get_args_parser()
        parser.error = _wrong_flag
        given = parser.parse_intermixed_args(
            quote_paths(sys.argv[1:] if arguments is None else arguments)
        )
        options = ("config_path", "config_name", "config_dir")
        job = Job([f"--{o.replace('_', '-')}={v}" for o in options if (v := getattr(given, o))])
        if given.experimental_rerun:
            parser.error("--experimental-rerun is not supported; `ldt repeat` repeats a run")
        asks = given.help or given.hydra_help or given.info or given.cfg
        StrictLoader.checks_files = not (asks or given.multirun)  # a sweep may set what is missing
        try:
            with progress.running() if given.multirun and not asks else contextlib.nullcontext():
                utils._run_hydra(given, parser, job, str(conf_dir()), "config")
        except (KeyboardInterrupt, SystemExit):
            StudyTable.progress.close()
            raise
        except Exception as error:  # composing may fail with any type, e.g. of PyYAML
            StudyTable.progress.close()
            if not job.begun and given.multirun and StrictLoader.study is not None:
                discard_sweep(StrictLoader.study)
            raise error if job.begun else refused(error)  # noqa: B904 (the same exception)
        finally:
            StrictLoader.checks_files = False
        if given.multirun and StrictLoader.study is not None:
            end_sweep(StrictLoader.study, Job.returned or StudyTable.jobs)


def _wrong_flag(message: str) -> NoReturn:
    raise click.UsageError(f"{message}; --help shows the groups, keys and examples")
