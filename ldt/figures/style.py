"""What all figures share: sizes for print, colours, and how a file is written."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLUMN_CM, PAGE_CM = 8.4, 17.8  # widths of a printed column and of a page of two
FONT, SMALL = 8.0, 7.0  # points, at these widths
DARK, LIGHT, GREY = "#0B4F79", "#C5D9E6", "#6E6E6E"
DPI = 300

# Okabe and Ito's colours, told apart by colour-blind readers; those that stand out best on
# photographs come first, black and dark blue are left out.
PALETTE = ("#E69F00", "#56B4E9", "#E67FB8", "#F0E442", "#00B07A", "#D55E00")
MARKERS = "os^Dv<>Ph"  # shapes, so that colour is never all that tells two things apart


def new_figure(width_cm: float, height_cm: float) -> Figure:
    """An empty figure of a printed size; it belongs to no window and to no global state."""
    return Figure(figsize=(width_cm / 2.54, height_cm / 2.54), dpi=DPI, layout="constrained")


def tidy(axes: Any, *hidden: str) -> None:
    """Small thin ticks, and no frame on the top and the right nor on the sides that are named."""
    axes.tick_params(which="both", labelsize=SMALL, width=0.6, length=2.5)
    for side in ("top", "right", *hidden):
        axes.spines[side].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as an image; the suffix chooses the format, the folder is made.

    Raises:
        ValueError: matplotlib writes no such format.
    """
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise ValueError(
            f"{path}: no format {path.suffix!r}; choose from .{', .'.join(sorted(known))}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
