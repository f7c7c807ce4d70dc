"""Compare methods: accuracy against remaining parameters (Fig. 3 of the paper)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ldt.figures.look import DARK, GREY, LABELS
from ldt.figures.style import (
    COLUMN_CM,
    FONT,
    MARKERS,
    PAGE_CM,
    SMALL,
    add_top_axis,
    new_figure,
    tidy,
)

OURS = "LDT"
ON_WHITE = ("#56B4E9", "#D55E00", "#00B07A", "#E69F00", "#CC79A7", "#6E6E6E")  # without yellow
DASHES = ("--", ":", "-.")
COLUMNS = 3  # panels in a row


@dataclass(frozen=True)
class Point:
    """Results of runs that differ only in their seed.

    Attributes:
        left: remaining parameters, in millions.
        values: the metric of each seed.
    """

    left: float
    values: Sequence[float]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float:
        """The sample standard deviation; 0 for a single seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Panel:
    """The methods on one detector and data set.

    Attributes:
        title: title of the panel.
        methods: the points of each method.
        unpruned: unpruned detectors by name.
        metric: name of the metric.
    """

    title: str
    methods: Mapping[str, Sequence[Point]]
    unpruned: Mapping[str, Point]
    metric: str


def draw_comparisons(panels: Sequence[Panel]) -> Figure:
    """Plot a line with a band of one standard deviation per method, unpruned detectors dashed.

    Args:
        panels: one per detector and data set.

    Returns:
        A figure of column width, or of page width for several panels; a method has the same style
        in all of them.

    Raises:
        ValueError: there is no panel, or one without methods.
    """
    if not panels or not all(panel.methods for panel in panels):
        raise ValueError("no methods to compare; give at least one with its points")
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for panel in panels for name in panel.methods))
    names.sort(key=lambda name: (_is_ours(name), name))  # the last is drawn on top
    styles = {name: _style(name, names) for name in names}
    width = COLUMN_CM if columns == 1 else PAGE_CM
    entries = [*names, *(name for panel in panels for name in panel.unpruned)]
    legend_columns = _legend_columns(entries, width)
    lines = -(-len(set(entries)) // legend_columns)
    figure = new_figure(width, 6.2 * rows + 0.4 * lines)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    handles: dict[str, Line2D] = {}
    for axes, panel in zip(grid, panels, strict=False):
        handles |= _draw(axes, panel, styles)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper center", ncols=legend_columns,
        fontsize=SMALL, frameon=False, columnspacing=1.0, handlelength=1.5,
    )  # fmt: skip
    return figure


def _legend_columns(entries: Sequence[str], width_cm: float) -> int:
    """Return how many columns fit, with 0.6 em per letter and 4.5 em for a line and its gaps."""
    widest = (0.6 * max(len(entry) for entry in entries) + 4.5) * SMALL
    return max(1, min(len(entries), int(width_cm / 2.54 * 72 / widest)))


def _is_ours(name: str) -> bool:
    return name.split(" ")[0] == OURS


def _style(name: str, names: Sequence[str]) -> dict[str, Any]:
    order = names.index(name)
    colour = DARK if name == OURS else ON_WHITE[order % len(ON_WHITE)]
    width = 1.8 if name == OURS else 1.0
    return {"color": colour, "marker": MARKERS[order % len(MARKERS)], "linewidth": width}


def _draw(axes: Axes, panel: Panel, styles: Mapping[str, dict[str, Any]]) -> dict[str, Line2D]:
    """Draw a panel and return its lines by name."""
    lines = {}
    for name, style in styles.items():
        points = sorted(panel.methods.get(name, ()), key=lambda point: point.left)
        if not points:
            continue
        left = [point.left for point in points]
        mean = np.array([point.mean for point in points])
        band = np.array([point.deviation for point in points])
        colour = style["color"]
        axes.fill_between(left, mean - band, mean + band, color=colour, alpha=0.15, linewidth=0)
        if len(points) == 1 and band.any():  # a band of one point has no width
            axes.errorbar(left, mean, band, fmt="none", ecolor=colour, elinewidth=0.7, capsize=2)
        lines[name] = axes.plot(left, mean, markersize=3.5, label=name, **style)[0]
    for (name, point), dashes in zip(panel.unpruned.items(), DASHES, strict=False):
        lines[name] = axes.axhline(
            point.mean, color=GREY, linestyle=dashes, linewidth=0.9, zorder=0, label=name
        )
    axes.set_title(panel.title, fontsize=FONT)
    axes.set_xlabel("parameters left (M)", fontsize=FONT)
    axes.set_ylabel(LABELS.get(panel.metric, panel.metric), fontsize=FONT)
    tidy(axes)
    if panel.unpruned:
        total = max(point.left for point in panel.unpruned.values())
        axes.set_xlim(0, None)
        add_top_axis(
            axes,
            "parameters pruned (%)",
            lambda left: 100 * (1 - left / total),
            lambda percent: (1 - percent / 100) * total,
        )
    return lines
