"""Laws of discriminant tracing, eqs. 13-16, and its agreement with a slow, obvious reference."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import tracing_reference
from scipy.stats import spearmanr
from small import SCOPE, Batch, Case, case

from ldt.criteria.base import score_groups
from ldt.criteria.ldt import LDTCriterion
from ldt.objects import Objects

PER_IMAGE = ("neck", "neck_all", "neck_energy", "discriminant")
REDUCES = ("absolute", "signed", "sum_absolute", "position", "position_absolute")


def layer_scores(
    subject: Case, batches: Sequence[Any], scope: Sequence[str] = SCOPE, **options: Any
) -> dict[str, np.ndarray]:
    """Scores of every layer by the criterion."""
    criterion, graph = LDTCriterion(**options), subject.graph(scope)
    score_groups(criterion, subject.target, graph, batches)
    return {name: criterion.channel_scores(layer).numpy() for name, layer in graph.scored.items()}


def double(name: str) -> Case:
    """A case in float64, so that the agreement of two computations is not a matter of rounding."""
    subject = case(name)
    subject.model.double()
    subject.example = subject.example.double()
    for batch in subject.batches:
        batch.images = batch.images.double()
    return subject


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, values in found.items():
        atol = 1e-6 * np.abs(expected[name]).max()
        np.testing.assert_allclose(values, expected[name], rtol=1e-6, atol=atol, err_msg=name)


def joined(batches: Sequence[Batch]) -> Batch:
    """All images in one batch."""
    starts = np.cumsum([0, *(len(batch.images) for batch in batches)])
    parts = [batch.objects for batch in batches]
    image = torch.cat([o.image + int(first) for o, first in zip(parts, starts, strict=False)])
    boxes, labels = torch.cat([o.boxes for o in parts]), torch.cat([o.labels for o in parts])
    objects = Objects(boxes, labels, image, parts[0].shape)
    return Batch(torch.cat([batch.images for batch in batches]), objects)


@pytest.mark.slow
@pytest.mark.parametrize("location", [True, False])
@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("source", PER_IMAGE)
def test_fast_equals_slow(source: Any, reduce: Any, location: bool) -> None:
    subject = double("shared")
    options = {"source": source, "reduce": reduce, "location": location, "phi": 0.3}
    expected = tracing_reference.scores(subject.target, subject.batches, **options)
    found = layer_scores(subject, subject.batches, **options)
    assert set(found) <= set(expected)
    assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("source", PER_IMAGE)
@pytest.mark.parametrize("name", ["residual", "concat", "depthwise", "groupnorm", "pyramid"])
def test_fast_equals_slow_on_every_kind_of_network(name: str, source: Any) -> None:
    subject = double(name)
    options = {"source": source, "reduce": "absolute", "location": True}
    expected = tracing_reference.scores(subject.target, subject.batches, **options)
    assert_close(layer_scores(subject, subject.batches, **options), expected)


@pytest.mark.slow
def test_the_detection_loss_is_traced_alike() -> None:
    subject = double("shared")
    images = tracing_reference.single_images(subject.batches)  # its loss is a mean over a batch
    options = {"source": "detection", "reduce": "absolute", "location": True}
    expected = tracing_reference.scores(subject.target, images, **options)
    assert_close(layer_scores(subject, images, (*SCOPE, "head"), **options), expected)


@pytest.mark.slow
def test_attention_follows_a_and_b() -> None:
    subject = double("chain")
    options: dict[str, Any] = {"source": "neck_all", "reduce": "absolute"}
    changed: dict[str, Any] = {"a": 0.5, "b": 0.5}
    expected = tracing_reference.scores(
        subject.target, subject.batches, location=True, **options, **changed
    )
    found = layer_scores(subject, subject.batches, **options, **changed)
    assert_close(found, expected)
    usual = layer_scores(subject, subject.batches, **options)
    assert any(not np.allclose(found[name], usual[name], rtol=0.05) for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("source", PER_IMAGE)
def test_order_and_size_of_batches_do_not_matter(source: Any) -> None:
    subject = double("residual")
    images = tracing_reference.single_images(subject.batches)
    expected = layer_scores(subject, subject.batches, source=source)
    for batches in (images, images[::-1], [joined(images)], [joined(images[3:] + images[:3])]):
        assert_close(layer_scores(subject, batches, source=source), expected)


@pytest.mark.slow
def test_images_without_objects_are_skipped() -> None:
    subject = double("residual")
    images = tracing_reference.single_images(subject.batches)
    with_objects = [one for one in images if len(one.objects.boxes)]
    assert len(with_objects) < len(images)
    expected = layer_scores(subject, [joined(with_objects)])
    assert_close(layer_scores(subject, images), expected)


def test_without_any_object_nothing_can_be_traced() -> None:
    subject = case("chain")
    empty = [
        one
        for one in tracing_reference.single_images(subject.batches)
        if not len(one.objects.boxes)
    ]
    with pytest.raises(ValueError, match=r"none of the calibration images contains an object"):
        layer_scores(subject, empty, source="neck_all")
    with pytest.raises(ValueError, match="use more images"):
        layer_scores(subject, empty, source="neck")


@pytest.mark.parametrize("name", ["pyramid", "chain"])
def test_channels_outside_of_the_discriminative_ones_score_nothing(name: str) -> None:
    subject, phi = case(name), 0.5
    chosen = tracing_reference.discriminative(subject.target, subject.batches, phi)
    found = layer_scores(subject, subject.batches, phi=phi)
    outputs = ["neck.out.0", "neck.out.1"] if name == "pyramid" else ["neck.0"]
    for layer, channels in zip(outputs, chosen, strict=True):
        assert 0 < len(channels) < 10
        assert set(np.flatnonzero(found[layer])) == set(channels)


def test_at_least_one_channel_less_than_classes_is_discriminative() -> None:
    subject = case("chain")
    found = layer_scores(subject, subject.batches, phi=0.999)
    assert np.count_nonzero(found["neck.0"]) == 2  # three classes


def test_classes_with_one_object_do_not_raise_that_number() -> None:
    subject = case("chain")
    for batch in subject.batches:
        batch.objects.labels.clamp_(max=1)
    subject.batches[0].objects.labels[0] = 2
    subject.batches[1].objects.labels[0] = 7
    found = layer_scores(subject, subject.batches, phi=0.999)
    assert np.count_nonzero(found["neck.0"]) == 1


@pytest.mark.parametrize(
    ("name", "producers"),
    [
        ("residual", ["backbone.0.0.0", "backbone.0.1.second.0"]),
        ("pyramid", ["neck.lateral.0", "neck.lateral.1"]),
    ],
)
def test_a_coupled_group_gets_the_sum_of_its_layers(name: str, producers: list[str]) -> None:
    subject, criterion = case(name), LDTCriterion()
    graph = subject.graph()
    grouped = score_groups(criterion, subject.target, graph, subject.batches)
    (group,) = [g for g in graph.groups.values() if {m.name for m in g.producers} == set(producers)]
    parts = [criterion.channel_scores(graph.scored[layer]) for layer in producers]
    assert all(bool(part.any()) for part in parts)
    torch.testing.assert_close(grouped[group.name], sum(parts))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared", "gfl_tiny"])
def test_layers_of_the_head_are_scored_with_the_detection_loss(name: str) -> None:
    subject = case(name)
    scope = (*SCOPE, "head" if name == "shared" else "bbox_head")
    batches = subject.batches
    found = layer_scores(subject, batches, scope)
    neck = layer_scores(subject, batches)
    detection = layer_scores(subject, batches, scope, source="detection")
    head = set(found) - set(neck)
    assert head
    assert_close({layer: found[layer] for layer in head}, detection)
    assert_close({layer: found[layer] for layer in neck}, neck)
    assert all(found[layer].any() for layer in head)
    assert any(not np.allclose(neck[layer], detection[layer], rtol=0.1) for layer in neck)


@pytest.mark.slow
@pytest.mark.parametrize("reduce", REDUCES)
def test_the_power_of_a_batch_is_traced_to_each_of_its_images(reduce: Any) -> None:
    """It is no sum over images, so the reference takes the batch as a whole."""
    subject = double("shared")
    batch = joined(subject.batches)
    options = {"source": "power", "reduce": reduce, "location": False, "phi": 0.3, "ridge": 0.2}
    found = layer_scores(subject, [batch], **options)
    images = len(batch.images)
    expected: dict[str, Any] = {}
    for d in range(images):
        traced = tracing_reference.trace(subject.target, batch, "power", (0.3, 0.2), d)
        for name, calls in traced.items():
            score = tracing_reference.image_score(calls, np.ones, reduce)
            expected[name] = expected.get(name, 0) + score / images
    assert_close(found, expected)


def test_the_rank_correlation_is_that_of_the_batches() -> None:
    subject = case("chain")
    graph, batches = subject.graph(), subject.batches
    assert len(batches) == 2
    alone = []
    for batch in batches:
        own = LDTCriterion(source="neck_all")
        score_groups(own, subject.target, graph, [batch])
        assert np.isnan(own.notes["rank_correlation"])
        alone.append([own.channel_scores(layer).numpy() for layer in graph.scored.values()])
    whole = LDTCriterion(source="neck_all")
    score_groups(whole, subject.target, graph, batches)
    pairs = [spearmanr(one, two).statistic for one, two in zip(*alone, strict=True)]
    assert whole.notes["rank_correlation"] == pytest.approx(np.mean(pairs))
    score_groups(whole, subject.target, graph, [batches[0]] * 3)
    assert whole.notes["rank_correlation"] == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("source", [*PER_IMAGE, "power", "detection"])
def test_every_source_and_reduction_ranks_channels(source: Any) -> None:
    subject = case("pyramid")
    for reduce in REDUCES:
        found = layer_scores(subject, [joined(subject.batches)], source=source, reduce=reduce)
        assert all(np.isfinite(values).all() and values.any() for values in found.values())
        assert reduce == "signed" or all((values >= 0).all() for values in found.values())


def test_scoring_again_starts_afresh() -> None:
    subject, criterion = case("chain"), LDTCriterion()
    graph = subject.graph()
    first = score_groups(criterion, subject.target, graph, subject.batches)
    second = score_groups(criterion, subject.target, graph, subject.batches)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("key", ["source", "reduce"])
def test_unknown_choices_list_the_known_ones(key: str) -> None:
    with pytest.raises(ValueError, match=rf"method\.criterion\.{key}='nose'; allowed: \w+, "):
        LDTCriterion(**{key: "nose"})  # type: ignore[arg-type]
