"""Plot the channels that pruning kept in each layer."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ldt.evaluation.layers import Stage, stages
from ldt.figures.look import DARK, GREY, LIGHT
from ldt.figures.style import COLUMN_CM, FONT, SMALL, new_figure, tidy

ROW_CM = (0.15, 0.3)  # minimum and maximum height of a row
HEIGHT_CM = 12.0  # rows are reduced to fit into this, down to their minimum height


def draw_channels(original: Mapping[str, int], kept: Mapping[str, int]) -> Figure:
    """Plot the output channels of each layer before (light) and after (dark) pruning.

    Args:
        original: channels by layer name, in network order.
        kept: the same layers of the pruned network.

    Returns:
        A figure of column width: two bars per layer, and a label and the share of kept channels for
        every stage.

    Raises:
        ValueError: there is no layer, or the layers of the two networks differ.
    """
    if not original or original.keys() != kept.keys():
        differing = sorted(original.keys() ^ kept.keys())[:3]
        raise ValueError(
            f"{len(original)} original and {len(kept)} kept layers (differing: {differing}); "
            "give two records of the same network, with at least one layer"
        )
    groups = stages(list(original))
    rows = groups[-1].places[-1] + 1
    height = rows * min(max(HEIGHT_CM / rows, ROW_CM[0]), ROW_CM[1])
    figure = new_figure(COLUMN_CM, height + 1.4)
    axes = figure.add_subplot()
    places = [place for stage in groups for place in stage.places]
    for counts, colour, label in ((original, LIGHT, "before"), (kept, DARK, "kept")):
        widths = [counts[layer] for layer in original]
        axes.barh(places, widths, height=0.8, color=colour, label=label)
    _name_stages(axes, groups, original, kept)
    axes.set_ylim(rows - 0.3, -0.7)  # the input at the top
    axes.set_xlim(0, max(original.values()))
    axes.set_xlabel("output channels", fontsize=FONT)
    figure.legend(loc="outside upper center", ncols=2, fontsize=SMALL, frameon=False)
    return figure


def _name_stages(
    axes: Axes, groups: list[Stage], original: Mapping[str, int], kept: Mapping[str, int]
) -> None:
    """Write stage names on the left and shares of kept channels on the right."""
    centres = [(stage.places[0] + stage.places[-1]) / 2 for stage in groups]
    axes.set_yticks(centres, [stage.name for stage in groups])
    tidy(axes)
    axes.tick_params(axis="y", length=0)
    _annotate_row(axes, "kept", -0.7, "bottom")
    for stage, centre in zip(groups, centres, strict=True):
        share = sum(kept[n] for n in stage.layers) / sum(original[n] for n in stage.layers)
        _annotate_row(axes, f"{share:.0%}", centre, "center")


def _annotate_row(axes: Axes, text: str, y: float, align: str) -> None:
    """Write text at a row, right of the axes."""
    axes.annotate(
        text,
        (1, y),
        (4, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va=align,
        fontsize=SMALL,
        color=GREY,
        annotation_clip=False,
    )
