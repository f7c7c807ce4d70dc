"""Draw ground truth and detections of several detectors side by side."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke

from ldt.figures.hits import hits
from ldt.figures.style import PAGE_CM, PALETTE, SMALL, frame, new_figure, show_image, tighten
from ldt.figures.tags import place_tags

IGNORED = "#C8C8C8"
UNIQUE = "#D4001A"  # arrow at an object that no other detector finds
OUTLINE = "#303030"  # of light lines
MAX_COLUMNS = 4  # panels in a row; three if there are more panels
ARROW = 15.0  # points


@dataclass(frozen=True, eq=False)
class ShownBoxes:
    """The boxes of one image.

    Attributes:
        corners: [n, 4], (x1, y1, x2, y2) in pixels of the original image.
        labels: [n] integers.
        scores: [n] in [0, 1]; None for ground truth.
    """

    corners: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """One image with its boxes.

    Attributes:
        pixels: [h, w, 3] uint8, RGB, at any resolution.
        size: (height, width) of the original image in the pixels of all boxes.
        truth: ground truth.
        ignored: [k, 4] corners of ignored regions.
        found: detections, one entry per detector.
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
    """Draw for each image the ground truth, then each detector's boxes, at most four in a row.

    Dashed white frames are objects that a detector misses; red arrows point to objects that only
    this one of several detectors finds. An object is found if a drawn box of its class has an IoU
    of at least 0.5 with it.

    Args:
        scenes: the images, each with ``len(titles)`` entries in ``found``.
        classes: class names in label order.
        titles: one per detector.
        threshold: detections with this score or less are not drawn.

    Returns:
        A figure of page width. Tags show class and score in percent. With up to six classes, tags
        have abbreviations and the legend has the full names of the drawn classes. With more, some
        share a colour, so tags have the full names and the legend has none.

    Raises:
        ValueError: there is no image, or the number of detectors of one differs from the titles.
    """
    if not scenes or any(len(scene.found) != len(titles) for scene in scenes):
        raise ValueError(
            f"{len(scenes)} images with detections of {[len(s.found) for s in scenes]} detectors, "
            f"{len(titles)} titles; give at least one image and one title per detector"
        )
    figure, grid = _panels(scenes, len(titles))
    few_classes = len(classes) <= len(PALETTE)
    names = short_names(classes) if few_classes else list(classes)
    labels, marks = set[int](), set[str]()
    for index, (panels, scene) in enumerate(zip(grid, scenes, strict=True)):
        drawn = [scene.truth, *(_above(boxes, threshold) for boxes in scene.found)]
        marks |= _draw_scene(panels, scene, drawn, names)
        labels.update(label for boxes in drawn for label in boxes.labels.tolist())
        if index == 0 or panels.shape[0] > 1:
            for axes, title in zip(panels.ravel(), ("ground truth", *titles), strict=False):
                axes.set_title(title, fontsize=SMALL, pad=2)
    _legend(figure, classes, sorted(labels) if few_classes else [], marks)
    return figure


def _panels(scenes: Sequence[Scene], detectors: int) -> tuple[Figure, np.ndarray]:
    """Create the figure and its panels [scenes, rows per scene, columns]."""
    columns = 1 + detectors if detectors < MAX_COLUMNS else 3
    rows = -(-(1 + detectors) // columns)
    title_rows = len(scenes) * rows if rows > 1 else 1
    shapes = [min(scene.size[0] / scene.size[1], 1.0) for scene in scenes for _ in range(rows)]
    height = PAGE_CM / columns * sum(shapes) + 0.1 * len(shapes) + 0.8 * title_rows + 0.9
    figure = new_figure(PAGE_CM, height)
    tighten(figure)
    grid = figure.subplots(len(shapes), columns, squeeze=False, height_ratios=shapes)
    return figure, grid.reshape(len(scenes), rows, columns)


def _draw_scene(
    panels: np.ndarray, scene: Scene, drawn: Sequence[ShownBoxes], names: Sequence[str]
) -> set[str]:
    """Draw a scene's ground truth and detections; return the used marks."""
    axes_of = panels.ravel()
    for axes, boxes in zip(axes_of, drawn, strict=False):
        show_image(axes, scene.pixels, scene.size)
        _draw_boxes(axes, boxes, names, PAGE_CM / panels.shape[1])
    for axes in axes_of[len(drawn) :]:
        axes.set_axis_off()
    for corners in scene.ignored:
        frame(axes_of[0], corners, edgecolor=IGNORED, **_dashed(1, 1.5))
    marks = _mark_hits(axes_of[1:], scene, drawn[1:])
    return marks | {"ignored"} if len(scene.ignored) else marks


def _mark_hits(panels: Iterable[Axes], scene: Scene, found: Sequence[ShownBoxes]) -> set[str]:
    """Mark objects that a detector misses or is the only one to find; return the used marks."""
    truth = scene.truth
    hit = np.array([hits(truth.corners, truth.labels, b.corners, b.labels) for b in found])
    marks = set()
    for axes, own in zip(panels, hit, strict=False):
        for corners in truth.corners[~own]:
            frame(axes, corners, edgecolor="white", **_dashed(3, 2))
            marks.add("missed")
        for corners in truth.corners[own & (hit.sum(0) == 1) & (len(hit) > 1)]:
            _point_at(axes, corners, scene.size)
            marks.add("found by this one only")
    return marks


def _point_at(axes: Axes, corners: np.ndarray, size: tuple[int, int]) -> None:
    """Draw an arrow to the side of a box that faces the image's centre; tags are above or below."""
    x1, y1, x2, y2 = corners.tolist()
    from_left = x1 + x2 > size[1]
    axes.annotate(
        "", (x1 if from_left else x2, (y1 + y2) / 2),
        (-ARROW if from_left else ARROW, 0), textcoords="offset points",
        arrowprops={
            "arrowstyle": "simple,head_length=0.5,head_width=0.6,tail_width=0.25",
            "facecolor": UNIQUE, "edgecolor": "white", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0,
        },
    )  # fmt: skip


def short_names(classes: Sequence[str]) -> list[str]:
    """Abbreviate each class to its first letters, at least three, that no other class starts with.

    A class whose name is a prefix of another one keeps its full name.
    """

    def short(name: str) -> str:
        others = [other for other in classes if other != name]
        lengths = range(3, len(name))
        unique = (n for n in lengths if not any(other.startswith(name[:n]) for other in others))
        return name[: next(unique, len(name))]

    return [short(name) for name in classes]


def colour(label: int) -> str:
    """Return the colour of a class; the palette repeats after its last colour."""
    return PALETTE[label % len(PALETTE)]


def _above(boxes: ShownBoxes, threshold: float) -> ShownBoxes:
    """Return the detections above the threshold, best first: its tag is placed first."""
    assert boxes.scores is not None
    order = np.argsort(-boxes.scores, kind="stable")
    order = order[boxes.scores[order] > threshold]
    return ShownBoxes(boxes.corners[order], boxes.labels[order], boxes.scores[order])


def _draw_boxes(axes: Axes, boxes: ShownBoxes, names: Sequence[str], width_cm: float) -> None:
    """Draw frames and tags; `width_cm`, the panel's, determines the size of tags in pixels."""
    texts: list[str] = [names[int(label)] for label in boxes.labels]
    if boxes.scores is not None:
        texts = [f"{t} {100 * s:.0f}" for t, s in zip(texts, boxes.scores, strict=True)]
    width, height = axes.get_xlim()[1], axes.get_ylim()[0]
    pixels = SMALL * max(width, height) / (width_cm / 2.54 * 72)  # of one em
    widths = [0.62 * pixels * len(text) for text in texts]
    tags = place_tags(boxes.corners, widths, 1.1 * pixels, (height, width))
    for corners, label, text, tag in zip(boxes.corners, boxes.labels, texts, tags, strict=True):
        frame(axes, corners, edgecolor=colour(label), linewidth=1.2)
        _tag(axes, tag, text, colour(label))


def _dashed(dash: float, gap: float) -> dict[str, Any]:
    """Return the style of a dashed line that is visible on dark and light backgrounds."""
    outline = [Stroke(linewidth=1.5, foreground=OUTLINE), Normal()]
    return {"linewidth": 0.8, "linestyle": (0, (dash, gap)), "path_effects": outline}


def _tag(axes: Axes, box: np.ndarray, text: str, background: str) -> None:
    red, green, blue = to_rgb(background)
    bright = 0.3 * red + 0.6 * green + 0.1 * blue > 0.5
    axes.text(
        (box[0] + box[2]) / 2,
        (box[1] + box[3]) / 2,
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
    styles: dict[str, dict[str, Any]] = {
        "missed": {**_dashed(3, 2), "color": "white"},
        "found by this one only": {
            "color": UNIQUE, "marker": ">", "markersize": 5, "linewidth": 1.5
        },
        "ignored": {**_dashed(1, 1.5), "color": IGNORED},
    }  # fmt: skip
    for name, style in styles.items():
        if name in marks:
            handles.append(Line2D([], [], label=name, **style))
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=min(len(handles), 6),
            fontsize=SMALL,
            frameon=False,
        )
