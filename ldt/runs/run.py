"""Access to a run's directory: configuration, rounds, training log, scores and structure."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf

from ldt.config import Config, packaged_targets
from ldt.config.values import check_against_schema
from ldt.runs import DAMAGED, DONE, arrays, files, identity, inputs, provenance, records
from ldt.runs.files import DamagedError
from ldt.runs.records import stored_config
from ldt.runs.study import damaged_row, folders, read_summary, row_of

if TYPE_CHECKING:
    import pandas as pd


log = logging.getLogger(__name__)
LARGEST_LOG = 2**27  # bytes of a training log
MOST_STEPS = 10**15

MOST_NAMES = 10  # runs of a study that are listed


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
        row: the run as a row of :func:`ldt.runs.study.load_study`; ``damaged`` if another file
            that tells what the run is cannot be read either.
        summary: ``summary.json``; empty if the run is not finished.
        rows: measurements of each finished round, the base first.
        settings: the flat settings shared by the runs of its cell; empty without configuration.
        inputs: ``inputs.json``; empty if they were not recorded.
        round: the selected round, by default the last one; None if no round is finished.
        named: whether the run was opened by the checkpoint of a round.
    """

    folder: Path
    config: dict[str, Any] = field(repr=False)
    row: dict[str, Any] = field(repr=False)
    summary: dict[str, Any] = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)
    settings: dict[str, Any] = field(repr=False, default_factory=dict)
    inputs: Mapping[str, Any] = field(repr=False, default_factory=dict)
    round: int | None = None
    named: bool = False

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return self.row["status"] == DONE

    @property
    def damaged(self) -> bool:
        """Whether the run cannot be read."""
        return self.row["status"] == DAMAGED

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
        run has several logs; for steps trained twice the later values are used. A damaged log is
        left out with a warning.
        """
        return training_log(self.folder)

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """Software and hardware of each start; empty, with a warning, if they are damaged."""
        return files.tolerated(lambda: provenance.starts(self.folder), [])

    @cached_property
    def latencies(self) -> dict[str, float]:
        """Latencies measured after the run; empty, with a warning, if they are damaged."""
        return files.tolerated(self._read_latencies, {})

    def _read_latencies(self) -> dict[str, float]:
        file = self.folder / files.LATENCY
        found = files.read_json(file)
        records.check(file, records.LATENCIES, found)
        return found

    @cached_property
    def cuts(self) -> dict[int, dict[str, Cut]]:
        """Pruned groups of each pruning round, by the name of their root layer."""
        return {round_: _read_cuts(file) for round_, file in files.score_files(self.folder).items()}

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

    @property
    def layer_changes(self) -> list[dict[str, Any]]:
        """Sizes of each layer before pruning and after the last round; see `layer_changes`.

        Raises:
            FileNotFoundError: there is no ``structure.json``.
        """
        return layer_changes(self._structure["rounds"])

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """The layers of each coupled group, by the name of its root layer.

        Raises:
            FileNotFoundError: there is no ``structure.json``.
        """
        return self._structure["groups"]

    @cached_property
    def _structure(self) -> dict[str, Any]:
        found = files.read_json(file := self.folder / files.STRUCTURE)
        if not found:
            raise FileNotFoundError(
                f"no {files.STRUCTURE} in {self.folder}; "
                f"`ldt layers {self.folder}` creates it from the run's checkpoints"
            )
        records.check(file, records.STRUCTURE, found, f"`ldt layers {self.folder}` writes it again")
        return found


def layer_changes(rounds: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return for each layer of the unpruned network its ``layer`` (name) and ``sizes``.

    Args:
        rounds: of ``structure.json``: measurements of the layers by round.

    Returns:
        ``sizes`` has for each measurement its value before pruning and after the last round.
    """
    if not rounds:
        return []
    first, last = rounds[min(rounds, key=int)], rounds[max(rounds, key=int)]
    return [
        {
            "layer": name,
            "sizes": {
                key: (value, last[name][key]) for key, value in sizes.items() if key in last[name]
            },
        }
        for name, sizes in first.items()
        if name in last
    ]


def training_log(folder: Path) -> pd.DataFrame:
    """Return the training log of a run's directory; see :attr:`Run.log`."""
    import pandas as pd

    log: Any = pd.DataFrame(index=pd.Index([], name="step"))
    for part_folder in files.log_folders(folder):
        file = part_folder / files.METRICS
        part = files.tolerated(lambda file=file: _read_log(file), None)
        if part is not None and len(part):
            earlier: Any = log[log.index < part.index[0]]
            log = pd.concat([earlier, part]) if len(log) else part
    return log


def _read_cuts(file: Path) -> dict[str, Cut]:
    """Read the cuts of a round.

    Raises:
        DamagedError: it cannot be read, or removes what is not there.
    """
    found = arrays.read(file, {"score/": ("fiu", 1), "removed/": ("iu", 1)})
    with files.reading(file):
        names = [key.removeprefix("score/") for key in found if key.startswith("score/")]
        cuts = {name: Cut(found[f"score/{name}"], found[f"removed/{name}"]) for name in names}
        for name, (scores, removed) in cuts.items():
            if (
                len(np.unique(removed)) < len(removed)
                or not np.isin(removed, np.arange(len(scores))).all()
            ):
                raise ValueError(f"removed/{name}: no channels of its {len(scores)}")
        return cuts


def _read_log(file: Path) -> pd.DataFrame | None:
    """Read a training log, by step; None if nothing is logged yet.

    Raises:
        DamagedError: it cannot be read, lacks the steps, or has texts for numbers.
    """
    import pandas as pd

    with files.reading(file, "the run is shown without it"):
        if not file.exists() or not file.stat().st_size:
            return None
        with io.TextIOWrapper(files.open_regular(file), "utf-8", newline="") as opened:
            if os.fstat(opened.fileno()).st_size > LARGEST_LOG:
                raise ValueError(f"larger than {LARGEST_LOG / 2**20:.0f} MiB")
            rows = csv.reader(opened, strict=True)  # pandas takes longer to start
            names = next(rows)
            if len(set(names)) < len(names):
                raise ValueError("a column twice")
            values = np.fromiter(_cells(rows, len(names)), float).reshape(-1, len(names))
        values = values[~np.isnan(values[:, names.index("step")])]
        if (np.abs(values[:, names.index("step")]) > MOST_STEPS).any():
            raise ValueError(f"a step beyond {MOST_STEPS}")
        steps, places = np.unique(values[:, names.index("step")], return_inverse=True)
        table = np.full((len(steps), len(names)), np.nan)
        for column, logged in zip(table.T, values.T, strict=True):
            there = ~np.isnan(logged)
            column[places[there][::-1]] = logged[there][::-1]  # the first of a step is kept
        index = pd.Index(steps.astype(int), name="step")
        return pd.DataFrame(table, index, names).drop(columns="step")


def _cells(rows: Iterable[list[str]], columns: int) -> Iterator[float]:
    """Yield the numbers of a log, row by row; those that a cut last row lacks are NaN.

    Raises:
        ValueError: another row has more or fewer cells than there are columns; or has a text.
    """
    cut = False
    for row in filter(None, rows):
        if cut or len(row) > columns:
            raise ValueError(f"a row without {columns} cells")
        cut = len(row) < columns
        yield from (float(text or "nan") for text in row)
        yield from repeat(math.nan, columns - len(row))


# Opening --------------------------------------------------------------------------------------


def open_run(path: str | Path) -> Run:
    """Open a run by its directory or by the checkpoint of one of its rounds.

    Logs, scores and structure are loaded on first access.

    Args:
        path: ``runs/<study>/<run>``, or ``round-<t>.ckpt`` in it.

    Raises:
        FileNotFoundError: there is no run, but perhaps a study; or no such checkpoint of a
            finished round.
        DamagedError: a file that tells what the run is cannot be read.
    """
    path = Path(path)
    named = path.suffix == ".ckpt"
    folder = path.parent if named else path
    check_run(folder)
    run = _opened(folder)
    if not named:
        return run
    number = path.stem.removeprefix("round-")
    if not number.isdecimal():
        raise FileNotFoundError(
            f"{path} is not the checkpoint of a round; give {folder}/round-<t>.ckpt"
        )
    return replace(run, named=True).at(int(number))


def check_run(folder: Path) -> None:
    """Check that a directory holds a run.

    Raises:
        FileNotFoundError: it does not; the message lists the runs of a study.
    """
    if not files.holds_run(folder):
        names = [run.name for run in folders(folder)] if folder.is_dir() else []
        if names:
            more = f", ... ({len(names)} runs)" if names[MOST_NAMES:] else ""
            raise FileNotFoundError(
                f"{folder} is a study; give one of its runs, {folder}/<run>: "
                f"{', '.join(names[:MOST_NAMES])}{more}"
            )
        raise FileNotFoundError(
            f"no run at {folder}; expected there: {files.CONFIG}, {files.SUMMARY}, {files.ROUNDS}; "
            "give the directory of a run, runs/<study>/<run>"
        )


def checkpoint_of(path: str | Path) -> Path:
    """Return the checkpoint that is meant: the last round's where a run's directory is given.

    Of an unfinished run it is the newest complete one, and a warning says so.

    Args:
        path: a run's directory; anything else is returned as it is.

    Raises:
        FileNotFoundError: the directory holds no run, or one without a checkpoint.
        DamagedError: see :func:`open_run`.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    run = open_run(path)
    if run.finished:
        return run.checkpoint()
    there = files.checkpoints(path)
    complete = [row["round"] for row in run.rows if row["round"] in there]
    file = run.checkpoint(max(complete, default=None))
    log.warning("%s is %s: taking its newest checkpoint, %s", path, run.row["status"], file.name)
    return file


def open_runs(study: str | Path) -> list[Run]:
    """Open all runs of a study, sorted by name.

    A run that cannot be read is among them, ``damaged``: see :func:`readable`.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    return [_tolerant(folder) for folder in folders(Path(study))]


def readable(runs: Iterable[Run]) -> list[Run]:
    """Return the runs that can be read; a warning names the damaged file of each other one."""
    found = list(runs)
    for run in found:
        if run.damaged:
            log.warning("left out: %s", run.row["error"])
    return [run for run in found if not run.damaged]


def _opened(folder: Path) -> Run:
    """Read the files that tell what a run is."""
    summary = read_summary(folder)
    row, config = row_of(folder, summary), stored_config(folder)
    with files.reading(folder / files.CONFIG, "remove the run to repeat it"):
        settings = identity.cell(config)
        json.dumps(settings, sort_keys=True, default=str)  # as cells are compared
    done = row["status"] == DONE
    rows = summary["rounds"] if done else _measured(folder)
    read = inputs.recorded(folder) if done else {}
    last = rows[-1]["round"] if rows else None
    return Run(folder, config, row, summary if done else {}, rows, settings, read, last)


def _measured(folder: Path) -> list[dict[str, Any]]:
    """Read the rounds of an unfinished run, without missing values."""
    file = folder / files.ROUNDS
    rows = [
        {key: value for key, value in row.items() if value != ""} for row in files.read_rows(file)
    ]
    records.check(file, records.ROUNDS, rows)
    return rows


def _tolerant(folder: Path) -> Run:
    try:
        return _opened(folder)
    except DamagedError as error:
        return Run(folder, {}, damaged_row(folder, error), {}, [])


def load_config(folder: Path, trust: bool = False) -> DictConfig:
    """Return the configuration of a run, validated against the schema, to build from.

    Args:
        folder: the run's directory.
        trust: allow classes that are no part of ldt, which are imported when they are built, and
            any folder as ``dataset.cache``; without it one that holds no scenes is replaced by the
            default.

    Raises:
        FileNotFoundError: the folder holds no run.
        DamagedError: the configuration is damaged, or has a value that is not allowed.
        ValueError: it needs trust.
    """
    config = stored_config(folder)
    if not config:
        raise FileNotFoundError(
            f"no {folder / files.CONFIG}; give the directory of a run, runs/<study>/<run>"
        )
    _check_code(config, folder, None if trust else packaged_targets())
    with files.reading(folder / files.CONFIG, "remove the run to repeat it"):
        if not isinstance(config.get("dataset"), dict):
            raise ValueError("it has no dataset")
        found = OmegaConf.merge(OmegaConf.structured(Config), config)
        assert isinstance(found, DictConfig)
        check_against_schema(config)  # before anything is built of it
    cache = found.dataset.get("cache")
    if cache and not trust and not any(inputs.cache_folder(cache).glob("roadscenes-*")):
        found.dataset.cache = None  # scenes are not generated wherever a stranger's file says
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
