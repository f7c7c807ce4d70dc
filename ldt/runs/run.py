"""A run's directory as tables: its configuration, rounds, training log, scores and structure."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from ldt.runs.files import read_json
from ldt.runs.study import folders, study_row

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a study may have hundreds of configs


class Cut(NamedTuple):
    """A coupled group as a round began: a score per channel, and the indices that went."""

    scores: np.ndarray
    removed: np.ndarray


@dataclass(frozen=True)
class Run:
    """What a run's directory holds.

    Attributes:
        folder: the directory; its name is the run's.
        config: the resolved configuration.
        row: the run in one line, as of :func:`ldt.report.load_study`.
        summary: ``summary.json``; empty where the run has not ended.
        rounds: a row per finished round, the base first.
    """

    folder: Path
    config: dict[str, Any] = field(repr=False)
    row: dict[str, Any] = field(repr=False)
    summary: dict[str, Any] = field(repr=False)
    rounds: pd.DataFrame = field(repr=False)

    @property
    def name(self) -> str:
        """Of the run."""
        return self.folder.name

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end."""
        return self.row["status"] == "finished"

    @cached_property
    def log(self) -> pd.DataFrame:
        """What was logged while training, by step; nan where a quantity was not logged.

        The columns are ``epoch`` and ``train/...``, ``val/...`` and ``round/...``. A run that was
        resumed has several logs; of a step that was trained twice the later one counts.
        """
        files = [folder / "metrics.csv" for folder in sorted(self.folder.glob("logs*"), key=_order)]
        parts = [pd.read_csv(file).groupby("step").first() for file in files if file.stat().st_size]
        log = pd.DataFrame(index=pd.Index([], name="step"))
        for part in parts:
            earlier: Any = log[log.index < part.index.min()] if len(part) else log
            log = pd.concat([earlier, part])
        return log

    @cached_property
    def cuts(self) -> dict[int, dict[str, Cut]]:
        """For every round that cut, the coupled groups by the name of their root layer."""
        found = {}
        for file in sorted(self.folder.glob("scores-*.npz"), key=_order):
            with np.load(file) as arrays:
                names = [key.removeprefix("score/") for key in arrays if key.startswith("score/")]
                found[_order(file)] = {
                    name: Cut(arrays[f"score/{name}"], arrays[f"removed/{name}"]) for name in names
                }
        return found

    @cached_property
    def layers(self) -> pd.DataFrame:
        """A row per round and layer: ``in``, ``out``, ``params``, ``multiply_adds``.

        Indexed by ``round`` and ``layer``, in network order; a column ``part`` has the first part
        of the layer's name.

        Raises:
            FileNotFoundError: there is no ``structure.json``.
        """
        rounds = self._structure["rounds"]
        rows = [
            {"round": int(index), "layer": name, "part": name.split(".")[0], **sizes}
            for index, layers in rounds.items()
            for name, sizes in layers.items()
        ]
        return pd.DataFrame(rows).set_index(["round", "layer"])

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """The layers whose channels go together, by the name of each coupled group's root layer.

        Raises:
            FileNotFoundError: there is no ``structure.json``.
        """
        return self._structure["groups"]

    @cached_property
    def _structure(self) -> dict[str, Any]:
        found = read_json(self.folder / "structure.json")
        if not found:
            raise FileNotFoundError(
                f"no structure.json in {self.folder}; "
                f"`ldt layers {self.folder}` makes it from the run's checkpoints"
            )
        return found


def _order(path: Path) -> int:
    """The number at the end of a name; 0 without one."""
    digits = re.search(r"(\d+)$", path.stem)
    return int(digits[1]) if digits else 0


def load_run(folder: str | Path) -> Run:
    """Read a run's directory; logs, scores and structure are read when they are asked for.

    Args:
        folder: ``runs/<study>/<run>``.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: its configuration is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file() and not (folder / "summary.json").is_file():
        raise FileNotFoundError(
            f"no run at {folder}; expected there: config.yaml, summary.json, rounds.csv"
        )
    row = study_row(folder)
    summary = read_json(folder / "summary.json") if row["status"] == "finished" else {}
    return Run(folder, _config(folder / "config.yaml"), row, summary, _rounds(folder, summary))


def _rounds(folder: Path, summary: dict[str, Any]) -> pd.DataFrame:
    file = folder / "rounds.csv"
    if summary:
        return pd.DataFrame(summary["rounds"])
    return pd.read_csv(file) if file.is_file() else pd.DataFrame()


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), _LOADER)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove the run to run it again") from error
    return found if isinstance(found, dict) else {}


def load_runs(study: str | Path) -> list[Run]:
    """All runs of a study, sorted by name.

    A run with a damaged configuration is a failed one, and keeps no other from being read.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    return [_tolerant(folder) for folder in folders(Path(study))]


def _tolerant(folder: Path) -> Run:
    try:
        return load_run(folder)
    except ValueError as error:
        row = {"run": folder.name, "status": "failed", "error": str(error)}
        return Run(folder, {}, row, {}, pd.DataFrame())
