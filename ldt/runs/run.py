"""Access to a run's directory: configuration, rounds, training log, scores and structure."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf

from ldt.config import Config, packaged_targets
from ldt.runs import files
from ldt.runs.study import folders, study_row

if TYPE_CHECKING:
    import pandas as pd

MOVED = {  # class paths in configurations of earlier versions
    "ldt.data.kitti.RoadScenesDataModule": "ldt.data.roadscenes.RoadScenesDataModule",
    "ldt.wandb_log.WandbRun": "ldt.callbacks.wandb_logger.WandbRun",
}


class Cut(NamedTuple):
    """Pruning of a coupled group in a round: score per channel, and indices of removed channels."""

    scores: np.ndarray
    removed: np.ndarray


@dataclass(frozen=True)
class Run:
    """The contents of a run's directory, at a selected round.

    Attributes:
        folder: the directory; its name is the run's name.
        config: the stored, resolved configuration; empty if there is none.
        row: the run as a row of :func:`ldt.runs.study.load_study`.
        summary: ``summary.json``; empty if the run is not finished.
        rows: measurements of each finished round, the base first.
        round: the selected round, by default the last one; None if no round is finished.
        named: whether the run was opened by the checkpoint of a round.
    """

    folder: Path
    config: dict[str, Any] = field(repr=False)
    row: dict[str, Any] = field(repr=False)
    summary: dict[str, Any] = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)
    round: int | None = None
    named: bool = False

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return self.row["status"] == "finished"

    @property
    def metric(self) -> str:
        """The headline metric of the data set."""
        return self.config["dataset"]["metric"]

    # Rounds -----------------------------------------------------------------------------------

    def at(self, round_: int) -> Run:
        """Return the same run with another selected round.

        Raises:
            FileNotFoundError: the run has no finished round, or no checkpoint of this one.
        """
        self._need_round()
        file = self.folder / files.round_checkpoint(round_)
        if not file.is_file() or all(row["round"] != round_ for row in self.rows):
            there = ", ".join(path.name for path in files.checkpoints(self.folder).values())
            raise FileNotFoundError(
                f"no {file} of a finished round; the run has {there or 'no checkpoints'}"
            )
        return replace(self, round=round_)

    def checkpoint(self, round_: int | None = None) -> Path:
        """Return the checkpoint of a round; default: the selected round.

        Raises:
            FileNotFoundError: see :meth:`at`.
        """
        chosen = self._need_round() if round_ is None else round_
        return self.at(chosen).folder / files.round_checkpoint(chosen)

    @property
    def measured(self) -> Mapping[str, Any]:
        """Measurements of the selected round."""
        round_ = self._need_round()
        return next(row for row in self.rows if row["round"] == round_)

    def _need_round(self) -> int:
        if self.round is None:
            raise FileNotFoundError(
                f"{self.folder} has no finished round (no {files.ROUNDS}); train it first"
            )
        return self.round

    # Tables -----------------------------------------------------------------------------------

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """One row per finished round, the base first."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    @cached_property
    def log(self) -> pd.DataFrame:
        """The training log by step; NaN if a quantity was not logged.

        The columns are ``epoch`` and ``train/...``, ``val/...`` and ``round/...``. A resumed
        run has several logs; for steps trained twice the later values are used.
        """
        import pandas as pd

        logs = [folder / files.METRICS for folder in files.log_folders(self.folder)]
        logs = [file for file in logs if file.is_file() and file.stat().st_size]
        log = pd.DataFrame(index=pd.Index([], name="step"))
        for part in (pd.read_csv(file).groupby("step").first() for file in logs):
            earlier: Any = log[log.index < part.index.min()] if len(part) else log
            log = pd.concat([earlier, part])
        return log

    @cached_property
    def cuts(self) -> dict[int, dict[str, Cut]]:
        """Pruned groups of each pruning round, by the name of their root layer."""
        found = {}
        for round_, file in files.score_files(self.folder).items():
            files.check_archive(file)
            with np.load(file) as arrays:
                names = [key.removeprefix("score/") for key in arrays if key.startswith("score/")]
                found[round_] = {
                    name: Cut(arrays[f"score/{name}"], arrays[f"removed/{name}"]) for name in names
                }
        return found

    @cached_property
    def layers(self) -> pd.DataFrame:
        """One row per round and layer: ``in``, ``out``, ``params``, ``multiply_adds``.

        Indexed by ``round`` and ``layer``, in network order; the column ``part`` is the first
        component of the layer's name.

        Raises:
            FileNotFoundError: there is no ``structure.json``.
        """
        import pandas as pd

        rows = [
            {"round": int(index), "layer": name, "part": name.split(".")[0], **sizes}
            for index, layers in self._structure["rounds"].items()
            for name, sizes in layers.items()
        ]
        return pd.DataFrame(rows).set_index(["round", "layer"])

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """The layers of each coupled group, by the name of its root layer.

        Raises:
            FileNotFoundError: there is no ``structure.json``.
        """
        return self._structure["groups"]

    @cached_property
    def _structure(self) -> dict[str, Any]:
        found = files.read_json(self.folder / files.STRUCTURE)
        if not found:
            raise FileNotFoundError(
                f"no {files.STRUCTURE} in {self.folder}; "
                f"`ldt layers {self.folder}` creates it from the run's checkpoints"
            )
        return found


# Opening --------------------------------------------------------------------------------------


def open_run(path: str | Path) -> Run:
    """Open a run by its directory or by the checkpoint of one of its rounds.

    Logs, scores and structure are loaded on first access.

    Args:
        path: ``runs/<study>/<run>``, or ``round-<t>.ckpt`` in it.

    Raises:
        FileNotFoundError: there is no run, or no such checkpoint of a finished round.
        ValueError: the configuration is damaged.
    """
    path = Path(path)
    named = path.suffix == ".ckpt"
    folder = path.parent if named else path
    if not files.holds_run(folder):
        raise FileNotFoundError(
            f"no run at {folder}; expected there: {files.CONFIG}, {files.SUMMARY}, {files.ROUNDS}; "
            "give the directory of a run, runs/<study>/<run>"
        )
    run = _opened(folder, stored_config(folder))
    if not named:
        return run
    number = path.stem.removeprefix("round-")
    if not number.isdecimal():
        raise FileNotFoundError(
            f"{path} is not the checkpoint of a round; give {folder}/round-<t>.ckpt"
        )
    return replace(run, named=True).at(int(number))


def open_runs(study: str | Path) -> list[Run]:
    """Open all runs of a study, sorted by name.

    A run with a damaged configuration is returned as failed.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    return [_tolerant(folder) for folder in folders(Path(study))]


def _opened(folder: Path, config: dict[str, Any]) -> Run:
    row = study_row(folder)
    summary = files.read_json(folder / files.SUMMARY) if row["status"] == "finished" else {}
    rows = summary["rounds"] if summary else _measured(folder)
    return Run(folder, config, row, summary, rows, rows[-1]["round"] if rows else None)


def _measured(folder: Path) -> list[dict[str, Any]]:
    """Read the rounds of an unfinished run, without missing values."""
    rows = files.read_rows(folder / files.ROUNDS)
    rows = [{key: value for key, value in row.items() if value != ""} for row in rows]
    return [row for row in rows if "round" in row]


def _tolerant(folder: Path) -> Run:
    try:
        return _opened(folder, stored_config(folder))
    except ValueError as error:
        row = {"run": folder.name, "status": "failed", "error": str(error)}
        return Run(folder, {}, row, {}, [])


def stored_config(folder: Path) -> dict[str, Any]:
    """Return the stored configuration of a run, with class paths updated.

    Raises:
        ValueError: the file is damaged.
    """
    return _moved(files.read_config(folder))


def _moved(node: Any) -> Any:
    """Replace the paths of classes that have moved."""
    if isinstance(node, dict):
        found = {key: _moved(value) for key, value in node.items()}
        if isinstance(target := found.get("_target_"), str):
            found["_target_"] = MOVED.get(target, target)
        return found
    return [_moved(value) for value in node] if isinstance(node, list) else node


def load_config(folder: Path, trust: bool = False) -> DictConfig:
    """Return the configuration of a run, validated against the schema, to build from.

    Args:
        folder: the run's directory.
        trust: allow classes that are no part of ldt, which are imported when they are built.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: the configuration is damaged, or needs trust.
    """
    config = stored_config(folder)
    if not config:
        raise FileNotFoundError(
            f"no {folder / files.CONFIG}; give the directory of a run, runs/<study>/<run>"
        )
    _check_code(config, folder, None if trust else packaged_targets())
    found = OmegaConf.merge(OmegaConf.structured(Config), config)
    assert isinstance(found, DictConfig)
    return found


def _check_code(node: object, folder: Path, targets: Set[str] | None) -> None:
    """Check that a stored configuration names no code but the classes ``targets``; None: any.

    Resolvers would run code too; what ldt stores is resolved.
    """
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for value in values:
        _check_code(value, folder, targets)
    if isinstance(node, str) and "${" in node:
        raise ValueError(f"{folder / files.CONFIG}: {node[:100]!r} is not resolved")
    if not isinstance(node, dict) or targets is None:
        return
    target, kind = str(node.get("_target_", "")), str(node.get("type", ""))
    foreign = target if target and target not in targets else kind if "." in kind else ""
    if foreign:
        raise ValueError(
            f"{folder / files.CONFIG} names {foreign[:200]}, which is no part of ldt: where you "
            "trust it type --trust, or trust=True in Python"
        )
