"""Interactive figures comparing the cells of a study."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import ceil, isnan
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ldt.figures.look import GREY, LABELS
from ldt.report.plotly_style import Look, band, lay_out, line, looks, text
from ldt.report.tables import SIZES, Column, percent
from ldt.runs.aggregate import Cell
from ldt.runs.run import Run

MOST_POINTS = 200  # maximum points of a training curve; longer ones are averaged in blocks
PANEL_POINTS = 20_000  # of all training curves of a panel, if they keep LEAST_POINTS
MOST_PANELS = 60  # of a figure of the training; the first ones by name
LEAST_POINTS = 20
NO_DEVIATION = 0.0


class Mean(NamedTuple):
    """A point of a line: means over seeds, the metric's deviation, and its hover text."""

    x: float
    y: float
    deviation: float
    told: str


def trade_off(found: Sequence[Cell]) -> go.Figure:
    """Draw the headline metric over parameters, multiply-adds and latency, one panel each.

    Dots are the rounds of all runs; lines connect the means of a label's last rounds from the base
    to the highest rate, with bands of one standard deviation over seeds. Dashed lines are unpruned
    detectors; circles and a grey line mark the Pareto front of all dots.

    Args:
        found: cells of one data set and detector.

    Raises:
        ValueError: there are no cells.
    """
    metric = _metric(found)
    sizes = [column for column in SIZES if any(_has(run, column.key) for run in _runs(found))]
    figure = make_subplots(cols=len(sizes), shared_yaxes=True, horizontal_spacing=0.03)
    style = looks(cell.label for cell in found if cell.pruned)
    for place, column in enumerate(sizes, 1):
        figure.update_xaxes(title_text=column.title, rangemode="tozero", col=place)
        dots = _dots(found, column)
        traces = [
            *(t for label in style for t in _method(found, dots, label, column, style[label])),
            *_unpruned(found, dots["x"].max()),
            *_front(dots),
        ]
        for trace in traces:
            trace.showlegend = trace.showlegend is not False and place == 1
            figure.add_trace(trace, row=1, col=place)
    figure.update_yaxes(title_text=LABELS.get(metric, metric), col=1)
    return lay_out(figure, 430)


def _metric(found: Sequence[Cell]) -> str:
    if not found:
        raise ValueError("no finished run to draw; give the cells of a study that has some")
    return found[0].metric


def _runs(found: Iterable[Cell]) -> list[Run]:
    return [run for cell in found for run in cell.runs]


def _has(run: Run, key: str) -> bool:
    return not all(isnan(row.get(key, np.nan)) for row in run.rows)


def _dots(found: Iterable[Cell], column: Column) -> pd.DataFrame:
    """Every measured round: ``label``, ``x``, ``y`` and hover text."""
    rows = [
        (cell.label, row[column.key] * column.scale, row[cell.metric], _told(cell, run, row))
        for cell in found
        for run in cell.runs
        for row in run.summary["rounds"]
        if column.key in row and cell.metric in row
    ]
    return pd.DataFrame(rows, columns=["label", "x", "y", "told"]).dropna()


def _told(cell: Cell, run: Run, row: Mapping[str, Any]) -> str:
    stage = "base" if row["round"] == 0 else f"round {row['round']}"
    numbers = f"{cell.metric} {row[cell.metric]:.3f}, {row['params'] / 1e6:.3f} M parameters"
    return text(cell.label, run.name, f"{stage}, seed {run.row['seed']}", numbers)


def _method(
    found: Sequence[Cell], dots: pd.DataFrame, label: str, column: Column, look: Look
) -> Iterable[go.Scatter]:
    own = [cell for cell in found if cell.label == label]
    dots = dots.loc[dots["label"] == label]
    if dots.empty:
        return
    group: dict[str, Any] = {"legendgroup": label, "name": text(label)}
    yield go.Scatter(
        x=dots["x"],
        y=dots["y"],
        mode="markers",
        marker={"color": look.colour, "symbol": look.symbol, "size": 6, "opacity": 0.35},
        text=dots["told"],
        hoverinfo="text",
        showlegend=False,
        **group,
    )
    points = sorted([_mean(own, column, 0), *(_mean([cell], column, -1) for cell in own)])
    x, y = [point.x for point in points], [point.y for point in points]
    low = [point.y - point.deviation for point in points]
    high = [point.y + point.deviation for point in points]
    yield band(x, low, high, look.colour).update(**group)
    told = [point.told for point in points]
    yield line(x, y, look, text=told, hoverinfo="text", **group)


def _mean(own: Sequence[Cell], column: Column, index: int) -> Mean:
    """One round of a label's runs, averaged over seeds; equal seeds count once."""
    rows = [
        {
            "seed": run.row["seed"],
            "x": row.get(column.key, np.nan) * column.scale,
            "y": row.get(cell.metric, np.nan),
        }
        for cell in own
        for run in cell.runs
        for row in [run.summary["rounds"][index]]
    ]
    seeds: Any = pd.DataFrame(rows).groupby("seed").mean()
    mean, deviation = seeds.mean(), _zero(seeds["y"].std())
    stage = "base" if index == 0 else f"{percent(own[0].rate)} removed"
    spread = f" ± {deviation:.3f}" if len(seeds) > 1 else ""
    told = text(
        own[0].label,
        f"{stage}, {len(seeds)} seed{'s' * (len(seeds) > 1)}",
        f"{own[0].metric} {mean['y']:.3f}{spread}, {column.title} {mean['x']:.3f}",
    )
    return Mean(mean["x"], mean["y"], deviation, told)


def _zero(deviation: float) -> float:
    return NO_DEVIATION if isnan(deviation) else deviation


def _unpruned(found: Sequence[Cell], right: float) -> Iterable[go.Scatter]:
    """Dashed lines up to ``right`` at the mean of the bases, with and without LDT's losses."""
    kinds: dict[str, dict[int, float]] = defaultdict(dict)
    for cell in found:
        for run in cell.runs:
            name = "unpruned, LDT losses" if run.summary.get("ldt") else "unpruned"
            kinds[name][run.row["seed"]] = run.row.get(f"base_{cell.metric}", np.nan)
    for (name, values), dash in zip(sorted(kinds.items()), ("dash", "dot"), strict=False):
        mean = float(np.mean(list(values.values())))
        yield go.Scatter(
            x=[0, right],
            y=[mean, mean],
            mode="lines",
            line={"color": GREY, "width": 1.2, "dash": dash},
            name=name,
            legendgroup=name,
            hovertemplate=f"{name}: {mean:.3f}<extra></extra>",
        )


def pareto(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Find the Pareto front: the points for which no other point has lower x and higher y.

    A point with equal x and higher y, or lower x and equal y, dominates as well. Of equal points
    the first is kept.

    Returns:
        Indices sorted by x.
    """
    front: list[int] = []
    best = -np.inf
    for index in sorted(range(len(x)), key=lambda i: (x[i], -y[i])):
        if y[index] > best:
            front.append(index)
            best = y[index]
    return front


def _front(dots: pd.DataFrame) -> Iterable[go.Scatter]:
    best = dots.iloc[pareto(dots["x"].tolist(), dots["y"].tolist())]
    yield go.Scatter(
        x=best["x"],
        y=best["y"],
        mode="lines+markers",
        line={"color": "#9AA7B1", "width": 1.2, "shape": "hv"},
        marker={"color": "#22303C", "symbol": "circle-open", "size": 12, "line": {"width": 1.3}},
        name="Pareto front",
        legendgroup="Pareto front",
        hoverinfo="skip",
    )


# Rounds -------------------------------------------------------------------------------------


def by_round(found: Sequence[Cell]) -> go.Figure:
    """Draw the headline metric, parameters, multiply-adds and latency after each round.

    Lines are means over seeds with bands of one standard deviation, for the pruned cells of one
    data set and detector.

    Raises:
        ValueError: there are no cells.
    """
    metric = _metric(found)
    shown = [Column(metric, LABELS.get(metric, metric), 3), *SIZES]
    shown = [column for column in shown if any(_has(run, column.key) for run in _runs(found))]
    figure = make_subplots(
        cols=len(shown), subplot_titles=[c.title for c in shown], horizontal_spacing=0.05
    )
    pruned = [cell for cell in found if cell.pruned]
    style = looks(cell.label for cell in pruned)
    several = len({cell.rate for cell in pruned}) > 1
    for cell in pruned:
        name = f"{cell.label}, {percent(cell.rate)} removed" if several else cell.label
        for place, column in enumerate(shown, 1):
            for trace in _over_rounds(cell, column, style[cell.label]):
                trace.update(name=text(name), legendgroup=name)
                trace.showlegend = trace.showlegend is not False and place == 1
                figure.add_trace(trace, row=1, col=place)
    figure.update_xaxes(title_text="round", dtick=1)
    return lay_out(figure, 340)


def _over_rounds(cell: Cell, column: Column, look: Look) -> Iterable[go.Scatter]:
    rows = [
        (row["round"], run.row["seed"], row.get(column.key, np.nan) * column.scale)
        for run in cell.runs
        for row in run.rows
    ]
    if all(isnan(value) for _, _, value in rows):
        return
    values: Any = pd.DataFrame(rows, columns=["round", "seed", "value"])
    seeds = values.groupby(["round", "seed"])["value"].mean()
    rounds = seeds.groupby(level="round")
    mean, deviation = rounds.mean(), rounds.std().fillna(NO_DEVIATION)
    x = mean.index.tolist()
    yield band(x, (mean - deviation).tolist(), (mean + deviation).tolist(), look.colour)
    yield line(x, mean.tolist(), look, hovertemplate="round %{x}: %{y:.3f}")


# Training -----------------------------------------------------------------------------------


def training(found: Sequence[Cell], prefix: str = "train/loss") -> go.Figure:
    """Plot logged quantities over training steps: a panel per quantity, a line per run.

    The lines of a label are one trace, with gaps between the runs.

    Args:
        found: cells whose runs are shown; runs without a log are skipped.
        prefix: prefix of the logged names, e.g. ``train/eigenvalue``.

    Raises:
        ValueError: no run has logged such a quantity.
    """
    logged = {name for run in _runs(found) for name in run.log if name.startswith(prefix)}
    names = sorted(logged)[:MOST_PANELS]
    if not names:
        raise ValueError(f"no run has logged {prefix}*; see logs/metrics.csv for the logged names")
    wide = min(3, len(names))
    titles = [text(name.removeprefix("train/")) for name in names]
    rows = ceil(len(names) / wide)
    figure = make_subplots(
        rows=rows,
        cols=wide,
        subplot_titles=titles,
        horizontal_spacing=0.05,
        vertical_spacing=0.25 / rows,
    )
    labelled: dict[str, list[Run]] = defaultdict(list)
    for cell in found:
        labelled[cell.label] += cell.runs
    most = max(LEAST_POINTS, min(MOST_POINTS, PANEL_POINTS // len(_runs(found))))
    style = looks(labelled)
    told: set[str] = set()
    for label, runs in labelled.items():
        for index, name in enumerate(names):
            curves = {run.name: thinned(run.log[name], most) for run in runs if name in run.log}
            if any(map(len, curves.values())):
                trace = _training_line(label, curves, style[label])
                trace.showlegend = label not in told
                told.add(label)
                figure.add_trace(trace, row=index // wide + 1, col=index % wide + 1)
    figure.update_xaxes(title_text="step", row=rows)
    return lay_out(figure, 94 + 220 * rows)


def _training_line(label: str, curves: Mapping[str, pd.Series], look: Look) -> go.Scatter:
    """Join the curves of some runs, by their names, with gaps between them."""
    told = [[text(name)] * len(curve) + [""] for name, curve in curves.items()]
    return go.Scatter(
        x=np.concatenate([np.append(curve.index, np.nan) for curve in curves.values()]),
        y=np.concatenate([np.append(curve, np.nan) for curve in curves.values()]),
        text=[name for names in told for name in names],
        mode="lines",
        line={"color": look.colour, "width": 1.2, "dash": look.dash},
        opacity=0.75,
        name=text(label),
        legendgroup=label,
        hovertemplate="%{text}<br>step %{x}: %{y:.4g}<extra></extra>",
    )


def thinned(curve: pd.Series, most: int = MOST_POINTS) -> pd.Series:
    """Average what was logged in blocks of equal length, at their last step: ``most`` points."""
    there = curve.notna().to_numpy()
    values, steps = curve.to_numpy()[there], curve.index.to_numpy()[there]
    block = max(1, ceil(len(values) / most))
    starts = np.arange(0, len(values), block)
    ends = np.minimum(starts + block, len(values))
    sums = np.add.reduceat(values, starts) if len(values) else values
    return pd.Series(sums / (ends - starts), index=steps[ends - 1])
