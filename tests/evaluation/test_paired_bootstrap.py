"""Laws of the paired bootstrap."""

import numpy as np
import pytest

from ldt.evaluation.detection_rows import Boxes, Image
from ldt.evaluation.paired_bootstrap import (
    Interval,
    difference,
    effects,
    holm,
    resample,
    verdict,
)
from ldt.evaluation.resampled_ap import match

OBJECTS = 4


def image(generator, found, difficulty):
    """An image whose objects are found with a probability, which depends on the image too."""
    corner = generator.uniform(0, 300, (OBJECTS, 2))
    boxes = np.column_stack((corner, corner + 50))
    kept = generator.random(OBJECTS) < found - difficulty
    truths = Boxes(boxes, np.zeros(OBJECTS, int), np.zeros(OBJECTS), np.zeros(OBJECTS))
    scores = generator.random(OBJECTS)[kept]
    detections = Boxes(boxes[kept], np.zeros(kept.sum(), int), scores, np.zeros(kept.sum()))
    none = Boxes(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), np.zeros(0))
    return Image(detections, truths, none, None)


def folds(seed, found, folds=4, images=10):
    """Detections whose expected AP is about ``found``; difficulty is shared between methods."""
    result = {}
    for fold in range(folds):
        hard = np.random.default_rng([seed, fold]).uniform(-0.15, 0.15, images)
        own = np.random.default_rng([seed, fold, int(1000 * found)])
        result[fold] = match([image(own, found, each) for each in hard], 1)
    return result


def test_identical_detections_differ_by_exactly_nothing():
    same = folds(0, 0.6)
    found = difference(resample({"a": same, "b": dict(same)}, draws=300), "a", "b")
    assert found == Interval(0.0, 0.0, 0.0, 1.0, 4)
    assert verdict(found) == "equal"


@pytest.mark.slow
def test_an_interval_covers_a_known_difference():
    covered, widths = 0, []
    for seed in range(20):
        cells = {"a": folds(seed, 0.70), "b": folds(seed + 1000, 0.60)}
        found = difference(resample(cells, draws=200), "a", "b")
        covered += found.low <= 0.10 <= found.high
        widths.append(found.high - found.low)
    assert covered >= 16  # of 20 at 95 %; four folds make intervals a little short
    assert np.mean(widths) < 0.4


def test_what_images_have_in_common_cancels():
    one, two = folds(3, 0.6), folds(3, 0.5)
    paired = resample({"a": one, "b": two}, draws=300)
    alone = paired.contrast({"a": 1.0})
    same = resample({"a": one, "b": one}, draws=300).contrast({"a": 1.0, "b": -0.9})
    assert same.high - same.low < 0.2 * (alone.high - alone.low)


def test_draws_do_not_depend_on_the_other_cells():
    one, two = folds(1, 0.7), folds(2, 0.5)
    few = difference(resample({"a": one, "b": two}, draws=100), "a", "b")
    many = difference(resample({"c": two, "b": two, "a": one}, draws=100), "a", "b")
    assert few == many


def test_seeds_share_the_drawn_images():
    same = folds(0, 0.6, folds=1)[0]
    seeds = {seed: same for seed in range(4)}
    shared = resample({"a": seeds}, dict.fromkeys(seeds, "val"), draws=300).contrast({"a": 1})
    single = resample({"a": {0: same}}, {0: "val"}, draws=300).contrast({"a": 1})
    assert shared[:3] == pytest.approx(single[:3])  # repeated detections are no new evidence
    apart = resample({"a": seeds}, draws=300).contrast({"a": 1})
    assert apart.high - apart.low < 0.8 * (shared.high - shared.low)


def test_only_shared_replicates_count():
    one, two = folds(0, 0.6), folds(1, 0.6)
    few = {fold: two[fold] for fold in (0, 3)}
    assert difference(resample({"a": one, "b": few}, draws=50), "a", "b").replicates == 2
    with pytest.raises(ValueError, match="no fold or seed has all of a, b"):
        difference(resample({"a": {0: one[0]}, "b": {1: two[1]}}, draws=50), "a", "b")
    with pytest.raises(ValueError, match="not paired"):
        resample({"a": one, "b": folds(1, 0.6, images=8)}, draws=50)


def test_the_effects_of_a_factorial_add_up():
    levels = {("ldt", "ldt"): 0.8, ("ldt", "l1"): 0.7, ("plain", "ldt"): 0.6, ("plain", "l1"): 0.6}
    cells = {cell: folds(number, ap) for number, (cell, ap) in enumerate(levels.items())}
    found = resample(cells, draws=100)
    values = {cell: found.contrast({cell: 1.0}).value for cell in levels}
    by_name = effects(found, "ldt", "l1", ["ldt", "l1"])
    training, score, both = (by_name[key].value for key in ("training", "score", "interaction"))
    corner = values["ldt", "ldt"] - values["plain", "l1"]
    assert training + score == pytest.approx(corner)
    gains = [values["ldt", one] - values["plain", one] for one in ("ldt", "l1")]
    assert both == pytest.approx(gains[0] - gains[1])


def test_holm_is_between_one_test_and_bonferroni():
    ps = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.6}
    adjusted = holm(ps)
    assert all(ps[key] <= adjusted[key] <= min(1, 4 * ps[key]) for key in ps)
    assert adjusted["a"] == 0.04
    assert adjusted["b"] >= adjusted["c"]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.001, 0.2, "ahead"), (-0.2, -0.01, "behind"), (-0.009, 0.008, "equal"), (-0.02, 0, "open")],
)
def test_what_an_interval_says(low, high, said):
    assert verdict(Interval(0, low, high, 0.5, 5)) == said
