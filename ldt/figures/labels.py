"""Plot what a data set holds: objects of each class, and their sizes."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ldt.data.summary import BANDS
from ldt.figures.look import DARK
from ldt.figures.style import FONT, PAGE_CM, SMALL, new_figure, tidy

COLOURS = (DARK, "#E69F00")  # of the splits
MOST_BARS = 40
HEIGHT = 0.8  # of the bars of a class
WIDE = 100  # ratio of counts from which on their axis is logarithmic
BINS = 32


def draw_labels(
    objects: Mapping[str, Sequence[int]],
    areas: Mapping[str, Sequence[float]],
    classes: Sequence[str],
) -> Figure:
    """Draw objects per class, and a histogram of their sizes, of each split.

    Args:
        objects: number of objects of each class by the split's name.
        areas: areas of the boxes, in pixels of the images, by the split's name.
        classes: names in label order; of more than 40 the most frequent are shown.

    Raises:
        ValueError: there is no split.
    """
    if not objects:
        raise ValueError("no split; give the objects of at least one")
    totals = np.sum([list(own) for own in objects.values()], axis=0)
    shown = np.argsort(-totals, kind="stable")[:MOST_BARS]
    figure = new_figure(PAGE_CM, max(5.5, 1.8 + 0.38 * len(shown)))
    left, right = figure.subplots(1, 2)
    _draw_counts(left, {split: np.asarray(own)[shown] for split, own in objects.items()})
    middle = HEIGHT * (len(objects) - 1) / len(objects) / 2
    left.set_yticks(np.arange(len(shown)) + middle, [classes[i] for i in shown])
    also = f" (the {len(shown)} most frequent of {len(classes)} classes)"
    left.set_xlabel(f"objects{also if len(shown) < len(classes) else ''}", fontsize=FONT)
    _draw_sizes(right, {split: np.sqrt(np.maximum(own, 1.0)) for split, own in areas.items()})
    handles, names = left.get_legend_handles_labels()
    where = {"loc": "outside upper center", "ncols": len(names), "frameon": False}
    figure.legend(handles, names, fontsize=SMALL, **where)
    return figure


def _draw_counts(axes: Axes, counts: Mapping[str, np.ndarray]) -> None:
    height = HEIGHT / len(counts)
    for i, (split, own) in enumerate(counts.items()):
        places = np.arange(len(own)) + i * height
        axes.barh(places, own, height, color=COLOURS[i], label=split)
    whole = np.sum(list(counts.values()), axis=0)
    axes.set_ylim(len(whole) - 0.4, -0.6)
    if whole.max() > WIDE * max(1, whole.min()):
        axes.set_xscale("symlog")
    tidy(axes)


def _draw_sizes(axes: Axes, sides: Mapping[str, np.ndarray]) -> None:
    whole = np.concatenate([[16.0, 128.0], *sides.values()])  # the range without objects
    bins = np.geomspace(whole.min(), whole.max(), BINS + 1).tolist()
    for i, own in enumerate(sides.values()):
        weights = np.full(len(own), 1 / max(1, len(own)))
        axes.hist(own, bins, weights=weights, color=COLOURS[i], histtype="step", linewidth=1.2)
    axes.set_xscale("log")
    for name, area in BANDS.items():
        side = area**0.5
        axes.axvline(side, color="black", linewidth=0.6, linestyle=":")
        axes.annotate(name, (side, 1), (-2, -2), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha="right", va="top", fontsize=SMALL)  # fmt: skip
    axes.set_xlabel("side of a box, $\\sqrt{area}$ (pixels)", fontsize=FONT)
    axes.set_ylabel("share of the split's objects", fontsize=FONT)
    tidy(axes)
