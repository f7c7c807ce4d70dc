"""Runs the configuration of an earlier run again, in a folder of its own.

python -m ldt.repeat runs/default/<run> runs/again/<run>
"""

import argparse
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldt.experiment import run
from ldt.runs.opened import load_config


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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="directory of the run to repeat")
    parser.add_argument("folder", type=Path, help="directory for the repetition")
    given = parser.parse_args()
    run(renamed(load_config(given.run), given.folder), given.folder)


if __name__ == "__main__":
    main()
