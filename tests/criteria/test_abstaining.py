"""Criteria that have no scores for some groups, and importances of Torch-Pruning."""

from typing import Any

import pytest
import torch
from small import case
from torch import Tensor, nn
from torch_pruning.pruner import importance

from ldt.criteria.base import Criterion, NoScoresError, score_groups
from ldt.criteria.methods import find_method
from ldt.loop.pruning_round import Unpruned, check_rate, prune_round
from ldt.loop.schedule import PruningSchedule

REFUSED = {
    importance.GroupTaylorImportance: "taylor",
    importance.TaylorImportance: "taylor",
    importance.GroupHessianImportance: "obd",
    importance.OBDCImportance: "obd",
    importance.ActivationImportance: "chip",
}
OF_WEIGHTS = {
    kind
    for kind in vars(importance).values()
    if isinstance(kind, type) and issubclass(kind, importance.Importance)
} - {importance.Importance, importance.HessianImportance, *REFUSED}


class Widths(Criterion):
    """Scores groups of at most so many channels."""

    def __init__(self, most: int) -> None:
        self.most = most

    def collect(self, *_given: Any) -> None:
        pass

    def channel_scores(self, layer: nn.Module) -> Tensor:
        width = len(layer.weight)  # type: ignore[arg-type]
        if width > self.most:
            raise NoScoresError(f"{width} channels are too many")
        return torch.arange(width)


def test_a_group_without_scores_stays_whole_with_the_reason():
    subject = case("chain")
    graph = subject.graph()
    found = score_groups(Widths(10), subject.target, graph, [])
    assert set(found) == set(graph.groups) == {"backbone.0.0.0", "neck.0"}
    assert graph.excluded == {"backbone.0.1.0": "12 channels are too many"}
    assert set(graph.scored) == {"backbone.0.0.0", "neck.0"}


def test_returning_none_abstains_too():
    subject = case("chain")
    graph = subject.graph()
    found = score_groups(importance.BNScaleImportance(), subject.target, graph, [])
    assert set(found) == {"backbone.0.0.0", "backbone.0.1.0"}  # the neck has no batch norm
    assert graph.excluded == {"neck.0": "BNScaleImportance gives it no scores"}


def test_a_criterion_that_scores_nothing_is_told():
    subject = case("chain")
    told = r"Widths scores no group .*10 channels are too many; 12 channels are too many; 8"
    with pytest.raises(ValueError, match=told):
        score_groups(Widths(1), subject.target, subject.graph(), [])


@pytest.mark.slow
@pytest.mark.parametrize("inner_rounds", [1, 3])
def test_the_other_groups_are_pruned_to_the_rate(inner_rounds: int):
    subject = case("gfl_tiny")
    detector = subject.target
    unpruned = Unpruned.of(detector)
    schedule = PruningSchedule.one_shot(0.3, inner_rounds=inner_rounds)
    wide = {name for name, layer in detector.model.named_modules() if is_wide(layer)}
    before = {name: layer.out_channels for name, layer in convolutions(detector.model)}
    record = prune_round(detector, Widths(100), [], schedule, 1, unpruned)
    check_rate(detector, schedule, 1, unpruned, record)
    after = {name: layer.out_channels for name, layer in convolutions(detector.model)}
    told = {name for name, reason in record.excluded.items() if "too many" in reason}
    assert told == {name for name in wide if name.startswith(("backbone", "neck"))} != set()
    assert all(after[name] == before[name] for name in told)
    assert not told & set(record.kept)


def convolutions(model: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]


def is_wide(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.out_channels > 100


@pytest.mark.parametrize("kind", REFUSED)
def test_importances_that_lack_gradients_or_activations_are_refused(kind: Any):
    told = rf"{kind.__name__} needs gradients or activations .*method={REFUSED[kind]}"
    with pytest.raises(ValueError, match=told):
        find_method(kind())
    subject = case("chain")
    with pytest.raises(ValueError, match=told):
        score_groups(kind(), subject.target, subject.graph(), [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(OF_WEIGHTS, key=lambda kind: kind.__name__))
@pytest.mark.parametrize("network", ["residual", "concat", "stepwise", "gfl_tiny"])
def test_importances_of_weights_work_by_their_name(kind: Any, network: str):
    subject = case(network)
    graph = subject.graph()
    torch.manual_seed(0)
    scores = score_groups(find_method(kind()).criterion, subject.target, graph, [])
    for name, group in graph.groups.items():
        assert scores[name].shape == (group.size,)
        assert bool(scores[name].isfinite().all())
