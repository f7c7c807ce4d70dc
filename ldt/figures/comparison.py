"""Methods against each other, the paper's Fig. 3: accuracy against what is left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ldt.figures.curves import LABELS
from ldt.figures.style import (
    COLUMN_CM,
    DARK,
    FONT,
    GREY,
    MARKERS,
    PAGE_CM,
    SMALL,
    new_figure,
    tidy,
)

OURS = "ldt"
ON_WHITE = ("#56B4E9", "#D55E00", "#00B07A", "#E69F00", "#CC79A7", "#6E6E6E")  # no yellow lines
DASHES = ("--", ":", "-.")
ACROSS = 3  # panels in a row


@dataclass(frozen=True)
class Point:
    """Results of equal runs with different seeds.

    Attributes:
        left: parameters left, in millions.
        values: the metric of each seed.
    """

    left: float
    values: Sequence[float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float:
        """The sample's standard deviation; 0 for a single seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Panel:
    """The methods on one detector and data set.

    Attributes:
        title: of the panel.
        methods: points of each method.
        unpruned: unpruned detectors by name.
        metric: name of the metric.
    """

    title: str
    methods: Mapping[str, Sequence[Point]]
    unpruned: Mapping[str, Point]
    metric: str


def draw_comparisons(panels: Sequence[Panel]) -> Figure:
    """A line with its band (one standard deviation) per method, unpruned detectors dashed.

    Args:
        panels: one for each detector and data set.

    Returns:
        A figure as wide as a column, or as a page where there are several panels; a method looks
        the same in all of them.

    Raises:
        ValueError: there is no panel, or one without methods.
    """
    if not panels or not all(panel.methods for panel in panels):
        raise ValueError("no methods to compare; give at least one with its points")
    columns = min(len(panels), ACROSS)
    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for panel in panels for name in panel.methods))
    names.sort(key=lambda name: (_is_ours(name), name))  # ours last: on top
    looks = {name: _look(name, names) for name in names}
    width = COLUMN_CM if columns == 1 else PAGE_CM
    entries = [*names, *(name for panel in panels for name in panel.unpruned)]
    across = _entries_across(entries, width)
    lines = -(-len(set(entries)) // across)
    figure = new_figure(width, 6.2 * rows + 0.4 * lines)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    known: dict[str, Any] = {}
    for axes, panel in zip(grid, panels, strict=False):
        known |= _draw(axes, panel, looks)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.legend(
        list(known.values()), list(known), loc="outside upper center", ncols=across,
        fontsize=SMALL, frameon=False, columnspacing=1.0, handlelength=1.5,
    )  # fmt: skip
    return figure


def _entries_across(entries: Sequence[str], width_cm: float) -> int:
    """How many columns of a legend fit; a letter is about 0.6 em wide, a line and its gaps 4.5."""
    widest = (0.6 * max(len(entry) for entry in entries) + 4.5) * SMALL
    return max(1, min(len(entries), int(width_cm / 2.54 * 72 / widest)))


def _is_ours(name: str) -> bool:
    return name.split(" ")[0] == OURS


def _look(name: str, names: Sequence[str]) -> dict[str, Any]:
    order = names.index(name)
    colour = DARK if name == OURS else ON_WHITE[order % len(ON_WHITE)]
    width = 1.8 if name == OURS else 1.0
    return {"color": colour, "marker": MARKERS[order % len(MARKERS)], "linewidth": width}


def _draw(axes: Any, panel: Panel, looks: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The lines of a panel, by their name."""
    known = {}
    for name, look in looks.items():
        points = sorted(panel.methods.get(name, ()), key=lambda point: point.left)
        if not points:
            continue
        left = [point.left for point in points]
        mean = np.array([point.mean for point in points])
        band = np.array([point.deviation for point in points])
        colour = look["color"]
        axes.fill_between(left, mean - band, mean + band, color=colour, alpha=0.15, linewidth=0)
        if len(points) == 1 and band.any():  # a band of one point has no width
            axes.errorbar(left, mean, band, fmt="none", ecolor=colour, elinewidth=0.7, capsize=2)
        known[name] = axes.plot(left, mean, markersize=3.5, label=name, **look)[0]
    for (name, point), style in zip(panel.unpruned.items(), DASHES, strict=False):
        known[name] = axes.axhline(
            point.mean, color=GREY, linestyle=style, linewidth=0.9, zorder=0, label=name
        )
    axes.set_title(panel.title, fontsize=FONT)
    axes.set_xlabel("parameters left (M)", fontsize=FONT)
    axes.set_ylabel(LABELS.get(panel.metric, panel.metric), fontsize=FONT)
    tidy(axes)
    if panel.unpruned:
        whole = max(point.left for point in panel.unpruned.values())
        axes.set_xlim(0, None)
        top = axes.secondary_xaxis("top", functions=_pruned_of(whole))
        top.set_xlabel("parameters pruned (%)", fontsize=FONT)
        tidy(top)
        top.spines["top"].set_visible(True)
    return known


def _pruned_of(whole: float) -> Any:
    """Parameters left to per cent that are gone, and back."""
    return (lambda x: 100 * (1 - x / whole), lambda gone: (1 - gone / 100) * whole)
