"""Sensitivity: what is measured is the detector with masked channels, which stays as it is."""

from typing import Any

import numpy as np
import pytest
import torch
from small import SCOPE, case
from torch_pruning.pruner.importance import GroupMagnitudeImportance, RandomImportance

from ldt.criteria.base import NoScoresError
from ldt.criteria.group_fisher import Fisher
from ldt.evaluation.sensitivity import Point, Sensitivity, mean_loss, measure_sensitivity
from ldt.figures.sensitivity_curves import draw_sensitivity
from ldt.pruning.budget import lowest_of


class NotTheFirst(GroupMagnitudeImportance):
    """Has no scores for the first group that it is asked for."""

    asked = 0

    def __call__(self, group: Any) -> Any:
        self.asked += 1
        if self.asked == 1:
            raise NoScoresError("it is the first")
        return super().__call__(group)


@pytest.mark.slow
def test_each_point_is_the_loss_with_masked_channels_of_one_group():
    subject = case("gfl_tiny")
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    criteria = {
        "l1": GroupMagnitudeImportance(p=1),
        "some": NotTheFirst(),
        "any": RandomImportance(),
    }
    told = []
    points, _ = measure_sensitivity(
        subject.target,
        criteria,
        subject.batches,
        lambda: mean_loss(subject.target, subject.batches),
        [0.3, 0.7],
        SCOPE,
        seed=0,
        tell=lambda *progress: told.append(progress),
    )
    after = subject.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    found = Sensitivity("loss", points, {})
    graph = subject.graph()
    count = len(graph.groups)
    assert len(found.curves()) == 3 * count - 1  # a criterion's gap is no other's
    assert told[-1][1:] == (2 * (3 * count - 1),) * 2
    with torch.no_grad():
        assert found.base == pytest.approx(mean_loss(subject.target, subject.batches))
    fisher = Fisher(graph)
    for point in [point for point in points if point.criterion == "l1" and point.removed][::7]:
        group = graph.groups[point.group]
        channels = lowest_of(group, criteria["l1"](group.raw)[: group.size], point.removed)
        fisher.mask({point.group: np.array(channels)})
        with fisher.record_gradients(), torch.no_grad():
            masked = mean_loss(subject.target, subject.batches)
        assert point.value == pytest.approx(masked, rel=1e-4)


def test_the_harm_of_a_group_is_its_mean_over_the_rates():
    rows = [("a", 0, 1.0), ("a", 1, 2.0), ("a", 2, 4.0), ("b", 0, 1.0), ("b", 1, 1.5)]
    points = [Point("l1", group, 4, removed, value) for group, removed, value in rows]
    assert Sensitivity("loss", points, {}).harm() == {"a": {"l1": 2.0}, "b": {"l1": 0.5}}
    falling = [point._replace(value=2 - point.value / 2) for point in points]
    assert Sensitivity("AP", falling, {}).harm() == {"a": {"l1": 1.0}, "b": {"l1": 0.25}}
    lost = [*points[:4], points[4]._replace(value=float("nan"))]
    assert list(Sensitivity("loss", lost, {}).harm()) == ["b", "a"]


@pytest.mark.parametrize("most", [1.01, 1.2, 2.0, 5.0, 30.0, 1e4])
def test_an_axis_has_numbers_however_far_the_losses_go(most):
    figure = draw_sensitivity({("l1", "a"): [(0.0, 1.7), (0.5, 1.7 * most)]}, "loss")
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 2
    assert low < 1.7 < 1.7 * most < high


def test_every_group_has_a_panel_and_every_criterion_a_line():
    points = [
        Point(criterion, group, 10, removed, 1.0 + removed * (1 + len(criterion)))
        for criterion in ("l1", "random")
        for group in ("backbone.a", "backbone.b", "neck.c")
        for removed in (0, 3, 6)
    ]
    found = Sensitivity("loss", points, {})
    figure = draw_sensitivity(found.curves(), "loss")
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["backbone.a", "backbone.b", "neck.c"]
    for axes in panels:
        lines = {
            line.get_label(): line for line in axes.lines if line.get_label() in ("l1", "random")
        }
        assert np.allclose(lines["l1"].get_xdata(), [0, 0.3, 0.6])
        assert np.allclose(lines["random"].get_ydata(), [1, 22, 43])
