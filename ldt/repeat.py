"""Runs the configuration of an earlier run again, in a folder of its own.

python -m ldt.repeat runs/default/<run> runs/again/<run>
"""

import argparse
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ldt.config import Config
from ldt.experiment import run


def load(folder: Path) -> DictConfig:
    """The resolved configuration of a run, checked against the schema.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"no {file}; give the directory of a run, runs/<study>/<run>")
    config = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(file))
    assert isinstance(config, DictConfig)
    return config


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="directory of the run to repeat")
    parser.add_argument("folder", type=Path, help="directory for the repetition")
    given = parser.parse_args()
    run(load(given.run), given.folder)


if __name__ == "__main__":
    main()
