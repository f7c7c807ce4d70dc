"""`ldt run` and `python run.py`: configurations composed by Hydra, and its errors in one line.

`hydra.main` would end every error with 1 and many lines, so this file calls what it calls.
"""

import copyreg
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
from hydra import version
from hydra._internal import hydra, utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ldt.cli.exit_codes import exit_codes
from ldt.config import conf_dir, register
from ldt.config.keys import check_keys, explain_key
from ldt.config.paths import quote_paths
from ldt.runs.refusal import KINDS, refused

utils.run_and_report = lambda func: func()  # errors come to `exit_codes` as they are


class StrictLoader(ConfigLoaderImpl):
    """Refuses keys that nobody reads as soon as a configuration is composed: no folder is made."""

    def load_configuration(self, *args: Any, **kwargs: Any) -> DictConfig:
        """Called by Hydra for a run, for a sweep and for each of its jobs."""
        config = super().load_configuration(*args, **kwargs)
        check_keys(config)
        return config


hydra.ConfigLoaderImpl = StrictLoader  # type: ignore[misc]


class Job:
    """What Hydra calls for every configuration.

    Attributes:
        begun: whether it was called.
    """

    begun = False

    def __call__(self, config: DictConfig) -> float | tuple[float, ...]:
        """Run one experiment.

        Returns:
            The headline metric of the last round, or the `objectives`.
        """
        self.begun = True
        job = HydraConfig.get()
        with exit_codes(explained):  # before Hydra writes its own lines about an error
            from ldt.experiment import run

            folder = Path(job.runtime.output_dir)
            return run(config, folder, in_sweep=job.mode == RunMode.MULTIRUN)
        raise AssertionError("exit_codes ends the process after an error")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compose a configuration and run it, or a sweep of them with ``-m``.

    Args:
        arguments: Hydra's overrides and flags; those of the process where none are given.

    Raises:
        SystemExit: with the exit code (:mod:`ldt.cli.exit_codes`) where it is not 0.
    """
    with exit_codes(explained):
        version.setbase("1.3")
        register()
        parser, job = utils.get_args_parser(), Job()
        parser.error = _wrong_flag
        given = parser.parse_args(quote_paths(sys.argv[1:] if arguments is None else arguments))
        if given.experimental_rerun:
            parser.error("--experimental-rerun is not supported; `ldt repeat` repeats a run")
        if given.help:  # Hydra copies all schemas for each group that it lists: a second in all
            copyreg.pickle(ConfigStore, lambda _: (ConfigStore.instance, ()))
        try:
            utils._run_hydra(given, parser, job, str(conf_dir()), "config")
        except (HydraException, *KINDS) as error:
            raise error if job.begun else refused(error)  # noqa: B904 (it is the same)


def _wrong_flag(message: str) -> NoReturn:
    raise click.UsageError(f"{message}; --help shows the groups, keys and examples")


def explained(error: Exception) -> str:
    """What is wrong with a command line or configuration, and what is allowed."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option}: {_allowed(option, error.options)}"
    if told := explain_key(error):
        return told
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set; type {error.full_key}=<value>"
    told = _first(str(error))
    return f"{told}: {_first(str(cause))}" if isinstance(cause, OmegaConfBaseException) else told


def _allowed(given: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(given, known, 1)
    meant = f"did you mean {nearest[0]}? " if nearest else ""
    return f"{meant}choose from {', '.join(known)}"


def _first(message: str) -> str:
    """A message without where Hydra looked, the types in the schema and its documentation."""
    for aside in ("Config search path:", "\n    full_key:", "\nSee https://hydra.cc"):
        message = message.partition(aside)[0]
    return message.strip().rstrip(".")
