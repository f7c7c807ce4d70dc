"""Figures show the data that they are given: counted and compared, never by pixels."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from PIL import Image

from ldt.config import method_titles
from ldt.evaluation.neck_statistics import NeckSpace
from ldt.evaluation.score_stability import StageScores
from ldt.figures.attention import Attention, View, draw_attention
from ldt.figures.channels import draw_channels, stages
from ldt.figures.comparison import Panel, Point, draw_comparisons
from ldt.figures.curves import draw_curve
from ldt.figures.detections import Scene, ShownBoxes, draw_detections, short_names
from ldt.figures.discriminants import draw_discriminants
from ldt.figures.hits import hits
from ldt.figures.shrinking import animate_shrinking, draw_shrinking
from ldt.figures.stability import draw_stability
from ldt.figures.style import COLUMN_CM, PAGE_CM, PALETTE, SMALL, save
from ldt.figures.tags import place_tags
from ldt.report.plotly_style import looks

CLASSES = ("Car", "Pedestrian", "Cyclist")
SIZE = (128, 256)


def boxes(n, seed, scored=True, classes=3):
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 80, (n, 2))
    corners = np.concatenate([start, start + rng.uniform(5, 40, (n, 2))], axis=1)
    return ShownBoxes(
        corners, rng.integers(0, classes, n), rng.uniform(0, 1, n) if scored else None
    )


def solid(axes):
    """Frames of boxes, without the broken ones of missed objects and ignored regions."""
    return [patch for patch in axes.patches if patch.get_linestyle() == "solid"]


def tagged(axes):
    """Texts of the boxes, without the arrows, whose text is empty."""
    return [text for text in axes.texts if text.get_text()]


def scene(truths, found, ignored=0, size=SIZE):
    pixels = np.zeros((64, 128, 3), np.uint8)
    return Scene(pixels, size, truths, boxes(ignored, 9).corners, found)


# Detections -----------------------------------------------------------------------------------


def test_every_box_above_the_threshold_is_drawn_and_no_other():
    detections = [boxes(7, 1), boxes(5, 2)]
    figure = draw_detections(
        [scene(boxes(4, 0, scored=False), detections, ignored=2)], CLASSES, ["a", "b"], 0.4
    )
    truth, *panels = figure.axes
    assert len(truth.patches) == 4 + 2
    assert sum(p.get_linestyle() != "solid" for p in truth.patches) == 2
    assert [text.get_text() for text in truth.texts] == [
        short_names(CLASSES)[label] for label in boxes(4, 0, scored=False).labels
    ]
    for axes, given in zip(panels, detections, strict=True):
        kept = given.scores > 0.4
        assert 0 < kept.sum() < len(kept)
        drawn = sorted(patch.get_xy() for patch in solid(axes))
        assert np.allclose(drawn, sorted(map(tuple, given.corners[kept, :2])))
        scores = sorted(int(text.get_text().split()[-1]) for text in tagged(axes))
        assert scores == sorted(round(100 * score) for score in given.scores[kept])


def test_boxes_lie_in_the_original_image_whatever_the_resolution_of_the_pixels():
    figure = draw_detections([scene(boxes(1, 0, scored=False), [boxes(1, 1)])], CLASSES, ["a"])
    for axes in figure.axes:
        assert axes.images[0].get_extent() == [0, SIZE[1], SIZE[0], 0]


def test_a_class_has_one_colour_in_every_panel_and_in_the_legend():
    one = ShownBoxes(boxes(3, 0).corners, np.arange(3), np.full(3, 0.9))
    figure = draw_detections([scene(one, [one])], CLASSES, ["a"])
    legend = {line.get_label(): line.get_color() for line in figure.legends[0].get_lines()}
    assert tuple(legend) == CLASSES
    assert len(set(legend.values())) == 3
    for axes in figure.axes:
        tags = {text.get_text()[:3]: text.get_bbox_patch().get_facecolor() for text in axes.texts}
        edges = {patch.get_edgecolor()[:3] for patch in axes.patches}
        assert {colour[:3] for colour in tags.values()} == edges
        assert len(edges) == 3


def test_many_classes_are_named_in_full_at_the_boxes():
    many = [f"class {index}" for index in range(len(PALETTE) + 1)]
    found = boxes(9, 3, classes=len(many))
    figure = draw_detections([scene(found, [found])], many, ["a"], threshold=0.0)
    named = {text.get_text().rsplit(" ", 1)[0] for text in figure.axes[1].texts}
    assert named == {many[label] for label in found.labels}
    assert not figure.legends


@pytest.mark.slow
def test_images_without_objects_and_of_any_shape_are_drawn(tmp_path):
    nothing = boxes(0, 0)
    scenes = [scene(nothing, [nothing], size=size) for size in ((375, 1242), (640, 427))]
    save(draw_detections(scenes, CLASSES, ["a"]), tmp_path / "new" / "detections.png")
    assert (tmp_path / "new" / "detections.png").stat().st_size > 0


def test_detections_of_another_number_of_detectors_are_refused():
    with pytest.raises(ValueError, match="one title per detector"):
        draw_detections([scene(boxes(1, 0), [boxes(1, 1)])], CLASSES, ["a", "b"])
    with pytest.raises(ValueError, match="at least one image"):
        draw_detections([], CLASSES, [])


@pytest.mark.parametrize("names", [CLASSES, ("car", "carrot", "cat", "cup"), ("A", "AB", "B")])
def test_short_names_tell_classes_apart(names):
    short = short_names(names)
    assert len(set(short)) == len(names)
    assert all(name.startswith(found) for name, found in zip(names, short, strict=True))


def test_tags_stay_inside_and_apart_where_there_is_room():
    far = np.array([[5.0 + 50 * i, 60, 25 + 50 * i, 100] for i in range(5)])
    corners = np.concatenate([far, far + 1, [[236, 0, 256, 20], [0, 118, 20, 128]]])
    tags = place_tags(corners, [24.0] * len(corners), 10.0, SIZE)
    assert tags.min() >= 0
    assert (tags[:, 2] <= SIZE[1]).all()
    assert (tags[:, 3] <= SIZE[0]).all()
    for one, other in combinations(tags, 2):
        shared = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
        assert shared.min() <= 1e-9


def test_a_hit_needs_the_class_and_half_the_union_and_is_given_once():
    truth = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10.0]])
    found = np.array([[0, 0, 10, 5], [0, 0, 10, 10], [20, 0, 30, 4.9], [40, 0, 50, 10.0]])
    labels = np.array([0, 0, 0, 1])
    assert hits(truth, np.zeros(3, int), found, labels).tolist() == [True, False, False]
    assert hits(truth, np.array([0, 0, 1]), found, labels).tolist() == [True, False, True]
    assert hits(truth, np.zeros(3, int), found[:0], labels[:0]).tolist() == [False] * 3
    assert hits(truth[:0], labels[:0], found, labels).tolist() == []


def test_what_one_detector_misses_and_what_it_alone_finds_is_marked():
    corners = np.array([[10, 10, 50, 50], [100, 10, 140, 50], [180, 60, 220, 100.0]])
    truth = ShownBoxes(corners, np.array([0, 1, 2]))
    one = ShownBoxes(corners[:2], np.array([0, 1]), np.array([0.9, 0.8]))
    two = ShownBoxes(
        corners[[0, 2]], np.array([0, 2]), np.array([0.9, 0.1])
    )  # the second is too weak
    figure = draw_detections([scene(truth, [one, two])], CLASSES, ["one", "two"], 0.3)
    shown, first, second = figure.axes
    assert not [patch for patch in shown.patches if patch.get_linestyle() != "solid"]
    for axes, missed, alone in ((first, [2], [1]), (second, [1, 2], [])):
        broken = [patch.get_xy() for patch in axes.patches if patch.get_linestyle() != "solid"]
        assert np.allclose(sorted(broken), corners[missed, :2])
        arrows = [text.xy for text in axes.texts if not text.get_text()]
        assert len(arrows) == len(alone)
        for (x, y), index in zip(arrows, alone, strict=True):
            assert x in corners[index, ::2]
            assert y == corners[index, 1::2].mean()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["Car", "Pedestrian", "Cyclist", "missed", "found by this one only"]


def test_a_single_detector_finds_nothing_alone():
    one = ShownBoxes(boxes(3, 0).corners, np.arange(3), np.full(3, 0.9))
    figure = draw_detections([scene(one, [one])], CLASSES, ["a"])
    assert len(tagged(figure.axes[1])) == len(figure.axes[1].texts) == 3


@pytest.mark.slow
@pytest.mark.parametrize("detectors", [1, 2, 3, 5, 6])
def test_every_detector_has_a_panel_with_its_title(detectors):
    found = [boxes(2, seed) for seed in range(detectors)]
    titles = [f"detector {index}" for index in range(detectors)]
    figure = draw_detections([scene(boxes(2, 0), found)] * 2, CLASSES, titles)
    assert figure.get_figwidth() * 2.54 == pytest.approx(PAGE_CM)
    named = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert named[: 1 + detectors] == ["ground truth", *titles]
    assert sum(bool(axes.images) for axes in figure.axes) == 2 * (1 + detectors)


# Curves ---------------------------------------------------------------------------------------


def rounds(*values):
    sizes = 2e6 * 0.7 ** np.arange(len(values))
    return [
        {"round": i, "params": float(p), "AP": v}
        for i, (p, v) in enumerate(zip(sizes, values, strict=True))
    ]


def test_the_curve_is_the_rows_and_the_base_is_dashed():
    rows = rounds(0.40, 0.42, 0.41)
    figure = draw_curve(rows, "AP")
    curve, base = figure.axes[0].lines
    assert np.allclose(curve.get_xdata(), [row["params"] / 1e6 for row in rows])
    assert np.allclose(curve.get_ydata(), [0.40, 0.42, 0.41])
    assert list(base.get_ydata()) == [0.40, 0.40]
    assert [text.get_text() for text in figure.axes[0].texts] == ["base", "round 1", "round 2"]


@pytest.mark.slow
def test_the_percent_axis_agrees_with_the_parameters():
    figure = draw_curve(rounds(0.4, 0.3), "AP")
    FigureCanvasAgg(figure).draw()  # secondary axes take their limits while drawing
    (share,) = figure.axes[0].child_axes
    assert share.get_xlim() == pytest.approx([x / 2 * 100 for x in figure.axes[0].get_xlim()])


@pytest.mark.parametrize("nan_row", [0, 1, 2])
def test_rounds_without_the_metric_are_left_out(nan_row):
    rows = rounds(0.40, 0.42, 0.41)
    rows[nan_row]["AP"] = float("nan")
    lines = draw_curve(rows, "AP").axes[0].lines
    assert np.isfinite(lines[0].get_ydata()).all()
    assert len(lines[0].get_ydata()) == 2
    assert len(lines) == (1 if nan_row == 0 else 2)  # no base, no dashed line


@pytest.mark.slow
def test_runs_without_pruning_or_metric_are_drawn_and_runs_without_rounds_are_not(tmp_path):
    save(draw_curve(rounds(0.4), "AP"), tmp_path / "base.png")
    save(draw_curve(rounds(0.4, 0.3), "mAP"), tmp_path / "none.png")
    with pytest.raises(ValueError, match="no rounds"):
        draw_curve([], "AP")


def test_small_differences_do_not_fill_the_axis():
    low, high = draw_curve(rounds(0.400, 0.401), "AP").axes[0].get_ylim()
    assert high - low > 20 * 0.001


# Channels -------------------------------------------------------------------------------------


def network(n):
    return {f"backbone.layer{1 + i // 10}.{i}.conv": 16 * (1 + i // 10) for i in range(n)}


@pytest.mark.parametrize("n", [1, 20, 120])
def test_bars_are_the_channels_in_network_order(n):
    original = network(n)
    kept = {name: count - 3 for name, count in original.items()}
    axes = draw_channels(original, kept).axes[0]
    before, after = axes.containers
    assert [bar.get_width() for bar in before] == list(original.values())
    assert [bar.get_width() for bar in after] == list(kept.values())
    places = [bar.get_y() for bar in before]
    assert places == sorted(places)
    assert places == [bar.get_y() for bar in after]
    top_to_bottom = axes.get_ylim()
    assert top_to_bottom[0] > top_to_bottom[1]  # the input on top


@pytest.mark.slow
def test_stage_labels_never_overlap():
    one_layer_each = {f"backbone.conv{i}": 8 for i in range(120)}
    figure = draw_channels(one_layer_each, one_layer_each)
    FigureCanvasAgg(figure).draw()
    extents = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(extents))


def test_stages_hold_every_layer_once_in_order():
    layers = list(network(35))
    found = stages(layers)
    assert [name for stage in found for name in stage.layers] == layers
    assert [stage.name for stage in found] == [f"backbone layer{i}" for i in (1, 2, 3, 4)]
    places = [place for stage in found for place in stage.places]
    assert all(b - a > 0.999 for a, b in pairwise(places))


def test_the_share_of_a_stage_is_written_beside_it():
    texts = draw_channels({"neck.a.0": 10, "neck.a.1": 30}, {"neck.a.0": 4, "neck.a.1": 6})
    assert [text.get_text() for text in texts.axes[0].texts] == ["kept", "25%"]


def test_two_different_networks_are_refused():
    with pytest.raises(ValueError, match=r"neck\.b"):
        draw_channels({"neck.a": 8}, {"neck.a": 8, "neck.b": 8})
    with pytest.raises(ValueError, match="at least one layer"):
        draw_channels({}, {})


# Comparison of methods ------------------------------------------------------------------------


def test_every_method_has_its_line_and_band_and_the_unpruned_are_dashed():
    methods = {
        "LDT": [Point(0.5, [0.4, 0.5]), Point(0.2, [0.3, 0.3])],
        "l1": [Point(0.5, [0.35])],
    }
    figure = draw_comparisons([Panel("", methods, {"unpruned": Point(1.0, [0.4, 0.44])}, "mAP")])
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"LDT", "l1", "unpruned"}
    assert np.allclose(lines["LDT"].get_xydata(), [(0.2, 0.3), (0.5, 0.45)])  # from small to large
    assert np.allclose(lines["l1"].get_xydata(), [(0.5, 0.35)])
    assert lines["unpruned"].get_linestyle() == "--"
    assert np.allclose(lines["unpruned"].get_ydata(), 0.42)
    assert len(axes.collections) == 2
    band = max(float(np.ptp(c.get_paths()[0].vertices[:, 1])) for c in axes.collections)
    assert band == pytest.approx(0.45 + np.std([0.4, 0.5], ddof=1) - 0.3)
    assert lines["LDT"].get_linewidth() > lines["l1"].get_linewidth()
    assert len({line.get_color() for line in lines.values()}) == 3


def test_nothing_to_compare_is_told():
    with pytest.raises(ValueError, match="no methods to compare"):
        draw_comparisons([Panel("", {}, {}, "AP")])


@pytest.mark.slow
def test_a_method_looks_the_same_in_every_panel_and_pruned_and_left_agree():
    whole = {"unpruned": Point(2.0, [0.4])}
    panels = [
        Panel("gfl", {"ldt": [Point(1.0, [0.4])], "px": [Point(0.5, [0.3])]}, whole, "mAP"),
        Panel("atss", {"px": [Point(1.0, [0.2]), Point(0.5, [0.1])]}, whole, "mAP"),
    ]
    figure = draw_comparisons(panels)
    FigureCanvasAgg(figure).draw()
    one, other = figure.axes
    assert (one.get_title(), other.get_title()) == ("gfl", "atss")
    (px, again) = (
        next(line for line in axes.lines if line.get_label() == "px") for axes in (one, other)
    )
    assert (px.get_color(), px.get_marker()) == (again.get_color(), again.get_marker())
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(names) == ["ldt", "px", "unpruned"]
    for axes in (one, other):
        (top,) = axes.child_axes
        gone = sorted(100 * (1 - x / 2.0) for x in axes.get_xlim())
        assert sorted(top.get_xlim()) == pytest.approx(gone)
    with pytest.raises(ValueError, match="no methods to compare"):
        draw_comparisons([*panels, Panel("yolof", {}, {}, "AP")])


@pytest.mark.slow
@pytest.mark.parametrize("longest", [3, 20, 60])
def test_the_legend_of_a_comparison_stays_inside(longest):
    methods = {f"{'m' * longest}{i}": [Point(0.5, [0.1 * i])] for i in range(5)}
    figure = draw_comparisons([Panel("", methods, {"unpruned": Point(1.0, [0.4])}, "AP")])
    assert figure.get_figwidth() * 2.54 == pytest.approx(COLUMN_CM)
    FigureCanvasAgg(figure).draw()
    extent = figure.legends[0].get_window_extent()
    if longest < 60:  # nothing helps a name that is wider than a column
        assert extent.x0 >= 0
        assert extent.x1 <= figure.bbox.x1


# Shrinking ------------------------------------------------------------------------------------


def shrunk(rounds):
    return [{name: n - i for name, n in network(25).items()} for i in range(rounds)]


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 2, 3, 6, 15])
def test_a_strip_shows_the_widths_of_at_most_six_rounds_with_both_ends(rounds):
    networks, names = shrunk(rounds), [f"round {i}" for i in range(rounds)]
    figure = draw_shrinking(networks, names)
    assert len(figure.axes) == min(rounds, 6)
    shown = [axes.texts[0].get_text() for axes in figure.axes]
    assert (shown[0], shown[-1]) == (names[0], names[-1])
    assert len(set(shown)) == len(shown)
    for axes, name in zip(figure.axes, shown, strict=True):
        light, dark = axes.containers
        assert [bar.get_height() for bar in light] == list(networks[0].values())
        assert [bar.get_height() for bar in dark] == list(networks[names.index(name)].values())


@pytest.mark.slow
def test_the_animation_rests_at_every_round(tmp_path):
    networks = [{"neck.a": 8, "neck.b": 8}, {"neck.a": 4, "neck.b": 8}]
    animate_shrinking(networks, ["base", "round 1"], tmp_path / "new" / "shrinking.gif")
    with Image.open(tmp_path / "new" / "shrinking.gif") as film:
        assert film.is_animated
        film.seek(0)
        first = np.asarray(film.convert("L"), dtype=float)
        film.seek(film.n_frames - 1)
        assert np.abs(np.asarray(film.convert("L"), dtype=float) - first).max() > 100


def test_rounds_of_different_networks_are_refused():
    with pytest.raises(ValueError, match="rounds of one run"):
        draw_shrinking([{"neck.a": 8}, {"neck.b": 8}], ["base", "round 1"])
    with pytest.raises(ValueError, match="each with a name"):
        draw_shrinking([{"neck.a": 8}], [])
    with pytest.raises(ValueError, match="at least one"):
        draw_shrinking([], [])


# Discriminants --------------------------------------------------------------------------------


def space(seed, classes=3, channels=12, dimensions=2):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(60) % classes)
    eigenvalues = np.sort(rng.normal(0, 1, channels))[::-1]
    positive = rng.uniform(0.01, 1, (2, channels))
    return NeckSpace(1, rng.normal(0, 1, (60, dimensions)), labels, eigenvalues, *positive)


@pytest.mark.parametrize("count", [1, 2])
def test_objects_eigenvalues_and_channels_are_those_given(count):
    spaces = [space(seed) for seed in range(count)]
    figure = draw_discriminants(spaces, ["without", "with"][:count], CLASSES)
    scatters, lines = figure.axes[:count], figure.axes[count:]
    if count == 2:
        assert scatters[0].get_xlim() == scatters[1].get_xlim()
    for axes, given in zip(scatters, spaces, strict=True):
        for label in range(3):
            (dots,) = (c for c in axes.collections if c.get_label() == CLASSES[label])
            assert np.allclose(dots.get_offsets(), given.projections[given.labels == label])
    for index, given in enumerate(spaces):
        order = np.argsort(-given.ratio)
        eigenvalues, ratio, activity = (axes.lines[index].get_ydata() for axes in lines)
        kept = given.eigenvalues > 1e-4 * given.eigenvalues.max()
        assert np.allclose(eigenvalues[kept], given.eigenvalues[kept])
        assert np.isnan(eigenvalues[~kept]).all()
        assert np.allclose(ratio, given.ratio[order])
        assert np.allclose(activity, given.activity[order])


def test_two_classes_have_one_discriminant_and_many_classes_six_colours():
    two = draw_discriminants([space(0, classes=2, dimensions=1)], ["base"], CLASSES)
    (car, pedestrian) = two.axes[0].collections[1:]
    assert set(car.get_offsets()[:, 1]) == {0}
    assert set(pedestrian.get_offsets()[:, 1]) == {1}
    names = [f"class {i}" for i in range(10)]
    many = draw_discriminants([space(0, classes=10)], ["base"], names)
    rest, *coloured = many.axes[0].collections
    assert len(coloured) == len(PALETTE)
    assert len(rest.get_offsets()) + sum(len(c.get_offsets()) for c in coloured) == 60


def test_three_spaces_are_refused():
    with pytest.raises(ValueError, match="one or two with a title each"):
        draw_discriminants([space(0)] * 3, ["a", "b", "c"], CLASSES)


# Stability ------------------------------------------------------------------------------------


def test_a_heat_map_holds_the_utilities_sorted_by_their_mean():
    rng = np.random.default_rng(0)
    given = [
        StageScores(f"backbone.layer{i}", rng.uniform(0, 9, (4, 8 + i)), 0.9) for i in range(4)
    ]
    figure = draw_stability(given)
    panels = [axes for axes in figure.axes if axes.get_title()]
    for axes, stage in zip(panels, given, strict=True):
        order = np.argsort(-stage.utilities.mean(0))
        shown = np.asarray(axes.images[0].get_array()) ** 2 * stage.utilities.max()
        assert np.allclose(shown, stage.utilities[:, order])
        assert axes.get_title().replace("\n", "").startswith(stage.name)
        assert "0.900" in axes.get_title()


def test_a_single_batch_cannot_be_compared():
    with pytest.raises(ValueError, match="two batches to compare"):
        draw_stability([StageScores("neck", np.ones((1, 4)), float("nan"))])
    with pytest.raises(ValueError, match="at least one stage"):
        draw_stability([])


# Attention ------------------------------------------------------------------------------------


def view(detectors, size=SIZE):
    rng = np.random.default_rng(0)
    looked = [Attention(rng.uniform(0, 1, (8, 16)), boxes(2, i).corners) for i in range(detectors)]
    return View(np.zeros((64, 128, 3), np.uint8), size, boxes(3, 9).corners, looked)


def test_heat_lies_over_the_image_and_the_explained_boxes_are_framed():
    given = view(2)
    figure = draw_attention([given, given], ["base", "pruned"])
    image, *heats = figure.axes[:3]
    assert len(image.images) == 1
    assert len(image.patches) == 3
    for axes, looked in zip(heats, given.attention, strict=True):
        under, over = axes.images
        assert under.get_extent() == over.get_extent() == [0, SIZE[1], SIZE[0], 0]
        assert np.allclose(over.get_array(), looked.heat)
        assert over.get_clim() == (0, 1)
        corners = sorted(patch.get_xy() for patch in axes.patches)
        assert np.allclose(corners, sorted(map(tuple, looked.corners[:, :2])))


def test_views_of_another_number_of_detectors_are_refused():
    with pytest.raises(ValueError, match="one title per detector"):
        draw_attention([view(2)], ["base"])
    with pytest.raises(ValueError, match="at least one image"):
        draw_attention([], [])


# All of them ----------------------------------------------------------------------------------


def every_figure():
    found = [boxes(3, 1), boxes(3, 2)]
    methods = {"ldt": [Point(0.5, [0.4, 0.5]), Point(0.2, [0.3])], "px": [Point(0.4, [0.3])]}
    rng = np.random.default_rng(0)
    return {
        "detections": draw_detections([scene(boxes(3, 0), found)], CLASSES, ["a", "b"]),
        "curve": draw_curve(rounds(0.4, 0.42, 0.41), "AP"),
        "channels": draw_channels(network(20), network(20)),
        "comparison": draw_comparisons(
            [Panel("", methods, {"unpruned": Point(1.0, [0.4])}, "mAP")]
        ),
        "shrinking": draw_shrinking(shrunk(3), ["base", "round 1", "round 2"]),
        "discriminants": draw_discriminants([space(0), space(1)], ["without", "with"], CLASSES),
        "stability": draw_stability(
            [
                StageScores(f"neck.{'blocks.0.' * n}conv", rng.uniform(0, 1, (4, 8)), 0.9)
                for n in (0, 5)
            ]
        ),
        "attention": draw_attention([view(2)], ["base", "pruned"]),
    }


@pytest.mark.slow
def test_every_figure_has_a_printed_width_and_letters_of_seven_points(tmp_path):
    for name, figure in every_figure().items():
        save(figure, tmp_path / f"{name}.png")
        assert imread(tmp_path / f"{name}.png").std() > 0
        assert figure.get_figwidth() * 2.54 == pytest.approx(COLUMN_CM, abs=0.1) or (
            figure.get_figwidth() * 2.54 == pytest.approx(PAGE_CM, abs=0.1)
        ), name
        texts = [text for text in figure.findobj(lambda part: hasattr(part, "get_fontsize"))]
        small = {text.get_text() for text in texts if text.get_text() and text.get_fontsize() < 7}
        assert not small, f"{name}: {small}"
    assert SMALL >= 7


@pytest.mark.slow
def test_the_titles_of_neighbouring_panels_do_not_touch():
    for name, figure in every_figure().items():
        FigureCanvasAgg(figure).draw()
        titles = [a.title.get_window_extent() for a in figure.axes if a.get_title()]
        for one, other in combinations(titles, 2):
            assert not one.overlaps(other), name


def test_classes_and_methods_have_colours_of_their_own():
    assert len({to_rgb(colour) for colour in PALETTE}) == len(PALETTE)
    methods = [*method_titles().values(), "random", "none"]
    figure = draw_comparisons([Panel("all", {m: [Point(1, [0.4])] for m in methods}, {}, "AP")])
    lines = [line for line in figure.axes[0].lines if line.get_marker() not in (None, "None")]
    assert len(lines) == len(methods)
    assert len({(to_rgb(line.get_color()), line.get_marker()) for line in lines}) == len(methods)
    assert len(set(looks(methods).values())) == len(methods)


def test_an_unknown_format_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"no format '\.doc'; choose from .*\.pdf.*\.png"):
        save(draw_curve(rounds(0.4), "AP"), tmp_path / "figure.doc")
