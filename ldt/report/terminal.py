"""Terminal tables printed at the end of a run or study."""

import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import isnan, nan
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ldt.progress.console import console
from ldt.runs import DAMAGED, STATES
from ldt.runs.formatting import TILDE, number, speed_up, tilde
from ldt.runs.study import load_study

METRICS = ("AP", "AP50", "mAP")
KITTI = ("kitti_easy", "kitti_moderate", "kitti_hard")  # in rounds on KITTI only
LEAST_NAME = 27  # characters of a run's name in a line, and the space after it
BUDGETS = {
    "params": "parameters",
    "macs": "multiply-adds",
    "flops": "multiply-adds",
    "latency": "latency",
}
RUNTIME_TIMES = {  # of a round, if report.runtimes has the runtime: CPU time of one thread
    f"{runtime}/cpu_ms": f"{runtime} (ms)" for runtime in ("eager", "onnxruntime", "openvino")
}
LATENCY_TARGETS = {  # of a round, if the budget is the latency
    "latency/asked_ms": "asked (ms)",
    "latency/predicted_ms": "predicted (ms)",
    "latency/measured_ms": "measured (ms)",
}


def shown_metrics(rows: Iterable[Mapping[str, Any]], headlines: Iterable[str]) -> list[str]:
    """Return the names of the metrics to show of rounds or runs, with their headline metrics."""
    measured = {key for row in rows for key in row}
    return list(dict.fromkeys((*METRICS, *(k for k in KITTI if k in measured), *headlines)))


def print_run(summary: Mapping[str, Any], folder: Path) -> None:
    """Print the base and each round, where the results are, and what to do with them.

    Args:
        summary: ``summary.json`` of a finished run.
        folder: the run's directory.
    """
    out = console()
    out.print()
    out.print(Text(summary["run"], style="bold"), soft_wrap=True)
    out.print(_rounds_table(summary, out))
    for line in _legend(summary):
        out.print(Text(line, style="dim"))
    place = _typed(folder)
    commands = [
        f"ldt report {_typed(folder.parent)}",
        f"ldt predict {place} IMAGES",
        f"ldt export {place} exported",
    ]
    out.print(Text(f"results: {folder}"), soft_wrap=True)
    for name, command in zip(("next:", "", ""), commands, strict=True):
        out.print(Text(f"{name:7}  {command}"), soft_wrap=True)


def _typed(folder: Path) -> str:
    """Return a path as one would type it: from the working directory on, if it is below it."""
    here = Path.cwd()
    return shlex.quote(str(folder.relative_to(here) if folder.is_relative_to(here) else folder))


def _rounds_table(summary: Mapping[str, Any], out: Console) -> Table:
    """Return the table of a run's rounds; metrics for which there is no room are left out."""
    names = shown_metrics(summary["rounds"], [summary["metric"]])
    names = [summary["metric"], *(name for name in names if name != summary["metric"])]
    while True:
        table = _table_of(summary, names)
        if len(names) == 1 or _width(out, table) <= out.width:
            return table
        names.pop()


def _width(out: Console, table: Table) -> int:
    """Return the width of a table in which nothing is cut."""
    return Measurement.get(out, out.options.update(max_width=10_000), table).maximum


def _table_of(summary: Mapping[str, Any], metrics: Sequence[str]) -> Table:
    rows, headline = summary["rounds"], summary["metric"]
    base = rows[0]
    columns = {"round": ["base" if row["round"] == 0 else str(row["round"]) for row in rows]}
    for name in metrics:
        columns[name] = [number(row.get(name), 3) for row in rows]
        if name == headline:
            columns["change"] = [_change(row, base, name) for row in rows]
            if any(f"cut/{name}" in row for row in rows):
                cuts = [number(row.get(f"cut/{name}"), 3) for row in rows]
                columns["after cut"] = ["", *cuts[1:]]
    columns["parameters (M)"] = [number(row.get("params"), 3, 1e-6) for row in rows]
    columns["MACs (G)"] = [number(row.get("multiply_adds"), 3, 1e-9) for row in rows]
    columns["removed (%)"] = [number(row.get("rate"), 1, 100) for row in rows]
    if any("latency_ms" in row for row in rows):
        columns["latency (ms)"] = [tilde(row) + number(row.get("latency_ms"), 1) for row in rows]
        columns["speed-up"] = [_speed_up(row, base) for row in rows]
    for key, title in {**RUNTIME_TIMES, **LATENCY_TARGETS}.items():
        if any(key in row for row in rows):
            columns[title] = [number(row.get(key), 2) for row in rows]
    return _table(columns, ["round"], bold=headline)


def _change(row: Mapping[str, Any], base: Mapping[str, Any], name: str) -> str:
    if row is base:
        return ""
    return number(row.get(name, nan) - base.get(name, nan), 3, sign=True)


def _speed_up(row: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Return how much faster a round is than the base, where both were timed on one machine."""
    if row is base:
        return ""
    factor = speed_up(row, base)
    return "-" if isnan(factor) else f"{tilde(row, base)}{factor:.2f}x"


def _legend(summary: Mapping[str, Any]) -> Iterator[str]:
    height, width = summary["input_size"]
    budget = BUDGETS[summary["plan"]["budget"]]
    yield f"change: of {summary['metric']}, the metric of this data set, against the base"
    if any(key.startswith("cut/") for row in summary["rounds"] for key in row):
        yield f"after cut: {summary['metric']} before retraining"
    yield f"removed: of the base's {budget}; input {height}x{width} (height x width)"
    if places := _measured_on(summary["rounds"]):
        yield f"latency: of one image, {places}"
    if tilde(*summary["rounds"]):
        yield TILDE


def _measured_on(rows: Iterable[Mapping[str, Any]]) -> str:
    """Threads and device of the latencies; several if the run was moved between machines."""
    found = [
        f"{row['threads']} thread{'s' * (row['threads'] != 1)}, {row['device']}"
        for row in rows
        if "threads" in row and "device" in row
    ]
    return "; ".join(dict.fromkeys(found))


def print_study(study: Path, labels: Mapping[str, str] | None = None) -> int:
    """Print one line per run of a study, failed and damaged ones last and in red.

    Args:
        study: directory with the runs' directories.
        labels: what to call the runs that are printed, by their names; default: all, by name.

    Returns:
        The number of printed runs that are failed or damaged; unfinished ones are not counted.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    everything = load_study(study)
    named = {row["run"]: row["run"] for row in everything} if labels is None else labels
    rows = [row for row in everything if row["run"] in named]
    failed = [row for row in rows if row["status"] in ("failed", DAMAGED)]
    out = console()
    out.print()
    out.print(Text(str(study), style="bold"), soft_wrap=True)
    if good := [row for row in rows if row not in failed]:
        out.print(_study_table(good, named, out))
    for row in failed:
        first_line = (row["error"].splitlines() or ["no message"])[0]
        line = Text(f"{named[row['run']]}  {row['status']}  {first_line}", style="red")
        out.print(line, soft_wrap=True)
    states = [row["status"] for row in rows]
    shown = [state for state in STATES if state in states or state != DAMAGED]
    counts = ", ".join(f"{states.count(state)} {state}" for state in shown)
    others = len(everything) - len(rows)
    out.print(counts + (f"; {others} more in the study" if others else ""))
    out.print(Text(f"next:  ldt report {_typed(study)}"), soft_wrap=True)
    return len(failed)


def _study_table(
    rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str], out: Console
) -> Table:
    """Return a table of runs; columns for which there is no room are left out."""
    columns = {
        "status": [str(row["status"]) for row in rows],
        "metric": [row.get("metric", "") for row in rows],
        "base": [number(row.get(f"base_{row.get('metric')}"), 3) for row in rows],
        "last": [number(row.get(str(row.get("metric"))), 3) for row in rows],
        "change": [_gain(row) for row in rows],
        "removed (%)": [number(row.get("rate"), 1, 100) for row in rows],
        "parameters (M)": [number(row.get("params"), 3, 1e-6) for row in rows],
        "MACs (G)": [number(row.get("multiply_adds"), 3, 1e-9) for row in rows],
    }
    left = ("run", "status", "metric")
    while _width(out, _table(columns, left)) + LEAST_NAME > out.width:
        columns.popitem()
    return _table({"run": [labels[row["run"]] for row in rows], **columns}, left)


def _gain(row: Mapping[str, Any]) -> str:
    metric = str(row.get("metric"))
    base, last = row.get(f"base_{metric}"), row.get(metric)
    return number(None if base is None or last is None else last - base, 3, sign=True)


def _table(
    columns: Mapping[str, Sequence[str]], left: Collection[str], bold: str | None = None
) -> Table:
    """Return a table; only the cells of its first column may be broken into several lines.

    Args:
        columns: the cells of each column.
        left: names of the columns that are not aligned to the right.
        bold: name of a column in bold.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(
            Text(name.replace(" ", "\n")),
            justify="left" if name in left else "right",
            style="bold" if name == bold else "",
            no_wrap=i > 0,
            overflow="fold",
        )
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    return table
