"""Plot accuracy against size for one run (Fig. 3 of the paper)."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke

from ldt.figures.look import DARK, GREY, LABELS
from ldt.figures.style import COLUMN_CM, FONT, SMALL, add_top_axis, new_figure, tidy

MOST_NAMES = 6  # with more markers, only the first and the last have a label
LEAST_SPAN = 0.04  # of the accuracy axis, so that tiny differences do not look large


def draw_curve(rounds: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """Plot a metric against the remaining parameters, with a marker for each round.

    Args:
        rounds: rows of a run, the unpruned detector first: ``round``, ``params`` and the metric, in
            [0, 1]; rounds without the metric (missing or nan) are omitted.
        metric: name of the metric.

    Returns:
        A figure of column width; the line's data are (parameters in millions, metric).

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
            _label(axes, name, x, y, rises=values[min(index + 1, len(known) - 1)] > y)
    if base in known:
        axes.axhline(base[metric], color=GREY, linestyle="--", linewidth=0.8, zorder=0)
    total = base["params"] / 1e6
    _set_limits(axes, values, total)
    axes.set_xlabel("parameters left (M)", fontsize=FONT)
    axes.set_ylabel(LABELS.get(metric, metric), fontsize=FONT)
    label = "parameters left (% of the base)"
    add_top_axis(axes, label, lambda x: 100 * x / total, lambda percent: percent * total / 100)
    tidy(axes)
    return figure


def _label(axes: Axes, text: str, x: float, y: float, rises: bool) -> None:
    """Label a marker above it: on the right if the line rises towards the next round, else left."""
    axes.annotate(
        text,
        (x, y),
        (1 if rises else -1, 4),
        textcoords="offset points",
        ha="left" if rises else "right",
        fontsize=SMALL,
        path_effects=[Stroke(linewidth=1.5, foreground="white"), Normal()],
    )


def _set_limits(axes: Axes, values: Sequence[float], total: float) -> None:
    """Start the x axis at 0, so that distances are shares; leave room around the y values."""
    axes.set_xlim(0, 1.08 * total)
    if values:
        low, high = min(values), max(values)
        span = max(high - low, LEAST_SPAN)
        middle = (low + high) / 2
        axes.set_ylim(max(0.0, middle - 0.65 * span), middle + 0.75 * span)
