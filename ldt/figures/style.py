"""What all figures share: sizes for print, colours, and how a file is written."""

from pathlib import Path

from matplotlib.figure import Figure

COLUMN_CM = 8.0  # width of a printed column
FONT, SMALL = 7.0, 6.0  # points, at that width
DARK, LIGHT, GREY = "#0B4F79", "#C5D9E6", "#6E6E6E"
DPI = 400

# Okabe and Ito's colours, told apart by colour-blind readers; those that stand out best on
# photographs come first, black and dark blue are left out.
PALETTE = ("#E69F00", "#56B4E9", "#E67FB8", "#F0E442", "#00B07A", "#D55E00")


def new_figure(width_cm: float, height_cm: float) -> Figure:
    """An empty figure of a printed size; it belongs to no window and to no global state."""
    return Figure(figsize=(width_cm / 2.54, height_cm / 2.54), dpi=DPI, layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as an image; the suffix chooses the format, the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
