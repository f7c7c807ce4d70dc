"""Ground truth and detections of several detectors, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke

from ldt.figures.hits import hits
from ldt.figures.style import PAGE_CM, PALETTE, SMALL, new_figure
from ldt.figures.tags import place_tags

IGNORED = "#C8C8C8"
ALONE = "#D4001A"  # the arrow at an object that no other detector found
DARKER = "#303030"  # behind light lines
ACROSS = 4  # panels in a row; three of them, where there are more
ARROW = 15.0  # points


@dataclass(frozen=True, eq=False)
class ShownBoxes:
    """ShownBoxes of one image.

    Attributes:
        corners: [n, 4], (x1, y1, x2, y2) in pixels of the original image.
        labels: [n] whole numbers.
        scores: [n] in [0, 1]; None for ground truth.
    """

    corners: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """One image and everything that is drawn on it.

    Attributes:
        pixels: [h, w, 3] uint8, RGB, at any resolution.
        size: (height, width) of the original image in pixels, which boxes refer to.
        truth: annotated objects.
        ignored: [k, 4] corners of regions where nothing counts.
        found: detections, one entry for each detector.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    truth: ShownBoxes
    ignored: np.ndarray
    found: Sequence[ShownBoxes]


def draw_detections(
    scenes: Sequence[Scene],
    classes: Sequence[str],
    titles: Sequence[str],
    threshold: float = 0.3,
) -> Figure:
    """For each image the ground truth, then each detector's boxes, at most four in a row.

    Dashed white frames are objects that a detector misses; a red arrow points to an object that it
    alone finds (where there are several). Found means: covered by a drawn box of its class, with
    an intersection over union of 0.5.

    Args:
        scenes: the images; all have ``len(titles)`` entries in ``found``.
        classes: names in label order.
        titles: one for each detector.
        threshold: detections with this score or less are left out.

    Returns:
        A figure as wide as a page. Boxes are tagged with class and score in per cent. Up to six
        classes are tagged in short, and the legend has the full names of those that are seen; of
        more classes, some share a colour, so the tags have the full names and the legend has none.

    Raises:
        ValueError: there is no image, or an image has detections of more or fewer detectors.
    """
    if not scenes or any(len(scene.found) != len(titles) for scene in scenes):
        raise ValueError(
            f"{len(scenes)} images with detections of {[len(s.found) for s in scenes]} detectors, "
            f"{len(titles)} titles; give at least one image and one title a detector"
        )
    columns = 1 + len(titles) if len(titles) < ACROSS else 3
    rows = -(-(1 + len(titles)) // columns)
    titled = len(scenes) if rows > 1 else 1  # images with titles of their own
    shapes = [min(scene.size[0] / scene.size[1], 1.0) for scene in scenes for _ in range(rows)]
    height = PAGE_CM / columns * sum(shapes) + 0.1 * len(shapes) + 0.8 * titled * rows + 0.9
    figure = new_figure(PAGE_CM, height)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)  # type: ignore
    grid = figure.subplots(len(shapes), columns, squeeze=False, height_ratios=shapes)
    names = short_names(classes) if len(classes) <= len(PALETTE) else list(classes)
    seen: set[int] = set()
    marks: set[str] = set()
    for index, scene in enumerate(scenes):
        panels = grid[index * rows : (index + 1) * rows].ravel()
        drawn = [scene.truth, *(_above(boxes, threshold) for boxes in scene.found)]
        for axes, boxes in zip(panels, drawn, strict=False):
            _show(axes, scene)
            _draw_boxes(axes, boxes, names, PAGE_CM / columns)
            seen.update(boxes.labels.tolist())
        _draw_ignored(panels[0], scene.ignored)
        marks |= _mark(panels[1:], scene, drawn[1:])
        for axes, title in zip(panels, ("ground truth", *titles), strict=False):
            if index < titled:
                axes.set_title(title, fontsize=SMALL, pad=2)
        for axes in panels[len(drawn) :]:
            axes.set_axis_off()
    if any(len(scene.ignored) for scene in scenes):
        marks.add("ignored")
    _legend(figure, classes, sorted(seen) if len(classes) <= len(PALETTE) else [], marks)
    return figure


def _mark(panels: Any, scene: Scene, found: Sequence[ShownBoxes]) -> set[str]:
    """Frame what each detector misses, point to what it alone finds; which of both there is."""
    truth = scene.truth
    hit = np.array([hits(truth.corners, truth.labels, b.corners, b.labels) for b in found])
    marks = set()
    for axes, own in zip(panels, hit, strict=False):
        for corners in truth.corners[~own]:
            _frame(axes, corners, edgecolor="white", **_broken(3, 2))
            marks.add("missed")
        for corners in truth.corners[own & (hit.sum(0) == 1) & (len(hit) > 1)]:
            _point_at(axes, corners, scene.size)
            marks.add("found by this one only")
    return marks


def _point_at(axes: Any, corners: np.ndarray, size: tuple[int, int]) -> None:
    """An arrow from the middle of the image's width to the box's side; tags are above or below."""
    x1, y1, x2, y2 = corners.tolist()
    comes_from_left = x1 + x2 > size[1]
    axes.annotate(
        "", (x1 if comes_from_left else x2, (y1 + y2) / 2),
        (-ARROW if comes_from_left else ARROW, 0), textcoords="offset points",
        arrowprops={
            "arrowstyle": "simple,head_length=0.5,head_width=0.6,tail_width=0.25",
            "facecolor": ALONE, "edgecolor": "white", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0,
        },
    )  # fmt: skip


def short_names(classes: Sequence[str]) -> list[str]:
    """For each class the first letters, three at least, that no other class begins with.

    A class that is itself the beginning of another keeps its whole name.
    """

    def short(name: str) -> str:
        others = [other for other in classes if other != name]
        lengths = range(3, len(name))
        unique = (n for n in lengths if not any(other.startswith(name[:n]) for other in others))
        return name[: next(unique, len(name))]

    return [short(name) for name in classes]


def colour(label: int) -> str:
    """The colour of a class; the palette starts again after its last colour."""
    return PALETTE[label % len(PALETTE)]


def _above(boxes: ShownBoxes, threshold: float) -> ShownBoxes:
    """The detections that are shown, the best first: it has the choice of where its tag goes."""
    assert boxes.scores is not None
    order = np.argsort(-boxes.scores, kind="stable")
    order = order[boxes.scores[order] > threshold]
    return ShownBoxes(boxes.corners[order], boxes.labels[order], boxes.scores[order])


def _show(axes: Any, scene: Scene) -> None:
    """The image in the coordinates of the original one, whatever its own resolution."""
    height, width = scene.size
    axes.imshow(scene.pixels, extent=(0, width, height, 0), interpolation="bilinear")
    axes.set_axis_off()


def _draw_boxes(axes: Any, boxes: ShownBoxes, names: Sequence[str], width_cm: float) -> None:
    """Frames and tags; `width_cm` is the panel's, which says how large a tag is in pixels."""
    texts: list[str] = [names[int(label)] for label in boxes.labels]
    if boxes.scores is not None:
        texts = [f"{t} {100 * s:.0f}" for t, s in zip(texts, boxes.scores, strict=True)]
    width, height = axes.get_xlim()[1], axes.get_ylim()[0]
    pixels = SMALL * max(width, height) / (width_cm / 2.54 * 72)  # of one em
    widths = [0.62 * pixels * len(text) for text in texts]
    tags = place_tags(boxes.corners, widths, 1.1 * pixels, (height, width))
    for corners, label, text, tag in zip(boxes.corners, boxes.labels, texts, tags, strict=True):
        _frame(axes, corners, edgecolor=colour(label), linewidth=1.2)
        _tag(axes, tag, text, colour(label))


def _draw_ignored(axes: Any, regions: np.ndarray) -> None:
    for corners in regions:
        _frame(axes, corners, edgecolor=IGNORED, **_broken(1, 1.5))


def _broken(dash: float, gap: float) -> dict[str, Any]:
    """The style of a broken line that shows on dark and on light."""
    behind = [Stroke(linewidth=1.5, foreground=DARKER), Normal()]
    return {"linewidth": 0.8, "linestyle": (0, (dash, gap)), "path_effects": behind}


def _frame(axes: Any, corners: np.ndarray, **style: Any) -> None:
    x1, y1, x2, y2 = (float(value) for value in corners)
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))


def _tag(axes: Any, place: np.ndarray, text: str, background: str) -> None:
    red, green, blue = to_rgb(background)
    bright = 0.3 * red + 0.6 * green + 0.1 * blue > 0.5
    axes.text(
        (place[0] + place[2]) / 2,
        (place[1] + place[3]) / 2,
        text,
        ha="center",
        va="center_baseline",
        fontsize=SMALL,
        color="black" if bright else "white",
        bbox={"facecolor": background, "edgecolor": "none", "pad": 0.2, "alpha": 0.8},
        parse_math=False,
        clip_on=True,
    )


def _legend(figure: Figure, classes: Sequence[str], labels: list[int], marks: set[str]) -> None:
    handles = [Line2D([], [], color=colour(i), linewidth=2.5, label=classes[i]) for i in labels]
    looks: dict[str, dict[str, Any]] = {
        "missed": {**_broken(3, 2), "color": "white"},
        "found by this one only": {
            "color": ALONE, "marker": ">", "markersize": 5, "linewidth": 1.5
        },
        "ignored": {**_broken(1, 1.5), "color": IGNORED},
    }  # fmt: skip
    for name, look in looks.items():
        if name in marks:
            handles.append(Line2D([], [], label=name, **look))
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=min(len(handles), 6),
            fontsize=SMALL,
            frameon=False,
        )
