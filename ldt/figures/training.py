"""Plot a run's losses and metrics over its epochs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ldt.figures.look import DARK, GREY, LABELS, LIGHT
from ldt.figures.style import FONT, PAGE_CM, SMALL, new_figure, tidy

if TYPE_CHECKING:
    import pandas as pd

COLUMNS, PANEL_CM = 4, 3.6
TOTAL = "train/loss"
SMOOTHED = 20  # points of a curve of losses that are averaged into one of the darker line


def draw_training(log: "pd.DataFrame", metrics: Sequence[str]) -> Figure:
    """Plot each training loss and each metric of the validations, with a line at every cut.

    Args:
        log: training log by optimizer step, see :attr:`ldt.runs.run.Run.log`.
        metrics: names of the validation metrics to show; those without a finite value are omitted.

    Returns:
        A figure of page width, a panel for each quantity; the total loss comes first.

    Raises:
        ValueError: there is neither a loss nor a metric in the log, or no epoch.
    """
    finite = {str(name): np.isfinite(log[name].to_numpy(float)) for name in log}
    known = [name for name, there in finite.items() if there.any()]
    names = sorted(name for name in known if name.startswith(TOTAL))
    names += [f"val/{name}" for name in metrics if f"val/{name}" in known]
    if not names:
        raise ValueError("the log has no loss (train/loss...) and no metric (val/...)")
    if "epoch" not in log or not np.isfinite(log["epoch"]).any():
        raise ValueError("the log does not say which epoch a step is of")
    per_epoch = _steps_per_epoch(log)
    epochs, cuts = (log.index.to_numpy(float) + 1) / per_epoch, _cuts(log, per_epoch)
    rows = -(-len(names) // COLUMNS)
    figure = new_figure(PAGE_CM, rows * PANEL_CM + 0.6)
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes, name in zip(grid.ravel(), names, strict=False):
        _plot(axes, epochs[finite[name]], log[name].to_numpy()[finite[name]], name)
        for cut in cuts:
            axes.axvline(cut, color=GREY, linestyle="--", linewidth=0.8, zorder=0)
    for axes in grid.ravel()[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel("epoch (dashed: a cut)" if cuts else "epoch", fontsize=FONT)
    return figure


def _steps_per_epoch(log: "pd.DataFrame") -> float:
    """Return the optimizer steps of an epoch, which validations end."""
    steps, epochs = log.index.to_numpy(float), log["epoch"].to_numpy(float)
    ends = log.filter(regex="^val/").notna().any(axis=1).to_numpy() & np.isfinite(epochs)
    if not ends.any():  # the first epoch is not over, or none is validated
        ends = np.isfinite(epochs)
    last = np.flatnonzero(ends)[-1]
    return float((steps[last] + 1) / (epochs[last] + 1))


def _cuts(log: "pd.DataFrame", per_epoch: float) -> list[float]:
    """Return the epochs after which channels were removed: ends of rounds but the last."""
    if "round/round" not in log:
        return []
    steps = log.index[log["round/round"].notna()].to_numpy(float)  # rounds end before this step
    return list(map(float, steps[:-1] / per_epoch))


def _plot(axes: Axes, epochs: np.ndarray, values: np.ndarray, name: str) -> None:
    key = name.split("/", 1)[1]
    if name.startswith("val/"):
        axes.plot(epochs, values, "o-", color=DARK, markersize=2, linewidth=1.0)
        axes.set_ylim(0, 1.1 * float(np.max(values)) or 1)
    else:
        axes.plot(epochs, values, color=LIGHT, linewidth=0.8)
        axes.plot(epochs, _smooth(values), color=DARK, linewidth=1.0)
        axes.set_ylim(*_range(values))
    axes.set_title(LABELS.get(key, key), fontsize=SMALL)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    tidy(axes)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the mean over a window around each value."""
    width = max(1, min(SMOOTHED, len(values) // 4))
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _range(values: np.ndarray) -> tuple[float, float]:
    """Return limits that a few enormous losses at the start do not set."""
    high = float(np.nanquantile(values, 0.98)) if len(values) > SMOOTHED else float(np.max(values))
    low = min(0.0, float(np.nanmin(values)))
    return low, 1.1 * high if high > low else low + 1
