"""Accuracy against size, the paper's Fig. 3 for one run."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke

from ldt.figures.style import COLUMN_CM, DARK, FONT, GREY, SMALL, new_figure, tidy

LABELS = {"AP": "AP (IoU 0.50:0.95)", "AP50": "AP50 (IoU 0.5)", "mAP": "mAP (IoU 0.5)"}
MOST_NAMES = 6  # markers with a name; of more, only the first and the last
LEAST_SPAN = 0.04  # of the accuracy axis: differences of a thousandth must not look like cliffs


def draw_curve(rounds: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """One metric against the parameters left, a marker for each round.

    Args:
        rounds: rows of a run, the base first: ``round``, ``params`` and the metric, in [0, 1];
            rounds without it (missing or nan) are left out.
        metric: name of the metric.

    Returns:
        A figure as wide as a column; the line's data are (parameters in millions, metric).

    Raises:
        ValueError: there is no round.
    """
    if not rounds:
        raise ValueError("no rounds to draw; give the rows of a run's rounds.csv or summary.json")
    base = rounds[0]
    known = [row for row in rounds if isfinite(row.get(metric, float("nan")))]
    sizes, values = [row["params"] / 1e6 for row in known], [row[metric] for row in known]
    figure = new_figure(COLUMN_CM, 5.5)
    axes = figure.add_subplot()
    axes.plot(sizes, values, "o-", color=DARK, markersize=4, linewidth=1.2, label=metric)
    for index, (row, x, y) in enumerate(zip(known, sizes, values, strict=True)):
        if len(known) <= MOST_NAMES or index in (0, len(known) - 1):
            name = "base" if row["round"] == base["round"] else f"round {row['round']}"
            _name(axes, name, x, y, rises=values[min(index + 1, len(known) - 1)] > y)
    if base in known:
        axes.axhline(base[metric], color=GREY, linestyle="--", linewidth=0.8, zorder=0)
    _limit(axes, values, base["params"] / 1e6)
    axes.set_xlabel("parameters left (M)", fontsize=FONT)
    axes.set_ylabel(LABELS.get(metric, metric), fontsize=FONT)
    share = axes.secondary_xaxis("top", functions=_percent_of(base["params"] / 1e6))
    share.set_xlabel("parameters left (% of the base)", fontsize=FONT)
    tidy(axes)
    tidy(share)
    share.spines["top"].set_visible(True)
    return figure


def _name(axes: Any, text: str, x: float, y: float, rises: bool) -> None:
    """A name above a marker, on the right if the line rises to the next round on the left."""
    axes.annotate(
        text,
        (x, y),
        (1 if rises else -1, 4),
        textcoords="offset points",
        ha="left" if rises else "right",
        fontsize=SMALL,
        path_effects=[Stroke(linewidth=1.5, foreground="white"), Normal()],
    )


def _percent_of(whole: float) -> Any:
    return (lambda x: 100 * x / whole, lambda percent: percent * whole / 100)


def _limit(axes: Any, values: Sequence[float], whole: float) -> None:
    """The x axis begins at 0, so that distances are shares; y holds all values with room."""
    axes.set_xlim(0, 1.08 * whole)
    if values:
        low, high = min(values), max(values)
        span = max(high - low, LEAST_SPAN)
        middle = (low + high) / 2
        axes.set_ylim(middle - 0.65 * span, middle + 0.75 * span)
