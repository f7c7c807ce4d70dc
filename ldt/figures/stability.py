"""Plot the agreement of batches on the channels' utility (Fig. 6 of the paper)."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from ldt.evaluation.score_stability import StageScores
from ldt.figures.style import FONT, PAGE_CM, SMALL, new_figure, tidy

COLUMNS = 3
LINE_LENGTH = 28  # letters of a layer's name per line
PANEL_CM = 3.6
COLOURS = "cividis"  # perceptually uniform, also with colour vision deficiency


def draw_stability(stages: Sequence[StageScores]) -> Figure:
    """Plot a heat map per stage: a row per batch, a column per channel, the most useful first.

    The colour is the square root of the utility relative to the largest in the panel, because
    utilities differ by orders of magnitude. If batches agree, columns have a single colour.

    Returns:
        A figure of page width, with three panels in a row.

    Raises:
        ValueError: there is no stage, or one with fewer than two batches.
    """
    if not stages or any(len(stage.utilities) < 2 for stage in stages):
        raise ValueError(
            f"{[len(s.utilities) for s in stages]} batches of {len(stages)} stages; give at least "
            "one stage, and two batches to compare (more images, or smaller batches)"
        )
    rows = -(-len(stages) // COLUMNS)
    line_breaks = max(wrapped(stage.name).count("\n") for stage in stages)
    figure = new_figure(PAGE_CM, rows * (PANEL_CM + 0.3 * line_breaks) + 0.8)
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    images = [_heatmap(axes, stage) for axes, stage in zip(grid.ravel(), stages, strict=False)]
    for axes in grid.ravel()[len(stages) :]:
        axes.set_axis_off()
    figure.supxlabel("channel, by mean utility", fontsize=FONT)
    figure.supylabel("batch", fontsize=FONT)
    bar = figure.colorbar(images[-1], ax=grid, ticks=[0, 0.5, 1], aspect=30, pad=0.02)
    bar.ax.set_yticklabels(["0", "1/4", "1"])
    bar.ax.tick_params(labelsize=SMALL, width=0.6, length=2.5)
    bar.set_label("utility (of the panel's largest)", fontsize=FONT)
    return figure


def _heatmap(axes: Axes, stage: StageScores) -> AxesImage:
    order = np.argsort(-stage.utilities.mean(0), kind="stable")
    values = np.sqrt(stage.utilities[:, order] / max(stage.utilities.max(), 1e-300))
    image = axes.imshow(
        values, aspect="auto", cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest",
        extent=(0.5, values.shape[1] + 0.5, values.shape[0] + 0.5, 0.5),
    )  # fmt: skip
    title = f"{wrapped(stage.name)}\n$\\rho$ = {stage.correlation:.3f}"
    axes.set_title(title, fontsize=SMALL)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    tidy(axes, "left", "bottom")
    return image


def wrapped(name: str, length: int = LINE_LENGTH) -> str:
    """Break a layer's name after dots into lines that fit above a panel."""
    lines = [""]
    for part in name.replace(".", ".\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) > length:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
