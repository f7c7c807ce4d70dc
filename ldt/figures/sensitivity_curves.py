"""Plot how loss or AP changes with the channels removed from each group."""

from collections.abc import Mapping, Sequence
from math import isfinite

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
    ScalarFormatter,
)

from ldt.figures.look import DARK, GREY, LABELS
from ldt.figures.stability import wrapped
from ldt.figures.style import FONT, MARKERS, PAGE_CM, PALETTE, new_figure, tidy

COLUMNS = 5
PANEL_CM = 2.1
TITLE, LINE_LENGTH = 5.0, 32  # points; letters of a group's name per line
NARROW = 3  # factor between losses that are drawn on a linear axis
ROOM = 1.1  # factor between the largest loss and the end of its axis
Curve = Sequence[tuple[float, float]]


def draw_sensitivity(curves: Mapping[tuple[str, str], Curve], measure: str) -> Figure:
    """Plot a panel per group with a line per criterion; all panels share their axes.

    Args:
        curves: (share removed, value) by criterion and group; the first is the whole detector's.
        measure: ``loss``, on a logarithmic axis where it varies much, or a metric.

    Returns:
        A figure of page width.

    Raises:
        ValueError: there is no curve.
    """
    if not curves:
        raise ValueError("no curves to draw; give those of at least one group")
    groups = list(dict.fromkeys(group for _, group in curves))
    criteria = list(dict.fromkeys(criterion for criterion, _ in curves))
    rows = -(-len(groups) // COLUMNS)
    figure = new_figure(PAGE_CM, rows * PANEL_CM + 1.4)
    grid = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
    base = next(iter(curves.values()))[0][1]
    colours = (DARK, *PALETTE)
    for axes, group in zip(grid.ravel(), groups, strict=False):
        axes.axhline(base, color=GREY, linestyle="--", linewidth=0.5, zorder=0)
        for place, criterion in enumerate(criteria):
            curve = [point for point in curves.get((criterion, group), ()) if isfinite(point[1])]
            axes.plot(
                [rate for rate, _ in curve],
                [value for _, value in curve],
                color=colours[place % len(colours)],
                marker=MARKERS[place % len(MARKERS)],
                markersize=1.5,
                linewidth=0.7,
                label=criterion,
            )
        axes.set_title(wrapped(group, LINE_LENGTH), fontsize=TITLE, pad=2)
        tidy(axes)
        axes.tick_params(labelsize=TITLE)
    for axes in grid.ravel()[len(groups) :]:
        axes.set_axis_off()
    for axes in grid.ravel()[max(0, len(groups) - COLUMNS) : len(groups)]:
        axes.tick_params(labelbottom=True)  # nothing is drawn below it
    _scale(grid[0, 0], [value for curve in curves.values() for _, value in curve], measure)
    figure.supxlabel("channels removed from the group", fontsize=FONT)
    figure.supylabel("detection loss" if measure == "loss" else LABELS.get(measure, measure),
                     fontsize=FONT)  # fmt: skip
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(labels), fontsize=FONT, frameon=False
    )
    return figure


def _scale(axes: Axes, values: Sequence[float], measure: str) -> None:
    """Set the axes that all panels share."""
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    known = [value for value in values if isfinite(value)]
    if measure != "loss" or min(known) <= 0 or max(known) / min(known) < NARROW:
        axes.yaxis.set_major_locator(MaxNLocator(4))
        return
    low, high = min(known) / ROOM, max(known) * ROOM
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    steps = (1, 3) if high / low > 10 else (1, 2, 5)
    ticks = [step * 10.0**power for power in range(-6, 9) for step in steps]
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
