"""Terminal tables printed at the end of a run or study."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ldt.runs import DAMAGED, STATES, files
from ldt.runs.formatting import number
from ldt.runs.study import load_study

METRICS = ("AP", "AP50", "mAP")
KITTI = ("kitti_easy", "kitti_moderate", "kitti_hard")  # in rounds on KITTI only
BUDGETS = {"params": "parameters", "macs": "multiply-adds", "flops": "multiply-adds"}
PLAIN_WIDTH = 200  # characters if the output is not a terminal, so that nothing is truncated


def shown_metrics(rows: Iterable[Mapping[str, Any]], headlines: Iterable[str]) -> list[str]:
    """Return the names of the metrics to show of rounds or runs, with their headline metrics."""
    measured = {key for row in rows for key in row}
    return list(dict.fromkeys((*METRICS, *(k for k in KITTI if k in measured), *headlines)))


def print_run(summary: Mapping[str, Any], folder: Path) -> None:
    """Print the base and each round, and the paths of pictures and pruned detector.

    Args:
        summary: ``summary.json`` of a finished run.
        folder: the run's directory.
    """
    rows, metric = summary["rounds"], summary["metric"]
    out = console()
    out.print(_rounds_table(summary))
    out.print(Text(f"* the metric of this data set: {metric}", style="dim"))
    for picture in files.pictures(folder):
        _print_path(out, "picture", picture)
    name = "detector" if len(rows) == 1 else "pruned detector"
    _print_path(out, name, folder / summary["checkpoint"])


def _print_path(out: Console, name: str, path: Path) -> None:
    out.print(Text(f"{name}: {path}"), soft_wrap=True)


def console() -> Console:
    """Return a console that truncates nothing if the output is not a terminal."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def _rounds_table(summary: Mapping[str, Any]) -> Table:
    rows, headline = summary["rounds"], summary["metric"]
    height, width = summary["input_size"]
    table = Table(
        title=Text(f"{summary['run']} (input {height}x{width}, height x width)"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    metrics = shown_metrics(rows, [headline])
    table.add_column("round")
    for name in metrics:
        is_headline = name == headline
        table.add_column(
            Text(f"{name} *" if is_headline else name),
            justify="right",
            style="bold" if is_headline else "",
        )
    budget = BUDGETS[summary["plan"]["budget"]]
    latency = f"latency (ms{_measured_on(rows)})"
    for name in ("parameters (M)", "multiply-adds (G)", latency, f"{budget} removed (%)"):
        table.add_column(Text(name), justify="right")
    for row in rows:
        table.add_row(
            "base" if row["round"] == 0 else str(row["round"]),
            *(number(row.get(name), 3) for name in metrics),
            number(row.get("params"), 3, 1e-6),
            number(row.get("multiply_adds"), 3, 1e-9),
            number(row.get("latency_ms"), 1),
            number(row.get("rate"), 1, 100),
        )
    return table


def _measured_on(rows: Iterable[Mapping[str, Any]]) -> str:
    """Threads and device of the latencies; several if the run was moved between machines."""
    found = [
        f"{row['threads']} thread{'s' * (row['threads'] != 1)}, {row['device']}"
        for row in rows
        if "threads" in row and "device" in row
    ]
    return "".join(f"; {place}" for place in dict.fromkeys(found))


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
