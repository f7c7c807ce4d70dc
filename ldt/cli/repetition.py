"""Runs the configuration of an earlier run again: the command `ldt repeat`."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldt.experiment import run
from ldt.runs.refusal import refusing
from ldt.runs.run import load_config


def renamed(config: DictConfig, folder: Path) -> DictConfig:
    """The configuration as a run of its own: study and name are those of its directory.

    A logger that names its runs would go on in the run that is repeated.
    """
    own: dict[str, Any] = {"study": folder.resolve().parent.name, "run_name": folder.name}
    if "study" in config.logger:
        own["logger"] = {"study": "${study}", "name": "${run_name}"}
    found = OmegaConf.merge(config, own)
    assert isinstance(found, DictConfig)
    return found


def repeat(earlier: Path, folder: Path) -> None:
    """Run the configuration of an earlier run again.

    Args:
        earlier: the directory of the run.
        folder: the directory for the repetition.

    Raises:
        FileNotFoundError: there is no run at ``earlier``.
        ValueError: as :func:`ldt.experiment.run`.
    """
    with refusing():
        config = renamed(load_config(earlier), folder)
    run(config, folder)
