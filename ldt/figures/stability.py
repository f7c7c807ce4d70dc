"""How far batches agree on the channels' utility, the paper's Fig. 6."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ldt.evaluation.score_stability import StageScores
from ldt.figures.style import FONT, PAGE_CM, SMALL, new_figure, tidy

ACROSS = 3
LETTERS = 28  # of a layer's name in a line
PANEL_CM = 3.6
COLOURS = "cividis"  # even in brightness, and alike for all kinds of colour vision


def draw_stability(stages: Sequence[StageScores]) -> Figure:
    """A heat map for each stage: batches down, channels across, the most useful first.

    Colour is the square root of the utility as a share of the largest in its panel, for utilities
    differ by orders of magnitude; equal columns mean that batches agree.

    Returns:
        A figure as wide as a page, three panels in a row.

    Raises:
        ValueError: there is no stage, or one with fewer than two batches.
    """
    if not stages or any(len(stage.utilities) < 2 for stage in stages):
        raise ValueError(
            f"{[len(s.utilities) for s in stages]} batches of {len(stages)} stages; give at least "
            "one stage, and two batches to compare (more images, or smaller batches)"
        )
    rows = -(-len(stages) // ACROSS)
    most = max(_wrapped(stage.name).count("\n") for stage in stages)
    figure = new_figure(PAGE_CM, rows * (PANEL_CM + 0.3 * most) + 0.8)
    grid = figure.subplots(rows, ACROSS, squeeze=False)
    image: Any = None
    for axes, stage in zip(grid.ravel(), stages, strict=False):
        order = np.argsort(-stage.utilities.mean(0), kind="stable")
        values = np.sqrt(stage.utilities[:, order] / max(stage.utilities.max(), 1e-300))
        image = axes.imshow(
            values, aspect="auto", cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest",
            extent=(0.5, values.shape[1] + 0.5, values.shape[0] + 0.5, 0.5),
        )  # fmt: skip
        title = f"{_wrapped(stage.name)}\n$\\rho$ = {stage.correlation:.3f}"
        axes.set_title(title, fontsize=SMALL)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        tidy(axes, "left", "bottom")
    for axes in grid.ravel()[len(stages) :]:
        axes.set_axis_off()
    figure.supxlabel("channel, by mean utility", fontsize=FONT)
    figure.supylabel("batch", fontsize=FONT)
    bar: Any = figure.colorbar(image, ax=grid, ticks=[0, 0.5, 1], aspect=30, pad=0.02)
    bar.ax.set_yticklabels(["0", "1/4", "1"])
    bar.ax.tick_params(labelsize=SMALL, width=0.6, length=2.5)
    bar.set_label("utility (of the panel's largest)", fontsize=FONT)
    return figure


def _wrapped(name: str) -> str:
    """A layer's name in lines that fit above a panel, broken behind its dots."""
    lines = [""]
    for part in name.replace(".", ".\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) > LETTERS:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
