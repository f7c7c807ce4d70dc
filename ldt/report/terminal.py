"""Terminal tables printed at the end of a run or study."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ldt.progress.console import console
from ldt.runs import DAMAGED, STATES
from ldt.runs.formatting import number
from ldt.runs.study import load_study

METRICS = ("AP", "AP50", "mAP")
KITTI = ("kitti_easy", "kitti_moderate", "kitti_hard")  # in rounds on KITTI only
BUDGETS = {"params": "parameters", "macs": "multiply-adds", "flops": "multiply-adds"}


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
        f"ldt predict {place}/{summary['checkpoint']} IMAGES",
        f"ldt export {place}/{summary['checkpoint']} exported",
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
        if len(names) == 1 or Measurement.get(out, out.options, table).maximum <= out.width:
            return table
        names.pop()


def _table_of(summary: Mapping[str, Any], metrics: Sequence[str]) -> Table:
    rows, headline = summary["rounds"], summary["metric"]
    base = rows[0]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("round")
    columns: dict[str, list[str]] = {}
    for name in metrics:
        columns[name] = [number(row.get(name), 3) for row in rows]
        if name == headline:
            columns["change"] = [_change(row, base, name) for row in rows]
    columns["parameters (M)"] = [number(row.get("params"), 3, 1e-6) for row in rows]
    columns["MACs (G)"] = [number(row.get("multiply_adds"), 3, 1e-9) for row in rows]
    columns["removed (%)"] = [number(row.get("rate"), 1, 100) for row in rows]
    columns["latency (ms)"] = [number(row.get("latency_ms"), 1) for row in rows]
    columns["speed-up"] = [_speed_up(row, base) for row in rows]
    for name in columns:
        style = "bold" if name == headline else ""
        head = Text(name.replace(" ", "\n"))
        table.add_column(head, justify="right", style=style, no_wrap=True)
    for row, cells in zip(rows, zip(*columns.values(), strict=True), strict=True):
        table.add_row("base" if row["round"] == 0 else str(row["round"]), *cells)
    return table


def _change(row: Mapping[str, Any], base: Mapping[str, Any], name: str) -> str:
    if row is base or name not in row or name not in base or isnan(row[name] - base[name]):
        return "-" if row is not base else ""
    return f"{row[name] - base[name]:+.3f}"


def _speed_up(row: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Return how much faster a round is than the base, where both were timed on one machine."""
    place = ("threads", "device")
    if row is base:
        return ""
    if not row.get("latency_ms") or not base.get("latency_ms"):
        return "-"
    if [row.get(key) for key in place] != [base.get(key) for key in place]:
        return "-"
    return f"{base['latency_ms'] / row['latency_ms']:.2f}x"


def _legend(summary: Mapping[str, Any]) -> Iterator[str]:
    height, width = summary["input_size"]
    budget = BUDGETS[summary["plan"]["budget"]]
    yield f"change: of {summary['metric']}, the metric of this data set, against the base"
    yield f"removed: of the base's {budget}; input {height}x{width} (height x width)"
    if places := _measured_on(summary["rounds"]):
        yield f"latency: of one image, {places}"


def _measured_on(rows: Iterable[Mapping[str, Any]]) -> str:
    """Threads and device of the latencies; several if the run was moved between machines."""
    found = [
        f"{row['threads']} thread{'s' * (row['threads'] != 1)}, {row['device']}"
        for row in rows
        if "threads" in row and "device" in row
    ]
    return "; ".join(dict.fromkeys(found))


def print_study(study: Path) -> int:
    """Print one line per run of a study, failed and damaged ones last and in red.

    Returns:
        The number of failed and damaged runs; unfinished ones are not counted.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    rows = load_study(study)
    failed = [row for row in rows if row["status"] in ("failed", DAMAGED)]
    out = console()
    table = Table(box=box.SIMPLE_HEAD, title=Text(str(study)), title_justify="left")
    for name in ("run", "status", "metric"):
        table.add_column(name, overflow="fold")
    for name in ("base", "last", "parameters (M)", "multiply-adds (G)", "removed (%)"):
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        if row not in failed:
            table.add_row(*_study_cells(row))
    if table.row_count:
        out.print(table)
    for row in failed:
        first_line = (row["error"].splitlines() or ["no message"])[0]
        line = Text(f"{row['run']}  {row['status']}  {first_line}", style="red")
        out.print(line, soft_wrap=True)
    states = [row["status"] for row in rows]
    shown = [state for state in STATES if state in states or state != DAMAGED]
    counts = (f"{states.count(state)} {state}" for state in shown)
    out.print(", ".join(counts))
    return len(failed)


def _study_cells(row: Mapping[str, Any]) -> Sequence[Text]:
    if row["status"] == "unfinished":
        return [Text(row["run"]), Text(row["status"], style="yellow")]
    height, width = row["input_size"]
    cells = (
        row["run"],
        row["status"],
        row["metric"],
        number(row.get(f"base_{row['metric']}"), 3),
        number(row.get(row["metric"]), 3),
        number(row.get("params"), 3, 1e-6),
        f"{number(row.get('multiply_adds'), 3, 1e-9)} at {height}x{width}",
        f"{number(row.get('rate'), 1, 100)} {row['budget']}",
    )
    return [Text(cell) for cell in cells]
