"""What pruning left of each layer."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from ldt.evaluation.layers import Stage, stages
from ldt.figures.style import COLUMN_CM, DARK, FONT, GREY, LIGHT, SMALL, new_figure, tidy

ROW_CM = (0.15, 0.3)  # least and most height of a row
TALLEST_CM = 12.0  # rows shrink to fit into this, down to their least height


def draw_channels(original: Mapping[str, int], kept: Mapping[str, int]) -> Figure:
    """Output channels of each layer before (light) and after (dark), in network order.

    Args:
        original: channels by layer name, in network order.
        kept: the same layers of the pruned network.

    Returns:
        A figure as wide as a column, as tall as the layers need: two bars a layer, a label and the
        share of kept channels for every stage.

    Raises:
        ValueError: there is no layer, or the two networks do not have the same layers.
    """
    if not original or original.keys() != kept.keys():
        differing = sorted(original.keys() ^ kept.keys())[:3]
        raise ValueError(
            f"{len(original)} original and {len(kept)} kept layers (differing: {differing}); "
            "give two records of the same network, with at least one layer"
        )
    groups = stages(list(original))
    rows = groups[-1].places[-1] + 1
    height = rows * min(max(TALLEST_CM / rows, ROW_CM[0]), ROW_CM[1])
    figure = new_figure(COLUMN_CM, height + 1.4)
    axes = figure.add_subplot()
    places = [place for stage in groups for place in stage.places]
    for counts, colour, label in ((original, LIGHT, "before"), (kept, DARK, "kept")):
        widths = [counts[layer] for layer in original]
        axes.barh(places, widths, height=0.8, color=colour, label=label)
    _name_stages(axes, groups, original, kept)
    axes.set_ylim(rows - 0.3, -0.7)  # the input on top
    axes.set_xlim(0, max(original.values()))
    axes.set_xlabel("output channels", fontsize=FONT)
    figure.legend(loc="outside upper center", ncols=2, fontsize=SMALL, frameon=False)
    return figure


def _name_stages(
    axes: Any, groups: list[Stage], original: Mapping[str, int], kept: Mapping[str, int]
) -> None:
    """Stage names on the left, shares of kept channels on the right."""
    centres = [(stage.places[0] + stage.places[-1]) / 2 for stage in groups]
    axes.set_yticks(centres, [stage.name for stage in groups])
    tidy(axes)
    axes.tick_params(axis="y", length=0)
    _beside(axes, "kept", -0.7, "bottom")
    for stage, centre in zip(groups, centres, strict=True):
        share = sum(kept[n] for n in stage.layers) / sum(original[n] for n in stage.layers)
        _beside(axes, f"{share:.0%}", centre, "center")


def _beside(axes: Any, text: str, place: float, align: str) -> None:
    """Text at a row, right of the axes."""
    axes.annotate(
        text,
        (1, place),
        (4, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va=align,
        fontsize=SMALL,
        color=GREY,
        annotation_clip=False,
    )
