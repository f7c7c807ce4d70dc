"""Where detectors look, the paper's Fig. 4: heat maps of several detectors on the same images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke

from ldt.figures.style import FONT, PAGE_CM, SMALL, new_figure

COLOURS = "inferno"  # even in brightness, unlike the rainbow that such maps often have
OPACITY = 0.6


@dataclass(frozen=True, eq=False)
class Looked:
    """What a detector looked at in an image.

    Attributes:
        heat: [h, w] in [0, 1], at any resolution.
        corners: [k, 4] the detections that it is of, (x1, y1, x2, y2) in pixels of the image.
    """

    heat: np.ndarray
    corners: np.ndarray


@dataclass(frozen=True, eq=False)
class View:
    """An image and what each detector looked at.

    Attributes:
        pixels: [h, w, 3] uint8, RGB, at any resolution.
        size: (height, width) of the image in pixels, which corners refer to.
        truth: [n, 4] corners of the annotated objects.
        looked: an entry for each detector.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    truth: np.ndarray
    looked: Sequence[Looked]


def draw_attention(views: Sequence[View], titles: Sequence[str]) -> Figure:
    """A row for each image: the image with its objects, then each detector's heat map.

    Args:
        views: the images; all have ``len(titles)`` entries in ``looked``.
        titles: one for each detector.

    Returns:
        A figure as wide as a page. White frames are annotated objects and, on the heat maps, the
        detections whose class scores were traced.

    Raises:
        ValueError: there is no image, or one with more or fewer detectors than titles.
    """
    if not views or any(len(view.looked) != len(titles) for view in views):
        raise ValueError(
            f"{len(views)} images seen by {[len(view.looked) for view in views]} detectors, "
            f"{len(titles)} titles; give at least one image and one title a detector"
        )
    columns = 1 + len(titles)
    shapes = [view.size[0] / view.size[1] for view in views]
    figure = new_figure(PAGE_CM, (PAGE_CM - 1.5) / columns * sum(shapes) + 1.3)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)  # type: ignore
    grid = figure.subplots(len(views), columns, squeeze=False, height_ratios=shapes)
    image: Any = None
    for row, view in zip(grid, views, strict=True):
        _show(row[0], view, view.truth)
        for axes, looked in zip(row[1:], view.looked, strict=True):
            _show(axes, view, looked.corners)
            image = axes.imshow(
                looked.heat, extent=_extent(view), cmap=COLOURS, vmin=0, vmax=1, alpha=OPACITY,
                interpolation="bilinear",
            )  # fmt: skip
    for axes, title in zip(grid[0], ("image and objects", *titles), strict=True):
        axes.set_title(title, fontsize=SMALL, pad=2)
    bar: Any = figure.colorbar(image, ax=grid, ticks=[0, 1], aspect=30, pad=0.01)
    bar.ax.tick_params(labelsize=SMALL, width=0.6, length=2.5)
    bar.solids.set_alpha(1)
    bar.set_label("attention (relative)", fontsize=FONT)
    return figure


def _extent(view: View) -> tuple[float, float, float, float]:
    return (0, view.size[1], view.size[0], 0)


def _show(axes: Any, view: View, corners: np.ndarray) -> None:
    axes.imshow(view.pixels, extent=_extent(view), interpolation="bilinear")
    axes.set_axis_off()
    for x1, y1, x2, y2 in corners.tolist():
        frame = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="white", linewidth=0.7)
        frame.set_path_effects([Stroke(linewidth=1.3, foreground="#404040"), Normal()])
        axes.add_patch(frame)
