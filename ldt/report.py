"""What a run and a study show at their end: tables on the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ldt.records import read_json

NOT_SET = "(not set)"
METRICS = ("AP", "AP50", "mAP")
BUDGETS = {"params": "parameters", "flops": "multiply-adds"}
PLAIN_WIDTH = 200  # characters, where the output is no terminal: nothing is cut off


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where two nested dicts differ.

    Args:
        old: plain data; dicts may hold dicts.
        new: the same.

    Returns:
        (dotted key, old value, new value), sorted by key; a key that one side does not have shows
        as ``(not set)`` there. Lists are compared whole.
    """
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*old, *new}):
        there, now = old.get(key, NOT_SET), new.get(key, NOT_SET)
        if there == now and (key in old) == (key in new):
            continue
        if _nests(there, key in old, now, key in new):
            inner = differences(there if key in old else {}, now if key in new else {})
            found += [(f"{key}.{name}", *values) for name, *values in inner]
        else:
            found.append((key, there, now))
    return sorted(found, key=lambda difference: difference[0])


def _nests(there: Any, has_old: bool, now: Any, has_new: bool) -> bool:
    """Whether the difference lies below the key: dicts on both sides, or on the only side."""
    sides = [value for value, has in ((there, has_old), (now, has_new)) if has]
    return all(isinstance(value, dict) for value in sides) and any(sides)


# Tables -------------------------------------------------------------------------------------


def print_run(summary: Mapping[str, Any], folder: Path) -> None:
    """Print the base against each round, and where the pictures and the pruned detector are.

    Args:
        summary: of a finished run (``summary.json``).
        folder: the run's directory.
    """
    rows, metric = summary["rounds"], summary["metric"]
    console = _console()
    console.print(_rounds_table(summary))
    console.print(Text(f"* the metric of this data set: {metric}", style="dim"))
    for picture in sorted((folder / "pictures").glob("*.png")):
        _print_path(console, "picture", picture)
    name = "detector" if len(rows) == 1 else "pruned detector"
    _print_path(console, name, folder / summary["checkpoint"])


def _print_path(console: Console, name: str, path: Path) -> None:
    console.print(Text(f"{name}: {path}"), soft_wrap=True)


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def _rounds_table(summary: Mapping[str, Any]) -> Table:
    rows, headline = summary["rounds"], summary["metric"]
    height, width = summary["input_size"]
    table = Table(
        title=Text(f"{summary['run']} (input {height}x{width}, height x width)"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    metrics = list(dict.fromkeys((*METRICS, headline)))
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
    """Threads and device of the latencies; several if the run moved between machines."""
    found = [
        f"{row['threads']} thread{'s' * (row['threads'] != 1)}, {row['device']}"
        for row in rows
        if "threads" in row and "device" in row
    ]
    return "".join(f"; {place}" for place in dict.fromkeys(found))


def number(value: float | None, digits: int, scale: float = 1.0) -> str:
    """A number for a table; "-" where nothing was measured."""
    return "-" if value is None or isnan(value) else f"{value * scale:.{digits}f}"


# Studies ------------------------------------------------------------------------------------


def load_study(study: Path) -> list[dict[str, Any]]:
    """One flat row for each run of a study, sorted by name.

    Args:
        study: the directory that holds the runs' directories.

    Returns:
        Rows with ``run`` and ``status``: ``finished``, ``failed`` (also where ``summary.json``
        cannot be read) or ``unfinished``. Failed ones have ``error``. Finished ones have the run's
        fields (``detector``, ``dataset``, ``method``, ``metric``, ``seed``, ``input_size``,
        ``asked_rate``, ``rounds``, ``budget``), the last round's row under its own keys, and the
        base's row under ``base_<key>``.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    if not study.is_dir():
        raise FileNotFoundError(f"no study at {study}; expected there: one directory for each run")
    runs = [
        folder
        for folder in sorted(study.iterdir())
        if (folder / "summary.json").is_file() or (folder / "config.yaml").is_file()
    ]
    return [_study_row(folder) for folder in runs]


def _study_row(folder: Path) -> dict[str, Any]:
    file = folder / "summary.json"
    try:
        return _flat(folder.name, read_json(file))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OSError) as error:
        text = f"{file} is damaged ({type(error).__name__}: {error}); remove it to run again"
        return {"run": folder.name, "status": "failed", "error": text}


def _flat(run: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    status = summary.get("status")
    if status == "failed":
        return {"run": run, "status": status, "error": str(summary["error"])}
    if status != "finished":
        return {"run": run, "status": "unfinished"}
    keys = ("study", "detector", "dataset", "method", "metric", "seed", "input_size")
    base, last, plan = summary["rounds"][0], summary["rounds"][-1], summary["plan"]
    return {
        "run": run,
        "status": status,
        **{key: summary[key] for key in keys},
        "asked_rate": plan["rate"],
        "rounds": plan["rounds"],
        "budget": plan["budget"],
        **last,
        **{f"base_{key}": value for key, value in base.items()},
    }


def print_study(study: Path) -> int:
    """Print one line for each run of a study, the failed ones last and in red.

    Returns:
        How many runs failed; unfinished ones do not count.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    rows = load_study(study)
    failed = [row for row in rows if row["status"] == "failed"]
    console = _console()
    table = Table(box=box.SIMPLE_HEAD, title=Text(str(study)), title_justify="left")
    for name in ("run", "status", "metric"):
        table.add_column(name, overflow="fold")
    for name in ("base", "last", "parameters (M)", "multiply-adds (G)", "removed (%)"):
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        if row["status"] != "failed":
            table.add_row(*_study_cells(row))
    if table.row_count:
        console.print(table)
    for row in failed:
        first_line = (row["error"].splitlines() or ["no message"])[0]
        line = Text(f"{row['run']}  failed  {first_line}", style="red")
        console.print(line, soft_wrap=True)
    states = [row["status"] for row in rows]
    counts = (f"{states.count(state)} {state}" for state in ("finished", "failed", "unfinished"))
    console.print(", ".join(counts))
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
