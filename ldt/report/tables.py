"""Comparison tables: text for the page, Markdown and LaTeX; numbers for CSV."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from ldt.report.terminal import BUDGETS, LATENCY_TARGETS, RUNTIME_TIMES, shown_metrics
from ldt.runs.aggregate import Cell, notes, summarise
from ldt.runs.formatting import TILDE, number, printable, tilde


class Column(NamedTuple):
    """A measured column: key, format, and whether higher or lower is better."""

    key: str
    title: str
    digits: int
    scale: float = 1.0
    better: int = 0  # 1: more, -1: less, 0: not compared
    sign: bool = False  # of positive numbers too

    def text(self, value: float | None) -> str:
        """Format a value in the column's unit."""
        return number(value, self.digits, self.scale, self.sign)

    def as_percentage(self) -> "Column":
        """Return the column of a share, such as AP, in per cent."""
        return self._replace(digits=self.digits - 2, scale=100 * self.scale)


class Value(NamedTuple):
    """A table cell: text, sort key, whether it is the best of its block, and where it leads."""

    text: str
    sort: float | str
    best: bool = False
    link: str = ""


SIZES = (
    Column("params", "parameters (M)", 3, 1e-6, -1),
    Column("multiply_adds", "MACs (G)", 3, 1e-9, -1),
    Column("latency_ms", "latency (ms)", 1, 1.0, -1),
    Column("speed_up", "speed-up", 2, 1.0, 1),
    *(Column(key, title, 2, 1.0, -1) for key, title in RUNTIME_TIMES.items()),
)
TARGETS = tuple(Column(key, title, 2) for key, title in LATENCY_TARGETS.items())
TIMED = ("latency_ms", "speed_up")
FIXED = ("params", "multiply_adds")  # by the channels that are left: known without seeds
TEXTS = ("dataset", "detector", "method", "removed", "seeds")
FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # how texts begin that spreadsheets compute
Table = list[dict[str, Value]]  # one row per cell, by column title


def percent(share: float) -> str:
    """Format a requested rate as a percentage."""
    return f"{share * 100:g} %"


def columns(found: Sequence[Cell], percentages: bool = False) -> list[Column]:
    """Return the shown columns: headline metric before, metrics after pruning, and costs."""
    rows = (run.row for cell in found for run in cell.runs)
    names = shown_metrics(rows, (cell.metric for cell in found))
    after = [Column(name, name, 3, 1.0, 1) for name in names]
    shares = [Column("base", "before", 3), *after, Column("change", "change", 3, 1.0, 1, True)]
    return [*(c.as_percentage() if percentages else c for c in shares), *SIZES, *TARGETS]


def compare(found: Sequence[Cell], percentages: bool = False) -> Table:
    """Build a table with one row per cell: mean ± standard deviation over its seeds.

    In each column, the best of the pruned cells with the same data set, detector, budget and rate
    is marked where its interval of one standard deviation over seeds parts from all others'; a cell
    with a single seed has none. The budget itself is not compared.

    Args:
        found: cells of one or several studies.
        percentages: metrics in per cent with one digit, as papers have them.
    """
    means = summarise(found)
    shown = [column for column in columns(found, percentages) if column.key in means]
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
    """Return "~" in the columns of the latency if it was noisy in one of the rows."""
    return tilde(*rows) if column.key in TIMED else ""


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
    mean = column.text(means[column.key])
    deviation = number(means[f"{column.key}_std"], column.digits, column.scale)
    sizes = (*SIZES, *TARGETS)  # often equal for all seeds
    constant = column in sizes and not deviation.strip("0.")
    return mean if deviation == "-" or constant else f"{mean} ± {deviation}"


def _best(
    found: Sequence[Cell], means: pd.DataFrame, shown: Sequence[Column]
) -> set[tuple[int, str]]:
    """(row, column key) of the cells that are better than all others of their block."""
    blocks: dict[Any, list[int]] = defaultdict(list)
    for index, cell in enumerate(found):
        if cell.pruned:
            blocks[cell.block].append(index)
    best = set()
    for (_, _, budget, _), indices in blocks.items():
        bound = {"params": "params", "macs": "multiply_adds"}.get(budget)
        for column in shown:
            value = column.better * means[column.key].iloc[indices]
            if column.better and column.key != bound and value.notna().sum() > 1:
                spread = means[f"{column.key}_std"].iloc[indices]
                spread = spread.fillna(0) if column.key in FIXED else spread
                low, high = value - spread, value + spread
                parts = low > high.drop(value.idxmax()).max(skipna=False)
                best |= {(index, column.key) for index in value.index[parts]}
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
    """One table for each detector and data set, metrics in per cent."""
    pairs: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in found:
        pairs[cell.detector, cell.dataset].append(cell)
    told = "".join(f"% {note}\n" for note in _notes(found))
    tables = (
        f"\n% {' on '.join(map(printable, pair))}\n{_tabular(own)}" for pair, own in pairs.items()
    )
    return f"% \\usepackage{{booktabs}}\n{told}{''.join(tables)}"


def _tabular(found: Sequence[Cell]) -> str:
    one = ("dataset", "detector")
    table = [
        {title: value for title, value in row.items() if title not in one}
        for row in compare(found, percentages=True)
    ]
    texts = pd.DataFrame([{title: value.text for title, value in row.items()} for row in table])
    bold = pd.DataFrame([[_style(value) for value in row.values()] for row in table])
    style: Any = texts.style.apply(lambda _: bold.set_axis(texts.columns, axis=1), axis=None)
    style = style.format(escape="latex").format_index(escape="latex", axis=1).hide(axis="index")
    alignment = "".join("l" if title in TEXTS else "r" for title in texts)
    return style.to_latex(hrules=True, column_format=alignment).replace("±", "$\\pm$")


def _style(value: Value) -> str:
    return "textbf:--rwrap;" if value.best else ""


def _csv(found: Sequence[Cell]) -> str:
    table = summarise(found)
    return table.map(_inert).rename(columns=_inert).to_csv(index=False, lineterminator="\n")


def _inert(value: object) -> Any:
    """Mark a text that a spreadsheet would compute; numbers stay as they are."""
    if not isinstance(value, str):
        return value
    return printable(f"'{value}" if value.startswith(FORMULAS) else value)
