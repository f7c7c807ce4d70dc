"""Plot and animate the number of channels per layer over the rounds of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from ldt.evaluation.layers import stages
from ldt.figures.look import DARK, LIGHT
from ldt.figures.style import COLUMN_CM, FONT, SMALL, new_figure, tidy
from ldt.runs.files import writing

Network = Mapping[str, int]  # output channels by layer, in network order
MAX_PANELS = 6  # with more rounds, some between the first and the last are omitted
PANEL_CM, NAMES_CM = 1.6, 2.2
STEPS = 12  # frames from one round to the next
PAUSE = 10  # frames that show the same round
FRAMES_PER_SECOND = 12
SCREEN_DPI = 150  # of an animation, which is not printed


def draw_shrinking(networks: Sequence[Network], names: Sequence[str]) -> Figure:
    """Plot the channels of every layer, with a panel per round and the unpruned network behind it.

    Args:
        networks: the unpruned network, then that of each round.
        names: label of each network, next to its panel.

    Returns:
        A figure of column width with at most six panels, evenly selected.

    Raises:
        ValueError: there is no network, the number of names differs, or the layers differ.
    """
    _check(networks, names)
    count = min(len(networks), MAX_PANELS)
    shown = [round(i * (len(networks) - 1) / max(count - 1, 1)) for i in range(count)]
    figure = new_figure(COLUMN_CM, count * PANEL_CM + NAMES_CM)
    panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for axes, index in zip(panels, shown, strict=True):
        _panel(axes, networks[0], networks[index], names[index])
    _name_stages(panels[-1], networks[0])
    figure.supylabel("output channels", fontsize=FONT)
    return figure


def animate_shrinking(networks: Sequence[Network], names: Sequence[str], path: Path) -> None:
    """Save the panels of :func:`draw_shrinking` as a GIF that pauses at every round.

    The channels are interpolated linearly between two rounds.

    Raises:
        ValueError: as in :func:`draw_shrinking`.
    """
    _check(networks, names)
    figure = new_figure(COLUMN_CM, 2 * PANEL_CM + NAMES_CM)
    axes = figure.add_subplot()
    bars, text = _panel(axes, networks[0], networks[0], max(names, key=len))
    _name_stages(axes, networks[0])
    axes.set_ylabel("output channels", fontsize=FONT)
    frames = _frames(networks)

    def show(frame: tuple[int, np.ndarray]) -> list[Artist]:
        for bar, height in zip(bars, frame[1], strict=True):
            bar.set_height(height)
        text.set_text(names[frame[0]])
        return [*bars, text]

    animation = FuncAnimation(figure, show, frames, cache_frame_data=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as draft:
        animation.save(draft, PillowWriter(fps=FRAMES_PER_SECOND), dpi=SCREEN_DPI)


def _frames(networks: Sequence[Network]) -> list[tuple[int, np.ndarray]]:
    """Return (index of the labelled round, width of every layer) for each frame."""
    widths = [np.array(list(network.values()), dtype=float) for network in networks]
    frames = [(0, widths[0])] * PAUSE
    for index in range(1, len(widths)):
        old, new = widths[index - 1], widths[index]
        frames += [(index - 1, old + (new - old) * step / STEPS) for step in range(1, STEPS)]
        frames += [(index, new)] * PAUSE
    return frames + [frames[-1]] * PAUSE  # before the animation repeats


def _check(networks: Sequence[Network], names: Sequence[str]) -> None:
    if not networks or len(names) != len(networks):
        raise ValueError(
            f"{len(networks)} networks with {len(names)} names; give at least one, each with a name"
        )
    if not networks[0] or any(list(n) != list(networks[0]) for n in networks):
        raise ValueError("the networks' layers differ; give the rounds of one run")


def _panel(
    axes: Axes, original: Network, kept: Network, name: str
) -> tuple[BarContainer, Annotation]:
    """Draw two bars per layer and the name on the right; return the dark bars and the text."""
    places = [place for stage in stages(list(original)) for place in stage.places]
    axes.bar(places, list(original.values()), width=0.9, color=LIGHT)
    bars = axes.bar(places, list(kept.values()), width=0.9, color=DARK)
    axes.set_ylim(0, 1.05 * max(original.values()))
    axes.set_xlim(-0.8, places[-1] + 0.8)
    tidy(axes)
    axes.tick_params(axis="x", length=0)
    text = axes.annotate(
        name, (1, 0.5), (3, 0), xycoords="axes fraction", textcoords="offset points",
        va="center", fontsize=SMALL, annotation_clip=False,
    )  # fmt: skip
    return bars, text


def _name_stages(axes: Axes, network: Network) -> None:
    groups = stages(list(network))
    centres = [(group.places[0] + group.places[-1]) / 2 for group in groups]
    axes.set_xticks(centres, [group.name.split()[-1] for group in groups], rotation=90)
