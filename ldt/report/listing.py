"""List of the runs of a study, read from their summaries alone; the command `ldt runs`."""

import json
import time
from collections.abc import Iterable, Sequence
from math import isnan
from pathlib import Path
from typing import NamedTuple

from ldt.runs import files
from ldt.runs.formatting import number, printable
from ldt.runs.study import folders, tolerant_row

HEADS = ("run", "state", "method", "rate", "result", "parameters (M)", "age")
UNITS = (("d", 86_400), ("h", 3600), ("min", 60))  # of ages, in seconds


class Listed(NamedTuple):
    """A run of the list; None for what its summary does not tell.

    Attributes:
        run: name of its directory.
        state: one of :data:`ldt.runs.STATES`.
        method: name of the pruning method.
        rate: the requested share of the budget to remove.
        metric: name of the data set's headline metric.
        result: its value after the last round.
        params: parameters after the last round.
        age_s: seconds since the run was finished, failed or, for others, last begun or stopped.
        error: why it failed or cannot be read.
    """

    run: str
    state: str
    method: str | None
    rate: float | None
    metric: str | None
    result: float | None
    params: float | None
    age_s: float | None
    error: str | None


def list_runs(study: Path, states: Sequence[str] = ()) -> list[Listed]:
    """List the runs of a study by name; damaged ones are among them.

    Args:
        study: directory with the runs' directories.
        states: those to list; empty: all.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    now = time.time()
    found = (_listed(folder, now) for folder in folders(study))
    return [run for run in found if not states or run.state in states]


def _listed(folder: Path, now: float) -> Listed:
    row = tolerant_row(folder)
    metric = row.get("metric")
    result = None if metric is None else row[metric]
    return Listed(
        run=row["run"],
        state=row["status"],
        method=row.get("method"),
        rate=row.get("asked_rate"),
        metric=metric,
        result=None if result is None or isnan(result) else result,
        params=row.get("params"),
        age_s=_age(folder, now),
        error=row.get("error"),
    )


def _age(folder: Path, now: float) -> float | None:
    for file in (folder / files.SUMMARY, folder):
        try:
            return round(now - file.stat().st_mtime, 1)
        except OSError:
            continue
    return None


def as_json(runs: Iterable[Listed]) -> str:
    """Format a list as JSON, an object per run."""
    return json.dumps([run._asdict() for run in runs], indent=1)


def as_table(runs: Iterable[Listed]) -> str:
    """Format a list as lines of aligned columns; rich takes seconds for thousands of rows."""
    rows = [HEADS, *([*map(printable, _cells(run))] for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, cells, widths)) for cells in rows)
    return "\n".join(map(str.rstrip, lines))


def _cells(run: Listed) -> tuple[str, ...]:
    return (
        run.run,
        run.state,
        run.method or "-",
        "-" if run.rate is None else f"{run.rate:g}",
        "-" if run.result is None else f"{run.metric} {run.result:.3f}",
        number(run.params, 3, 1e-6),
        "-" if run.age_s is None else _rough(run.age_s),
    )


def _rough(seconds: float) -> str:
    """Format a time in its largest unit."""
    for unit, length in UNITS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
