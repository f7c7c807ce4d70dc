"""Interactive figures of one run: scores, kept channels and layer costs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ldt.figures.look import DARK, GREY, LIGHT
from ldt.report.plotly_style import faded, lay_out, text
from ldt.runs.run import Cut, Run

ROW = 17  # pixels of a layer's bar
GONE = "#D55E00"
PARTS = ("#0B4F79", "#56B4E9", "#E69F00", "#009E73", "#CC79A7")
COSTS = {"params": "parameters", "multiply_adds": "multiply-adds"}


def kept_channels(run: Run) -> go.Figure:
    """Draw the channels of each coupled group in the base and after each round.

    Raises:
        ValueError: the run has pruned nothing.
    """
    cuts = _cuts(run)
    names = sorted(cuts[min(cuts)])
    bars = []
    for index, (label, left) in enumerate(_left(cuts).items()):
        shade = LIGHT if index == 0 else faded(DARK, (index / len(cuts)) ** 0.8)
        bars.append((label, [left[name] for name in names], shade))
    return _overlaid(names, bars, "channels", "%{y}: %{x} channels")


def _cuts(run: Run) -> Mapping[int, Mapping[str, Cut]]:
    if not run.cuts:
        raise ValueError(
            f"{run.name} has pruned nothing: there is no scores-<t>.npz in {run.folder}"
        )
    return run.cuts


def _left(cuts: Mapping[int, Mapping[str, Cut]]) -> dict[str, dict[str, int]]:
    """Count the channels of each group before the first and after each round."""
    first = cuts[min(cuts)]
    left = {"base": {name: len(cut.scores) for name, cut in first.items()}}
    for index, groups in cuts.items():
        sizes = {name: len(cut.scores) - len(cut.removed) for name, cut in groups.items()}
        left[f"after round {index}"] = left["base"] | sizes
    return left


def _overlaid(
    names: Sequence[str], bars: Iterable[tuple[str, Any, str]], title: str, told: str
) -> go.Figure:
    """Overlaid bars (label, length per layer, colour) with the hover text ``told``."""
    figure = go.Figure()
    for label, lengths, colour in bars:
        figure.add_bar(
            y=[text(name) for name in names],
            x=lengths,
            name=label,
            orientation="h",
            marker={"color": colour},
            hovertemplate=f"{told}<extra></extra>",
            showlegend=True,
        )
    figure.update_layout(barmode="overlay", bargap=0.25)
    figure.update_xaxes(title_text=title)
    return _of_layers(figure, len(names))


def _of_layers(figure: go.Figure, count: int) -> go.Figure:
    """Apply the layout of figures with one row per layer, the input on top."""
    lay_out(figure, 110 + ROW * count)
    figure.update_yaxes(autorange="reversed", ticks="", showgrid=False, automargin=True)
    return figure


def utilities(run: Run, cut: int = 1) -> go.Figure:
    """Draw the channel scores of a round by group, divided by the group's mean.

    Args:
        run: a run with ``scores-<cut>.npz``.
        cut: the pruning round.

    Raises:
        ValueError: the run has not pruned in this round.
    """
    cuts = _cuts(run)
    if cut not in cuts:
        raise ValueError(
            f"{run.name} has not pruned in round {cut}; its pruning rounds are {list(cuts)}"
        )
    kept, gone = [], []
    for name, (scores, removed) in sorted(cuts[cut].items()):
        relative = scores / (np.abs(scores).mean() or 1.0)
        dropped = np.isin(np.arange(len(scores)), removed)
        kept += [(text(name), value) for value in relative[~dropped]]
        gone += [(text(name), value) for value in relative[dropped]]
    figure = go.Figure()
    for label, points, colour in (("kept", kept, DARK), ("removed", gone, GONE)):
        figure.add_scatter(
            x=[value for _, value in points],
            y=[name for name, _ in points],
            mode="markers",
            marker={"symbol": "line-ns", "size": 10, "line": {"color": colour, "width": 1.2}},
            name=label,
            hovertemplate="%{y}: %{x:.3g}<extra></extra>",
            showlegend=True,
        )
    positive = all(value > 0 for _, value in kept + gone)
    scale = "log" if positive else "linear"  # some criteria give negative scores
    figure.update_xaxes(title_text="score (1: the mean of its group)", type=scale)
    return _of_layers(figure, len(cuts[cut]))


def layer_channels(run: Run) -> go.Figure:
    """Output channels of each layer before pruning and after the last round.

    Raises:
        FileNotFoundError: there is no ``structure.json``.
    """
    return _before_after(run, "out", "output channels")


def layer_costs(run: Run, cost: str = "params") -> go.Figure:
    """``params`` or ``multiply_adds`` of each layer before pruning and after the last round."""
    return _before_after(run, cost, COSTS[cost])


def _before_after(run: Run, key: str, title: str) -> go.Figure:
    rounds: Any = run.layers[key].unstack("round", sort=False)
    rounds = rounds[rounds.iloc[:, 0] > 0]
    if key != "out":
        rounds = rounds[run.layers.loc[rounds.columns[0], "out"].reindex(rounds.index) > 0]
    ends = {"before": (rounds.columns[0], LIGHT), "after": (rounds.columns[-1], DARK)}
    bars = [(label, rounds[index], colour) for label, (index, colour) in ends.items()]
    return _overlaid(list(rounds.index), bars, title, "%{y}: %{x:,}")


def parts(run: Run) -> pd.DataFrame:
    """Parameters and multiply-adds of each part of the network, before and after.

    Returns:
        One row per part and one for the ``whole``; columns (cost, ``before`` | ``after`` |
        ``removed``), the last one as a share.

    Raises:
        FileNotFoundError: there is no ``structure.json``.
    """
    rounds = run.layers.index.get_level_values("round")
    found = {}
    for cost in COSTS:
        costs: Any = run.layers.groupby(["part", "round"], sort=False)[cost].sum()
        sums = costs.unstack("round")
        sums.loc["whole"] = sums.sum()
        before, after = sums[rounds.min()], sums[rounds.max()]
        found |= {
            (COSTS[cost], "before"): before.astype(int),
            (COSTS[cost], "after"): after.astype(int),
            (COSTS[cost], "removed"): 1 - after / before,
        }
    return pd.DataFrame(found)


def part_costs(runs: Sequence[Run], cost: str = "params") -> go.Figure:
    """Draw the remaining cost of each network part, one bar per run after the unpruned network.

    Args:
        runs: pruned versions of one network.
        cost: ``params`` or ``multiply_adds``.

    Raises:
        ValueError: there are no runs.
        FileNotFoundError: a run has no ``structure.json``.
    """
    if not runs:
        raise ValueError("no runs to draw; give pruned versions of one network")
    title = COSTS[cost]
    tables = {text(run.row.get("method", run.name), run.name): parts(run)[title] for run in runs}
    first = next(iter(tables.values()))
    bars = {"unpruned": first["before"], **{name: table["after"] for name, table in tables.items()}}
    figure = go.Figure()
    for part, colour in zip(first.index.drop("whole"), PARTS * len(first), strict=False):
        figure.add_bar(
            y=list(bars),
            x=[values[part] for values in bars.values()],
            name=text(part),
            orientation="h",
            marker={"color": colour, "line": {"color": GREY, "width": 0}},
            hovertemplate="%{x:,}",
            showlegend=True,
        )
    figure.update_layout(barmode="stack", bargap=0.35)
    figure.update_xaxes(title_text=title)
    return _of_layers(figure, 3 * len(bars))
