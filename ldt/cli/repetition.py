"""The command `ldt repeat`: run the configuration of an earlier run again."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldt.experiment import run
from ldt.runs.refusal import refusing
from ldt.runs.run import load_config


def renamed(config: DictConfig, folder: Path) -> DictConfig:
    """Return the configuration with study and run name taken from the new directory.

    A logger that names its runs would otherwise continue the original run.
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
        ValueError: see :func:`ldt.experiment.run`.
    """
    with refusing():
        config = renamed(load_config(earlier), folder)
    run(config, folder)
