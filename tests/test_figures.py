"""Figures show the data that they are given: counted and compared, never by pixels."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ldt.figures.channels import draw_channels, stages
from ldt.figures.comparison import Point, draw_comparison
from ldt.figures.curves import draw_curve
from ldt.figures.detections import Boxes, Scene, draw_detections, short_names
from ldt.figures.style import PALETTE, save
from ldt.figures.tags import place_tags

CLASSES = ("Car", "Pedestrian", "Cyclist")
SIZE = (128, 256)


def boxes(n, seed, scored=True, classes=3):
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 80, (n, 2))
    corners = np.concatenate([start, start + rng.uniform(5, 40, (n, 2))], axis=1)
    return Boxes(corners, rng.integers(0, classes, n), rng.uniform(0, 1, n) if scored else None)


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
        drawn = sorted(patch.get_xy() for patch in axes.patches)
        assert np.allclose(drawn, sorted(map(tuple, given.corners[kept, :2])))
        scores = sorted(int(text.get_text().split()[-1]) for text in axes.texts)
        assert scores == sorted(round(100 * score) for score in given.scores[kept])


def test_boxes_lie_in_the_original_image_whatever_the_resolution_of_the_pixels():
    figure = draw_detections([scene(boxes(1, 0, scored=False), [boxes(1, 1)])], CLASSES, ["a"])
    for axes in figure.axes:
        assert axes.images[0].get_extent() == [0, SIZE[1], SIZE[0], 0]


def test_a_class_has_one_colour_in_every_panel_and_in_the_legend():
    one = Boxes(boxes(3, 0).corners, np.arange(3), np.full(3, 0.9))
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


def test_images_without_objects_and_of_any_shape_are_drawn(tmp_path):
    nothing = boxes(0, 0)
    scenes = [scene(nothing, [nothing], size=size) for size in ((375, 1242), (640, 427))]
    save(draw_detections(scenes, CLASSES, ["a"]), tmp_path / "new" / "detections.png")
    assert (tmp_path / "new" / "detections.png").stat().st_size > 0


def test_detections_of_another_number_of_detectors_are_refused():
    with pytest.raises(ValueError, match="one title a detector"):
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
        "ldt": [Point(0.5, [0.4, 0.5]), Point(0.2, [0.3, 0.3])],
        "l1": [Point(0.5, [0.35])],
    }
    figure = draw_comparison(methods, {"unpruned": Point(1.0, [0.4, 0.44])}, "mAP")
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"ldt", "l1", "unpruned"}
    assert np.allclose(lines["ldt"].get_xydata(), [(0.2, 0.3), (0.5, 0.45)])  # from small to large
    assert np.allclose(lines["l1"].get_xydata(), [(0.5, 0.35)])
    assert lines["unpruned"].get_linestyle() == "--"
    assert np.allclose(lines["unpruned"].get_ydata(), 0.42)
    assert len(axes.collections) == 2
    band = max(float(np.ptp(c.get_paths()[0].vertices[:, 1])) for c in axes.collections)
    assert band == pytest.approx(0.45 + np.std([0.4, 0.5], ddof=1) - 0.3)
    assert lines["ldt"].get_linewidth() > lines["l1"].get_linewidth()
    assert len({line.get_color() for line in lines.values()}) == 3


def test_nothing_to_compare_is_told():
    with pytest.raises(ValueError, match="no methods to compare"):
        draw_comparison({}, {}, "AP")
