"""A run's directory, opened again: its configuration, rounds, data and detectors."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldt.build import build_data
from ldt.config import Config
from ldt.data.datamodule import DetectionDataModule
from ldt.detectors.checkpoints import read
from ldt.module import DetectorModule, restored
from ldt.runs.files import read_rows


def load_config(folder: Path) -> DictConfig:
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


@dataclass(frozen=True)
class Run:
    """A run at one of its rounds.

    Attributes:
        folder: its directory.
        config: its configuration.
        rows: its finished rounds, the base first.
        round: the round that is looked at.
        named: whether it was asked for by its checkpoint.
    """

    folder: Path
    config: DictConfig
    rows: list[dict[str, Any]]
    round: int
    named: bool = False

    @property
    def row(self) -> Mapping[str, Any]:
        """What was measured in the round."""
        return next(row for row in self.rows if row["round"] == self.round)

    @property
    def checkpoint(self) -> Path:
        """The round's checkpoint."""
        return self.folder / f"round-{self.round}.ckpt"

    @property
    def metric(self) -> str:
        """The headline metric of the data."""
        return self.config.dataset.metric

    @cached_property
    def data(self) -> DetectionDataModule:
        """The data of the run, read."""
        data = build_data(self.config)
        data.prepare_data()
        data.setup("fit")
        return data

    def at(self, round_: int) -> "Run":
        """The same run at another round.

        Raises:
            FileNotFoundError: the run has no checkpoint of it.
        """
        file = self.folder / f"round-{round_}.ckpt"
        if not file.is_file() or all(row["round"] != round_ for row in self.rows):
            there = ", ".join(path.name for path in sorted(self.folder.glob("round-*.ckpt")))
            raise FileNotFoundError(
                f"no {file} of a finished round; the run has {there or 'no checkpoints'}"
            )
        return replace(self, round=round_)

    def module(self) -> DetectorModule:
        """The round's detector as criteria see it, in eval mode."""
        recipe: Any = OmegaConf.to_container(self.config.recipe, resolve=True)
        return restored(read(self.checkpoint), recipe)


def open_run(path: Path) -> Run:
    """A run by its directory (at its last finished round) or by one of its ``round-<t>.ckpt``.

    Raises:
        FileNotFoundError: there is no run, or it has no finished round or no such checkpoint.
    """
    folder = path.parent if path.suffix == ".ckpt" else path
    config, rows = load_config(folder), read_rows(folder / "rounds.csv")
    if not rows:
        raise FileNotFoundError(f"{folder} has no finished round (no rounds.csv); let it run first")
    run = Run(folder, config, rows, rows[-1]["round"])
    number = path.stem.removeprefix("round-")
    if path.suffix != ".ckpt":
        return run.at(run.round)
    if not number.isdecimal():
        raise FileNotFoundError(f"{path} is no round's checkpoint; give {folder}/round-<t>.ckpt")
    return replace(run, named=True).at(int(number))
