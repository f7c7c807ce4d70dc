"""Plot classes and channels in the neck's output (Fig. 1 of the paper)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ldt.evaluation.neck_statistics import NeckSpace
from ldt.figures.look import DARK, GREY
from ldt.figures.style import FONT, MARKERS, PAGE_CM, PALETTE, SMALL, new_figure, tidy

LEAST = 1e-4  # smaller shares of the largest eigenvalue or ratio are not shown
SCATTER_CM, LINES_CM = 6.0, 5.0
STYLES = (  # of the first and the second detector
    {"color": GREY, "marker": "o", "linestyle": "--"},
    {"color": DARK, "marker": "^", "linestyle": "-"},
)


def draw_discriminants(
    spaces: Sequence[NeckSpace], titles: Sequence[str], classes: Sequence[str]
) -> Figure:
    """Plot objects in the first two discriminants, eigenvalues, and channel ratio and activity.

    Args:
        spaces: those of one or two detectors, on the same scale.
        titles: names of the detectors.
        classes: class names in label order. The most frequent six have a colour, others are grey.

    Returns:
        A figure of page width: a scatter plot per detector with shared axes, then the eigenvalues,
        and ratio and activity of the channels, both by descending ratio.

    Raises:
        ValueError: there are not one or two spaces with a title each.
    """
    if len(spaces) not in (1, 2) or len(titles) != len(spaces):
        raise ValueError(
            f"{len(spaces)} detectors with {len(titles)} titles; give one or two with a title each"
        )
    figure = new_figure(PAGE_CM, LINES_CM + 1 if len(spaces) == 1 else SCATTER_CM + LINES_CM + 1)
    mosaic = "0era" if len(spaces) == 1 else "000111\neerraa"
    panels = figure.subplot_mosaic(mosaic)
    shown = _most_frequent(spaces)
    for index, (space, title) in enumerate(zip(spaces, titles, strict=True)):
        _scatter(panels[str(index)], space, title, shown, classes)
    if len(spaces) == 2:
        _share_limits(panels["0"], panels["1"])
    for space, title, style in zip(spaces, titles, STYLES[-len(spaces) :], strict=True):
        style = style | {"markersize": 2.0, "linewidth": 1.0, "label": title.split("\n")[0]}
        _lines(panels["e"], panels["r"], panels["a"], space, style)
    _label_axes(panels, spaces)
    handles, names = panels["0"].get_legend_handles_labels()
    if len(spaces) == 2:
        lines, labels = panels["e"].get_legend_handles_labels()
        handles, names = handles + lines, names + labels
    figure.legend(
        handles, names, loc="outside upper center", ncols=len(names), fontsize=SMALL, frameon=False,
        columnspacing=1.2, handletextpad=0.4,
    )  # fmt: skip
    return figure


def _most_frequent(spaces: Sequence[NeckSpace]) -> list[int]:
    labels, counts = np.unique(np.concatenate([s.labels for s in spaces]), return_counts=True)
    return sorted(labels[np.argsort(-counts, kind="stable")][: len(PALETTE)].tolist())


def _scatter(
    axes: Axes, space: NeckSpace, title: str, shown: Sequence[int], classes: Sequence[str]
) -> None:
    """Plot two discriminants; if there is only one, the y axis separates the classes."""
    x = space.projections[:, 0]
    single = space.projections.shape[1] == 1
    classes_y = np.searchsorted(np.unique(space.labels), space.labels)
    y = classes_y if single else space.projections[:, 1]
    rest = ~np.isin(space.labels, shown)
    axes.scatter(x[rest], y[rest], s=4, c="#D0D0D0", linewidths=0)
    for order, label in enumerate(shown):
        own = space.labels == label
        axes.scatter(
            x[own], y[own], s=9, c=PALETTE[order], marker=MARKERS[order],
            edgecolors="black", linewidths=0.2, alpha=0.8, label=classes[label],
        )  # fmt: skip
    values = ", ".join(
        f"{value:.2g}" for value in space.eigenvalues[: space.projections.shape[1]][:2]
    )
    axes.set_title(f"{title}\nscale {space.scale}, $\\lambda$ = {values}", fontsize=FONT)
    axes.set_xlabel("first discriminant\n(std. within classes)", fontsize=FONT)
    axes.set_ylabel("class" if single else "second discriminant", fontsize=FONT)
    if single:
        axes.set_yticks([])
    tidy(axes)


def _share_limits(one: Axes, other: Axes) -> None:
    for get, set_ in (("get_xlim", "set_xlim"), ("get_ylim", "set_ylim")):
        both = [getattr(axes, get)() for axes in (one, other)]
        for axes in (one, other):
            getattr(axes, set_)(min(low for low, _ in both), max(high for _, high in both))


def _lines(
    eigenvalues: Axes, ratio: Axes, activity: Axes, space: NeckSpace, style: dict[str, Any]
) -> None:
    order = np.argsort(-space.ratio, kind="stable")
    index = np.arange(1, len(order) + 1)
    for axes, values in ((eigenvalues, space.eigenvalues), (ratio, space.ratio[order])):
        axes.plot(index, np.where(values > LEAST * values.max(), values, np.nan), **style)
        axes.set_yscale("log")
    dots: dict[str, Any] = {**style, "linestyle": "none"}
    activity.plot(index, space.activity[order], **dots)


def _label_axes(panels: dict[str, Axes], spaces: Sequence[NeckSpace]) -> None:
    labels = {
        "e": ("discriminant", "eigenvalue"),
        "r": ("channel, by ratio", "ratio $S_b/S_w$ of channel"),
        "a": ("channel, by ratio", "activity (std.)"),
    }
    for key, (x, y) in labels.items():
        panels[key].set_xlabel(x, fontsize=FONT)
        panels[key].set_ylabel(y, fontsize=FONT)
        panels[key].xaxis.set_major_locator(MaxNLocator(5, integer=True))
        tidy(panels[key])
    panels["a"].set_ylim(0, None)
    count, channels = spaces[0].max_discriminants, min(len(s.eigenvalues) for s in spaces)
    if count < channels:
        panels["e"].axvline(count + 0.5, color="black", linewidth=0.6, linestyle=":")
        panels["e"].annotate(
            "#classes $-$ 1", (count + 0.5, 1), (3, -2), xycoords=("data", "axes fraction"),
            textcoords="offset points", va="top", fontsize=SMALL,
        )  # fmt: skip
