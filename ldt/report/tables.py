"""Comparison tables: text for the page, Markdown and LaTeX; numbers for CSV."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from ldt.report.terminal import BUDGETS, LATENCY_TARGETS, RUNTIME_TIMES, shown_metrics
from ldt.runs.aggregate import Cell, notes, summarise
from ldt.runs.formatting import TILDE, number, tilde


class Column(NamedTuple):
    """A measured column: key, format, and whether higher or lower is better."""

    key: str
    title: str
    digits: int
    scale: float = 1.0
    better: int = 0  # 1: more, -1: less, 0: not compared


class Value(NamedTuple):
    """A table cell: text, sort key, and whether it is the best of its block."""

    text: str
    sort: float | str
    best: bool = False


SIZES = (
    Column("params", "parameters (M)", 3, 1e-6, -1),
    Column("multiply_adds", "multiply-adds (G)", 3, 1e-9, -1),
    Column("latency_ms", "latency (ms)", 1, 1.0, -1),
    *(Column(key, title, 2, 1.0, -1) for key, title in RUNTIME_TIMES.items()),
)
TARGETS = tuple(Column(key, title, 2) for key, title in LATENCY_TARGETS.items())
TEXTS = ("dataset", "detector", "method", "removed", "seeds")
FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # how texts begin that spreadsheets compute
Table = list[dict[str, Value]]  # one row per cell, by column title


def percent(share: float) -> str:
    """Format a requested rate as a percentage."""
    return f"{share * 100:g} %"


def columns(found: Sequence[Cell]) -> list[Column]:
    """Return the shown columns: headline metric before, metrics after pruning, and costs."""
    rows = (run.row for cell in found for run in cell.runs)
    names = shown_metrics(rows, (cell.metric for cell in found))
    after = [Column(name, name, 3, 1.0, 1) for name in names]
    return [Column("base", "before", 3), *after, *SIZES, *TARGETS]


def compare(found: Sequence[Cell]) -> Table:
    """Build a table with one row per cell: mean ± standard deviation over its seeds.

    In each column, the best of the pruned cells with the same data set, detector, budget and rate
    is marked, at the displayed precision; the budget itself is not compared.
    """
    means = summarise(found)
    shown = [column for column in columns(found) if column.key in means]
    best = _best(found, means, shown)
    return [
        _texts(cell, row["seeds"])
        | {
            column.title: Value(
                noise(column, *(run.row for run in cell.runs)) + _plus_minus(row, column),
                row[column.key],
                (index, column.key) in best,
            )
            for column in shown
        }
        for index, (cell, row) in enumerate(zip(found, means.to_dict("records"), strict=True))
    ]


def noise(column: Column, *rows: Mapping[str, Any]) -> str:
    """Return "~" in the column of the latency if it was noisy in one of the rows."""
    return tilde(*rows) if column.key == "latency_ms" else ""


def has_noise(found: Sequence[Cell]) -> bool:
    """Return whether a latency of the table was noisy."""
    return bool(tilde(*(run.row for cell in found for run in cell.runs)))


def _texts(cell: Cell, seeds: int) -> dict[str, Value]:
    removed = f"{percent(cell.rate)} of {BUDGETS[cell.budget]}" if cell.pruned else "-"
    values = (cell.dataset, cell.detector, cell.label, removed, str(seeds))
    sort = (*values[:3], cell.rate, seeds)
    rows = zip(TEXTS, values, sort, strict=True)
    return {title: Value(text, key) for title, text, key in rows}


def _plus_minus(means: dict[str, Any], column: Column) -> str:
    mean, deviation = (
        number(means[key], column.digits, column.scale) for key in (column.key, f"{column.key}_std")
    )
    sizes = (*SIZES, *TARGETS)  # often equal for all seeds
    constant = column in sizes and not deviation.strip("0.")
    return mean if deviation == "-" or constant else f"{mean} ± {deviation}"


def _best(
    found: Sequence[Cell], means: pd.DataFrame, shown: Sequence[Column]
) -> set[tuple[int, str]]:
    """(row, column key) of the best pruned cells in each block with several."""
    blocks: dict[Any, list[int]] = defaultdict(list)
    for index, cell in enumerate(found):
        if cell.pruned:
            blocks[cell.block].append(index)
    best = set()
    for (_, _, budget, _), indices in blocks.items():
        bound = {"params": "params", "macs": "multiply_adds"}.get(budget)
        for column in shown:
            rounded = (means[column.key].iloc[indices] * column.scale).round(column.digits)
            top = rounded.max() if column.better > 0 else rounded.min()
            if column.better and column.key != bound and len(indices) > 1:
                best |= {(index, column.key) for index in rounded.index[rounded == top]}
    return best


# Formats ------------------------------------------------------------------------------------


def write(found: Sequence[Cell], kind: str) -> str:
    """Format the comparison as ``markdown``, ``latex`` or ``csv``.

    CSV has all numbers of :func:`ldt.runs.aggregate.summarise`, unrounded and in base units.
    """
    return {"markdown": _markdown, "latex": _latex, "csv": _csv}[kind](found)


def _markdown(found: Sequence[Cell]) -> str:
    table = compare(found)
    titles = list(table[0])
    rule = ["---" if title in TEXTS else "---:" for title in titles]
    rows = [[_marked(value) for value in row.values()] for row in table]
    lines = [f"| {' | '.join(line)} |\n" for line in (map(_as_text, titles), rule, *rows)]
    return "".join(lines) + "".join(f"\n{_as_text(note)}\n" for note in _notes(found))


def _notes(found: Sequence[Cell]) -> list[str]:
    return notes(found) + [TILDE] * has_noise(found)


def _marked(value: Value) -> str:
    text = _as_text(value.text)
    return f"**{text}**" if value.best else text


def _as_text(text: str) -> str:
    """Escape what Markdown, or the HTML in it, would read as more than text."""
    return re.sub(r"([\\|<>&*`\[\]])", r"\\\1", text)


def _latex(found: Sequence[Cell]) -> str:
    table = compare(found)
    texts = pd.DataFrame([{title: value.text for title, value in row.items()} for row in table])
    bold = pd.DataFrame([[_style(value) for value in row.values()] for row in table])
    style: Any = texts.style.apply(lambda _: bold.set_axis(texts.columns, axis=1), axis=None)
    style = style.format(escape="latex").format_index(escape="latex", axis=1).hide(axis="index")
    alignment = "".join("l" if title in TEXTS else "r" for title in texts)
    written = style.to_latex(hrules=True, column_format=alignment).replace("±", "$\\pm$")
    told = "".join(f"% {note}\n" for note in _notes(found))
    return f"% \\usepackage{{booktabs}}\n{told}{written}"


def _style(value: Value) -> str:
    return "textbf:--rwrap;" if value.best else ""


def _csv(found: Sequence[Cell]) -> str:
    table = summarise(found)
    return table.map(_inert).rename(columns=_inert).to_csv(index=False, lineterminator="\n")


def _inert(value: object) -> Any:
    """Mark a text that a spreadsheet would compute; numbers stay as they are."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULAS) else value
