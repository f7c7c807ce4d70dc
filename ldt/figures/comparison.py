"""Methods against each other, the paper's Fig. 3: accuracy against what is left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from ldt.figures.curves import LABELS
from ldt.figures.style import COLUMN_CM, DARK, FONT, GREY, PALETTE, SMALL, new_figure

OURS = "ldt"
MARKERS = "os^Dv<>Ph"


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


def draw_comparison(
    methods: Mapping[str, Sequence[Point]], unpruned: Mapping[str, Point], metric: str
) -> Figure:
    """A line with its band (one standard deviation) per method, unpruned detectors dashed.

    Args:
        methods: points of each method.
        unpruned: unpruned detectors by name.
        metric: name of the metric.

    Returns:
        A figure 8 cm wide.

    Raises:
        ValueError: there is no method.
    """
    if not methods:
        raise ValueError("no methods to compare; give at least one with its points")
    figure = new_figure(COLUMN_CM, 7.0)
    axes = figure.add_subplot()
    others = [name for name in methods if name != OURS]
    for order, name in enumerate([*others, *(n for n in methods if n == OURS)]):
        points = sorted(methods[name], key=lambda point: point.left)
        left = [point.left for point in points]
        mean = np.array([point.mean for point in points])
        band = np.array([point.deviation for point in points])
        colour = DARK if name == OURS else PALETTE[order % len(PALETTE)]
        axes.fill_between(left, mean - band, mean + band, color=colour, alpha=0.15, linewidth=0)
        marker = MARKERS[order % len(MARKERS)]
        width = 1.8 if name == OURS else 1.0
        axes.plot(
            left, mean, color=colour, marker=marker, markersize=3.5, linewidth=width, label=name
        )
    for (name, point), style in zip(unpruned.items(), ("--", ":", "-."), strict=False):
        axes.axhline(point.mean, color=GREY, linestyle=style, linewidth=0.9, zorder=0, label=name)
    axes.set_xlabel("parameters left (M)", fontsize=FONT)
    axes.set_ylabel(LABELS.get(metric, metric), fontsize=FONT)
    axes.tick_params(labelsize=SMALL, width=0.6, length=2.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, fontsize=SMALL, frameon=False)
    return figure
