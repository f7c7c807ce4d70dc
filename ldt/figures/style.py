"""Shared style of all figures: sizes for print, colours, file output."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axes._secondary_axes import SecondaryAxis
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from ldt.runs.files import writing

COLUMN_CM, PAGE_CM = 8.4, 17.8  # widths of a printed column and of a two-column page
FONT, SMALL = 8.0, 7.0  # points, at these widths
DPI = 300

# Okabe and Ito's palette, which colour-blind readers can distinguish, without black and dark blue;
# the colours with the best contrast on photographs come first.
PALETTE = ("#E69F00", "#56B4E9", "#E67FB8", "#F0E442", "#00B07A", "#D55E00")
MARKERS = "os^Dv<>Ph"  # so that lines differ not only in their colour


def new_figure(width_cm: float, height_cm: float) -> Figure:
    """Create an empty figure of a printed size, independent of pyplot's global state."""
    return Figure(figsize=(width_cm / 2.54, height_cm / 2.54), dpi=DPI, layout="constrained")


def tighten(figure: Figure) -> None:
    """Reduce the padding between the panels of a figure."""
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)


def tidy(axes: Axes | SecondaryAxis, *hidden: str) -> None:
    """Set small thin ticks; hide the top and right spines and those in ``hidden``."""
    axes.tick_params(which="both", labelsize=SMALL, width=0.6, length=2.5)
    for side in ("top", "right", *hidden):
        axes.spines[side].set_visible(False)


def add_top_axis(
    axes: Axes, label: str, convert: Callable[..., Any], invert: Callable[..., Any]
) -> None:
    """Add an x axis at the top, in units of ``convert(x)``."""
    top = axes.secondary_xaxis("top", functions=(convert, invert))
    top.set_xlabel(label, fontsize=FONT)
    tidy(top)
    top.spines["top"].set_visible(True)


def show_image(axes: Axes, pixels: np.ndarray, size: tuple[int, int], **options: Any) -> AxesImage:
    """Show an image or a map [h, w, ...] in pixels of the original, whatever its resolution.

    Args:
        axes: the panel.
        pixels: the image.
        size: (height, width) of the original.
        options: of ``Axes.imshow``.
    """
    axes.set_axis_off()
    extent = (0, size[1], size[0], 0)
    return axes.imshow(pixels, extent=extent, interpolation="bilinear", **options)


def frame(axes: Axes, corners: np.ndarray, **style: Any) -> None:
    """Draw the frame of a box, (x1, y1, x2, y2)."""
    x1, y1, x2, y2 = corners.tolist()
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))


def check_format(path: Path, also: Sequence[str] = ()) -> None:
    """Check that figures can be saved in the format of the path's suffix.

    Args:
        path: the file.
        also: formats in addition to matplotlib's, without the dot.

    Raises:
        ValueError: they cannot.
    """
    supported = {*FigureCanvasBase.get_supported_filetypes(), *also}
    if path.suffix.removeprefix(".") not in supported:
        raise ValueError(
            f"{path}: no format {path.suffix!r}; choose from .{', .'.join(sorted(supported))}"
        )


def save(figure: Figure, path: Path) -> None:
    """Save a figure in the format of the path's suffix; create the folder if it is missing.

    Raises:
        ValueError: see :func:`check_format`.
    """
    check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as draft:
        figure.savefig(draft, dpi=DPI)
