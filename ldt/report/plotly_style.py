"""Shared style of the interactive figures: colours, bands and layout."""

from collections.abc import Iterable, Sequence
from html import escape
from math import ceil
from typing import Any, NamedTuple

import plotly.graph_objects as go

from ldt.figures.look import DARK, GREY

INK, GRID = "#22303C", "#E6EBEF"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# distinguishable for colour-blind readers; dark blue is reserved for LDT
PALETTE = ("#D55E00", "#009E73", "#56B4E9", "#CC79A7", "#B8860B", "#7A5195", "#8C564B", "#5B8C5A")
SYMBOLS = ("square", "diamond", "triangle-up", "cross", "star", "circle", "pentagon", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
OURS = "LDT"
LEGEND_WIDTH, ROW, GAP = (
    1150,
    25,
    25,
)  # pixels of the legend: width, row height, gap between entries


class Look(NamedTuple):
    """Style of a label throughout a report."""

    colour: str
    symbol: str
    dash: str


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """Assign a style to each label; LDT is dark blue, repeated colours get other symbols."""
    others = [label for label in dict.fromkeys(labels) if label != OURS]
    count = len(PALETTE)
    found = {
        label: Look(
            PALETTE[i % count],
            SYMBOLS[(i + i // count) % len(SYMBOLS)],
            DASHES[i // count % len(DASHES)],
        )
        for i, label in enumerate(others)
    }
    return {OURS: Look(DARK, "circle", "solid"), **found}


def faded(colour: str, share: float) -> str:
    """Return a colour given as #rrggbb with an opacity."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share})"


def band(
    x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str
) -> go.Scatter:
    """Draw the area between two lines, without an outline."""
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        fill="toself",
        fillcolor=faded(colour, 0.13),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
    )


def line(x: Sequence[float], y: Sequence[float], look: Look, **more: object) -> go.Scatter:
    """Markers joined by a line."""
    return go.Scatter(
        x=x,
        y=y,
        mode="lines+markers",
        line={"color": look.colour, "width": 2, "dash": look.dash},
        marker={"color": look.colour, "symbol": look.symbol, "size": 8},
        **more,
    )


def text(*parts: str) -> str:
    """Lines of a hover text, escaped because plotly interprets tags."""
    return "<br>".join(escape(part) for part in parts)


def lay_out(figure: go.Figure, height: int) -> go.Figure:
    """Apply the layout: plot height in pixels, white background, legend below the plot."""
    traces: Any = figure.data
    names = [trace.name or "" for trace in traces if trace.showlegend]
    entry = 45 + 6 * max(map(len, names), default=0)  # pixels
    rows = ceil(len(names) / max(1, LEGEND_WIDTH // (entry + GAP)))
    figure.update_layout(
        height=height + ROW * rows,
        template="none",
        paper_bgcolor="white",
        plot_bgcolor="white",
        font={"family": FONT, "size": 12.5, "color": INK},
        margin={"l": 62, "r": 12, "t": 34, "b": 60 + ROW * rows},
        hoverlabel={"font": {"family": FONT, "size": 12}, "align": "left"},
        legend={
            "font": {"size": 11.5},
            "orientation": "h",
            "entrywidth": entry - 40,  # without its line and marker
            "maxheight": ROW * (rows + 1),
            "y": -58 / (height - 94),
            "x": 0,
            "itemsizing": "constant",
        },
    )
    figure.update_annotations(font={"size": 13, "color": INK})
    axes = {"gridcolor": GRID, "zeroline": False, "linecolor": GREY, "ticks": "outside"}
    figure.update_xaxes(**axes, ticklen=4, title_standoff=8)
    figure.update_yaxes(**axes, ticklen=4, title_standoff=8)
    return figure
