"""Plot the accuracy of a run's base and pruned detector, class by class."""

from collections.abc import Mapping, Sequence
from math import isfinite

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ldt.figures.look import DARK, GREY, LIGHT
from ldt.figures.style import FONT, PAGE_CM, PALETTE, SMALL, new_figure, tidy

MOST_CURVES = len(PALETTE)  # with more classes only their mean is drawn in colour
MOST_BARS = 24
MOST_NUMBERS = 12  # classes, beyond which the cells of a matrix have no numbers


def draw_precision_recall(curves: Mapping[str, np.ndarray], classes: Sequence[str]) -> Figure:
    """Plot precision against recall at IoU 0.5 for each class.

    Args:
        curves: precision [101, classes] at the recalls 0, 0.01, ... 1 by the detector's name, one
            detector or base and pruned; nan for classes without objects.
        classes: names in label order.

    Returns:
        A figure of page width, a panel per detector.

    Raises:
        ValueError: there is no detector.
    """
    if not curves:
        raise ValueError("no detector; give the curves of at least one")
    figure = new_figure(PAGE_CM, 6.5)
    grid = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axes, (name, precision) in zip(grid, curves.items(), strict=True):
        recalls = np.linspace(0, 1, len(precision))
        known = [i for i in range(len(classes)) if isfinite(precision[:, i].mean())]
        many = len(known) > MOST_CURVES
        for place, i in enumerate(known):
            colour = GREY if many else PALETTE[place]
            label = f"{classes[i]} ({precision[:, i].mean():.3f})"
            width = 0.4 if many else 1.2
            axes.plot(recalls, precision[:, i], color=colour, linewidth=width,
                      label=None if many else label)  # fmt: skip
        if known:
            mean = precision[:, known].mean(axis=1)
            axes.plot(recalls, mean, color=DARK, linewidth=2.0, label=f"mean ({mean.mean():.3f})")
            axes.legend(fontsize=SMALL, frameon=False, loc="best")
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.set_title(name, fontsize=FONT)
        axes.set_xlabel("recall", fontsize=FONT)
        tidy(axes)
    grid[0].set_ylabel("precision (IoU 0.5)", fontsize=FONT)
    return figure


def draw_class_ap(aps: Mapping[str, Sequence[float]], classes: Sequence[str]) -> Figure:
    """Draw the AP of each class as bars, those of several detectors beside each other.

    Args:
        aps: AP of each class by the detector's name, one detector or base and pruned.
        classes: names; of more than 24, those whose AP has changed most are shown.

    Raises:
        ValueError: no class has a known AP in all detectors.
    """
    by_class = dict(zip(classes, zip(*aps.values(), strict=True), strict=True))
    values = {name: own for name, own in by_class.items() if all(map(isfinite, own))}
    if not values:
        raise ValueError("no class has a known AP in all detectors")
    ordered = sorted(values, key=lambda name: -abs(values[name][-1] - values[name][0]))
    shown = [name for name in values if name in ordered[:MOST_BARS]]
    figure = new_figure(PAGE_CM / 2, 1.8 + 0.55 * len(shown))
    axes = figure.add_subplot()
    height = 0.8 / len(aps)
    colours = [LIGHT, DARK, *PALETTE] if len(aps) > 1 else [DARK]
    for i, (name, colour) in enumerate(zip(aps, colours, strict=False)):
        places = [place + i * height for place in range(len(shown))]
        axes.barh(places, [values[each][i] for each in shown], height, color=colour, label=name)
        for place, each in zip(places, shown, strict=True):
            axes.annotate(f"{values[each][i]:.3f}", (values[each][i], place), (2, 0),
                          textcoords="offset points", va="center", fontsize=SMALL - 1)  # fmt: skip
    axes.set_yticks([place + height * (len(aps) - 1) / 2 for place in range(len(shown))], shown)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max(max(own) for own in values.values()) or 1)
    left_out = len(values) - len(shown)
    also = f"\nthe {len(shown)} of {len(values)} classes that changed most" if left_out else ""
    axes.set_xlabel(f"AP (IoU 0.50:0.95){also}", fontsize=FONT)
    tidy(axes)
    figure.legend(loc="outside upper center", ncols=len(aps), fontsize=SMALL, frameon=False)
    return figure


def draw_confusion(matrices: Mapping[str, np.ndarray], classes: Sequence[str]) -> Figure:
    """Draw confusion matrices, each row as shares of its true class.

    Args:
        matrices: counts [classes + 1, classes + 1], see
            :func:`ldt.evaluation.confusion.confusion_matrix`, by the detector's name.
        classes: names in label order.

    Raises:
        ValueError: there is no detector.
    """
    if not matrices:
        raise ValueError("no detector; give the matrix of at least one")
    figure = new_figure(PAGE_CM, 0.55 * PAGE_CM if len(matrices) > 1 else PAGE_CM)
    grid = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, (name, counts) in zip(grid, matrices.items(), strict=True):
        _draw_matrix(axes, counts, classes)
        axes.set_title(name, fontsize=FONT)
        axes.set_xlabel("detected as", fontsize=FONT)
    for axes in grid[1:]:
        axes.set_yticklabels([])
    grid[0].set_ylabel("true class", fontsize=FONT)
    return figure


def _draw_matrix(axes: Axes, counts: np.ndarray, classes: Sequence[str]) -> None:
    # detections of the background have no total that they could be a share of but their own
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    places = range(len(classes) + 1)
    few = len(classes) <= MOST_NUMBERS
    size = SMALL if few else 3.0
    axes.set_xticks(places, [*classes, "missed"], rotation=90, fontsize=size)
    axes.set_yticks(places, [*classes, "background"], fontsize=size)
    axes.tick_params(labelsize=size, length=0)
    for row in places if few else ():
        for column in places:
            if counts[row, column]:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{shares[row, column]:.2f}\n{counts[row, column]}",
                          ha="center", va="center", fontsize=SMALL - 1, color=colour)  # fmt: skip
