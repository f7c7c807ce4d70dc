"""Figures of a run's accuracy and training, and the numbers they show."""

import math

import numpy as np
import pandas as pd
import pytest
from detections import CLASSES, random_samples

from ldt.evaluation import kept_detections
from ldt.evaluation.confusion import confusion_matrix
from ldt.evaluation.detection_rows import images_of, rows_of
from ldt.evaluation.metrics import coco_ap, precision_curves
from ldt.figures.accuracy import draw_class_ap, draw_confusion, draw_precision_recall
from ldt.figures.from_runs import accuracy_figures
from ldt.figures.labels import draw_labels
from ldt.figures.training import draw_training


@pytest.fixture(scope="module")
def table():
    return np.concatenate([rows_of(sample, CLASSES).numpy() for sample in random_samples(3, 40)])


@pytest.fixture(scope="module")
def images(table):
    return images_of(table, len(CLASSES))


def perfect(image):
    """Detections that are the objects, with full scores."""
    truths = image.truths
    sure = type(truths)(truths.boxes, truths.labels, np.ones(len(truths.labels)), truths.areas)
    return type(image)(sure, truths, image.ignored, image.kitti)


# Numbers ----------------------------------------------------------------------------------------


def test_the_area_below_a_curve_is_the_ap_of_its_class(images):
    curves, *higher = precision_curves(images, len(CLASSES))
    averages, _ = coco_ap(images, len(CLASSES))
    assert np.nanmean([curves, *higher]) == pytest.approx(averages["AP"], abs=1e-6)
    assert np.nanmean(curves.mean(axis=0)) == pytest.approx(averages["AP50"], abs=1e-6)
    for label in range(len(CLASSES)):
        alone = [only(image, label) for image in images]
        expected = coco_ap(alone, len(CLASSES))[0]["AP50"]
        assert curves[:, label].mean() == pytest.approx(expected, abs=1e-6, nan_ok=True)


def only(image, label):
    """The boxes of one class."""
    parts = [
        type(boxes)(*(values[boxes.labels == label] for values in vars(boxes).values()))
        for boxes in (image.detections, image.truths, image.ignored)
    ]
    return type(image)(*parts, image.kitti)


def test_a_class_without_objects_has_no_curve(images):
    there = np.isin(range(len(CLASSES)), np.concatenate([i.truths.labels for i in images]))
    assert 0 < there.sum() < len(CLASSES)
    curves = precision_curves(images, len(CLASSES))
    assert np.isnan(curves[..., ~there]).all()
    assert np.isfinite(curves[..., there]).all()
    assert np.isnan(precision_curves([], 2)).all()


def test_every_object_is_counted_once_and_every_sure_detection_at_most_once(images):
    counts = confusion_matrix(images, len(CLASSES), score=0.4)
    truths = np.concatenate([image.truths.labels for image in images])
    sure = np.concatenate([i.detections.labels[i.detections.scores >= 0.4] for i in images])
    assert counts[:-1].sum(axis=1).tolist() == np.bincount(truths, minlength=len(CLASSES)).tolist()
    assert (counts[:, :-1].sum(axis=0) <= np.bincount(sure, minlength=len(CLASSES))).all()
    assert counts[-1, -1] == 0


def test_perfect_detections_confuse_nothing(images):
    counts = confusion_matrix([perfect(image) for image in images], len(CLASSES))
    truths = np.concatenate([image.truths.labels for image in images])
    expected = np.diag([*np.bincount(truths, minlength=len(CLASSES)), 0])
    assert counts.tolist() == expected.tolist()


def test_what_is_detected_as_another_class_missed_or_ignored(images):
    image = next(i for i in images if len(i.truths.labels) and not len(i.ignored.labels))
    image = perfect(image)
    labels = (image.detections.labels + 1) % len(CLASSES)
    boxes, truths = image.detections, image.truths
    wrong = type(boxes)(boxes.boxes, labels, boxes.scores, boxes.areas)
    counts = confusion_matrix([type(image)(wrong, truths, image.ignored, None)], len(CLASSES))
    assert counts.trace() == 0
    assert counts[:-1, :-1].sum() == len(labels)
    away = type(boxes)(boxes.boxes + 1e4, labels, boxes.scores, boxes.areas)
    counts = confusion_matrix([type(image)(away, truths, image.ignored, None)], len(CLASSES))
    assert counts[-1, :-1].sum() == counts[:-1, -1].sum() == len(labels)
    ignored = type(boxes)(away.boxes, labels, boxes.scores, boxes.areas)
    counts = confusion_matrix([type(image)(away, truths, ignored, None)], len(CLASSES))
    assert counts[-1].sum() == 0


# Figures ----------------------------------------------------------------------------------------


def test_kept_detections_are_drawn_base_beside_pruned(table, images, tmp_path):
    kept = {name: tmp_path / f"{name}.npz" for name in ("base", "round 2")}
    for file in kept.values():
        kept_detections.save(file, table, CLASSES)
    drawn = accuracy_figures(kept)
    assert set(drawn) == {"precision_recall", "class_ap", "confusion"}
    for name in ("precision_recall", "confusion"):
        assert [axes.get_title() for axes in drawn[name].axes] == ["base", "round 2"]
    (bars,) = drawn["class_ap"].axes
    one, two = ([bar.get_width() for bar in group] for group in bars.containers)
    known = [ap for ap in coco_ap(images, len(CLASSES))[1] if math.isfinite(ap)]
    assert one == two == pytest.approx(known, abs=1e-3)


def test_without_any_object_no_accuracy_is_drawn(tmp_path):
    kept_detections.save(tmp_path / "a.npz", np.zeros((0, 11)), CLASSES)
    assert accuracy_figures({"base": tmp_path / "a.npz"}) == {}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 6, 7, 80])
def test_any_number_of_classes_fits(count):
    generator = np.random.default_rng(0)
    names = [f"class {i}" for i in range(count)]
    curves = np.sort(generator.random((101, count)), axis=0)[::-1].copy()
    curves[:, 0] = np.nan if count > 1 else 1.0
    figures = [
        draw_precision_recall({"base": curves, "round 1": curves}, names),
        draw_class_ap({"base": generator.random(count), "round 1": [0.0] * count}, names),
        draw_confusion({"base": generator.integers(0, 9, (count + 1, count + 1))}, names),
        draw_labels({"training": generator.integers(0, 900, count)}, {"training": []}, names),
    ]
    for figure in figures:
        figure.set_dpi(40)
        figure.canvas.draw()
        assert all(math.isfinite(limit) for axes in figure.axes for limit in axes.get_ylim())


def test_labels_are_counted_by_class_and_split_most_frequent_first():
    counts = {"training": [3, 50, 0], "validation": [1, 9, 2]}
    figure = draw_labels(counts, {"training": [100.0, 4e4], "validation": []}, ["a", "b", "c"])
    left = figure.axes[0]
    assert [label.get_text() for label in left.get_yticklabels()] == ["b", "a", "c"]
    widths = [[bar.get_width() for bar in group] for group in left.containers]
    assert widths == [[50, 3, 0], [9, 1, 2]]
    assert left.get_xscale() == "linear"
    wide = draw_labels({"training": [3, 500, 1]}, {"training": []}, ["a", "b", "c"])
    assert wide.axes[0].get_xscale() == "symlog"


def log_of(steps, epochs, ends, last=None):
    """A log with a loss every other step, a validation after every epoch, and ends of rounds.

    A round is logged at the number of steps that it took, which is that of the step after it.
    """
    log = pd.DataFrame(index=pd.Index(range(steps + 1), name="step"))
    numbers = log.index.to_numpy()
    log["epoch"] = numbers // (steps // epochs)
    log.loc[steps, "epoch"] = epochs - 1
    log["train/loss"] = np.where(numbers % 2, 1.0 / (1 + numbers), np.nan)
    log["val/AP"] = np.where((numbers + 1) % (steps // epochs) == 0, 0.3, np.nan)
    log["round/round"] = [float(ends.index(s)) if s in ends else np.nan for s in numbers]
    return log if last is None else log.loc[:last]


def test_losses_and_metrics_are_shown_over_epochs_with_a_line_at_every_cut():
    figure = draw_training(log_of(40, 10, [24, 32, 40]), ["AP", "mAP"])
    loss, ap = (axes for axes in figure.axes if axes.axison)
    assert (loss.get_title(), ap.get_title()) == ("loss", "AP (IoU 0.50:0.95)")
    assert ap.lines[0].get_xdata().tolist() == pytest.approx(list(range(1, 11)))
    for axes in (loss, ap):
        cuts = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
        assert cuts == pytest.approx([6, 8])  # the end of the last round is none


@pytest.mark.parametrize("last", [1, 5, 9, 25])
def test_an_epoch_that_is_not_over_is_no_whole_one(last):
    loss = draw_training(log_of(40, 10, [], last), []).axes[0]
    assert loss.lines[0].get_xdata().tolist() == pytest.approx(
        [(step + 1) / 4 for step in range(1, last + 1, 2)], rel=0 if last > 3 else 1
    )


def test_a_log_without_epochs_is_refused():
    log = log_of(40, 10, [40]).drop(columns="epoch")
    with pytest.raises(ValueError, match="which epoch"):
        draw_training(log, ["AP"])


def test_quantities_without_a_finite_value_are_omitted():
    log = log_of(40, 10, [40])
    log["val/AP"], log["train/loss_a"] = np.nan, np.inf
    figure = draw_training(log, ["AP"])
    assert [axes.get_title() for axes in figure.axes if axes.axison] == ["loss"]


def test_a_log_without_losses_and_metrics_is_refused():
    with pytest.raises(ValueError, match="no loss"):
        draw_training(pd.DataFrame({"epoch": [0.0]}, index=pd.Index([0], name="step")), ["AP"])
