"""`ldt run` and `python run.py`: compose configurations with Hydra and report errors in one line.

`hydra.main` would exit with 1 and print many lines for every error, so its internals are called.
"""

import copyreg
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
from hydra import version
from hydra._internal import hydra, utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from ldt.cli.exit_codes import exit_codes
from ldt.cli.study_table import exit_sweep
from ldt.config import conf_dir, register
from ldt.config.keys import check_keys, check_names, explain_key
from ldt.config.paths import quote_paths
from ldt.runs.files import discard_sweep
from ldt.runs.refusal import KINDS, refused


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
    """

    study: Path | None = None

    def load_configuration(self, *args: Any, **kwargs: Any) -> DictConfig:
        """Compose and check a configuration; Hydra calls it for runs, sweeps and their jobs."""
        config = super().load_configuration(*args, **kwargs)
        StrictLoader.study = Path(config.hydra.sweep.dir)
        _check_place(config)
        check_keys(config)
        _check_hydra_keys(config.hydra)
        return config


def _check_place(config: DictConfig) -> None:
    """Keep runs below ``runs/<study>``."""
    given = {"study": str(config.study)}
    if not OmegaConf.is_interpolation(config, "run_name"):
        given["run_name"] = str(config.run_name)
    for key, name in given.items():
        parts = name.split("/")
        if not all(parts) or {".", ".."} & set(parts) or name != name.strip():
            raise ValueError(f"{key}={name!r}; allowed: the name of a folder (e.g. {key}=mine)")


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

    Attributes:
        begun: whether it has been called.
        returned: the jobs of a sweep that has ended, also those of other processes.
    """

    begun = False
    returned: Sequence[JobReturn] = ()

    def __call__(self, config: DictConfig) -> float | tuple[float, ...]:
        """Run one experiment.

        Returns:
            The headline metric of the last round, or the `objectives`.
        """
        self.begun = True
        job = HydraConfig.get()
        with exit_codes(explained):  # before Hydra prints its own error message
            from ldt.experiment import run

            folder = Path(job.runtime.output_dir)
            return run(config, folder, in_sweep=job.mode == RunMode.MULTIRUN)
        raise AssertionError("exit_codes ends the process after an error")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compose a configuration and run it, or run a sweep with ``-m``.

    Args:
        arguments: Hydra overrides and flags; default: the arguments of the process.

    Raises:
        SystemExit: with a nonzero exit code (:mod:`ldt.cli.exit_codes`).
    """
    with exit_codes(explained):
        version.setbase("1.3")
        register()
        parser, job = utils.get_args_parser(), Job()
        parser.error = _wrong_flag
        given = parser.parse_intermixed_args(
            quote_paths(sys.argv[1:] if arguments is None else arguments)
        )
        if given.experimental_rerun:
            parser.error("--experimental-rerun is not supported; `ldt repeat` repeats a run")
        if given.help:  # Hydra deep-copies all schemas per listed group, which takes a second
            copyreg.pickle(ConfigStore, lambda _: (ConfigStore.instance, ()))
        try:
            utils._run_hydra(given, parser, job, str(conf_dir()), "config")
        except Exception as error:  # composing may fail with any type, e.g. of PyYAML
            if not job.begun and given.multirun and StrictLoader.study is not None:
                discard_sweep(StrictLoader.study)
            raise error if job.begun else refused(error)  # noqa: B904 (the same exception)
        if given.multirun and StrictLoader.study is not None:
            exit_sweep(StrictLoader.study, Job.returned)


def _wrong_flag(message: str) -> NoReturn:
    raise click.UsageError(f"{message}; --help shows the groups, keys and examples")


def explained(error: Exception) -> str:
    """Format an error about the command line or configuration, with the allowed values."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option}: {_allowed(option, error.options)}"
    if told := explain_key(error):
        return told
    if isinstance(error, InterpolationResolutionError):  # of a resolver: only its own message
        return _first(str(error)).rpartition(" raised while resolving interpolation: ")[2]
    if isinstance(error, InstantiationException) and cause is not None:
        return str(cause)
    if not isinstance(error, (HydraException, *KINDS)):
        kind = type(error).__name__
        return f"the configuration cannot be composed ({kind}: {_first(str(error))})"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set; type {error.full_key}=<value>"
    told = _first(str(error))
    if told.startswith("Config group override must be"):
        return "a group cannot be null: choose one of its options; --help lists them"
    if told.startswith("Could not append to config. An item is already at"):
        key = told.split("'")[1]
        return f"+{key}: the key is there already; type {key}=... without +"
    return f"{told}: {_first(str(cause))}" if isinstance(cause, OmegaConfBaseException) else told


def _allowed(given: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(given, known, 1)
    meant = f"did you mean {nearest[0]}? " if nearest else ""
    return f"{meant}choose from {', '.join(known)}"


def _first(message: str) -> str:
    """Strip the search path, schema types and documentation link from a Hydra message."""
    for aside in ("Config search path:", "\n    full_key:", "\nSee https://hydra.cc"):
        message = message.partition(aside)[0]
    message = message.strip()
    return message if message.endswith("...") else message.removesuffix(".")
