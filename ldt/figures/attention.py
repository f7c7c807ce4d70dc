"""Draw attention heat maps of several detectors on the same images (Fig. 4 of the paper)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke

from ldt.figures.style import FONT, PAGE_CM, SMALL, frame, new_figure, show_image, tighten

COLOURS = "inferno"  # perceptually uniform, unlike the rainbow of many heat maps
OPACITY = 0.6


@dataclass(frozen=True, eq=False)
class Attention:
    """A detector's attention in an image.

    Attributes:
        heat: [h, w] in [0, 1], at any resolution.
        corners: [k, 4] the explained detections, (x1, y1, x2, y2) in pixels of the image.
    """

    heat: np.ndarray
    corners: np.ndarray


@dataclass(frozen=True, eq=False)
class View:
    """An image with the attention of each detector.

    Attributes:
        pixels: [h, w, 3] uint8, RGB, at any resolution.
        size: (height, width) of the image in the pixels of all corners.
        truth: [n, 4] corners of the ground truth.
        attention: one entry per detector.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    truth: np.ndarray
    attention: Sequence[Attention]


def draw_attention(views: Sequence[View], titles: Sequence[str]) -> Figure:
    """Draw a row per image: the image with its ground truth, then each detector's heat map.

    Args:
        views: the images, each with ``len(titles)`` entries in ``attention``.
        titles: one per detector.

    Returns:
        A figure of page width. White frames are the ground truth and, on the heat maps, the
        detections that are explained.

    Raises:
        ValueError: there is no image, or the number of detectors of one differs from the titles.
    """
    if not views or any(len(view.attention) != len(titles) for view in views):
        raise ValueError(
            f"{len(views)} images with {[len(view.attention) for view in views]} detectors, "
            f"{len(titles)} titles; give at least one image and one title per detector"
        )
    columns = 1 + len(titles)
    shapes = [view.size[0] / view.size[1] for view in views]
    figure = new_figure(PAGE_CM, (PAGE_CM - 1.5) / columns * sum(shapes) + 1.3)
    tighten(figure)
    grid = figure.subplots(len(views), columns, squeeze=False, height_ratios=shapes)
    heatmaps = []
    for row, view in zip(grid, views, strict=True):
        _show(row[0], view, view.truth)
        for axes, attention in zip(row[1:], view.attention, strict=True):
            _show(axes, view, attention.corners)
            shown = {"cmap": COLOURS, "vmin": 0, "vmax": 1, "alpha": OPACITY}
            heatmaps.append(show_image(axes, attention.heat, view.size, **shown))
    for axes, title in zip(grid[0], ("image and objects", *titles), strict=True):
        axes.set_title(title, fontsize=SMALL, pad=2)
    bar = figure.colorbar(heatmaps[-1], ax=grid, ticks=[0, 1], aspect=30, pad=0.01)
    bar.ax.tick_params(labelsize=SMALL, width=0.6, length=2.5)
    assert bar.solids is not None
    bar.solids.set_alpha(1)
    bar.set_label("attention (relative)", fontsize=FONT)
    return figure


def _show(axes: Axes, view: View, corners: np.ndarray) -> None:
    show_image(axes, view.pixels, view.size)
    outline = [Stroke(linewidth=1.3, foreground="#404040"), Normal()]
    for box in corners:
        frame(axes, box, edgecolor="white", linewidth=0.7, path_effects=outline)
