"""Laws that every criterion of ``conf/method`` obeys, ours and Torch-Pruning's."""

import io
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from small import METHODS, Case, case, composed
from stand_in import DEVICE, StandIn, moved
from torch import Tensor, nn

from ldt.criteria.base import score_groups
from ldt.evaluation.profiling import count_parameters
from ldt.pruning.budget import TOLERANCE, select_channels
from ldt.pruning.costs import CostModel
from ldt.pruning.coupled_groups import CoupledGroup
from ldt.pruning.graph import PruningGraph
from ldt.pruning.structure import rebuild, record

NETWORKS = ["residual", "shared", "gfl_tiny"]
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
)


@cache
def method(name: str) -> Any:
    return composed(f"method={name}").method


def scores_of(subject: Case, name: str, graph: PruningGraph | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    criterion = instantiate(method(name).criterion)
    return score_groups(criterion, subject.target, graph or subject.graph(), subject.batches)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that scoring must leave alone."""
    return {
        "hooks": [len(getattr(m, kind)) for m in model.modules() for kind in HOOKS],
        "training": [m.training for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "types": [type(m) for m in model.modules()],
        "identities": [id(p) for p in model.parameters()],
    }


@dataclass
class Scored:
    """A network's scores, the size of each group, and its state before and after."""

    scores: dict[str, Tensor]
    sizes: dict[str, int]
    states: tuple[dict[str, Any], dict[str, Any]]
    weights: tuple[dict[str, Tensor], dict[str, Tensor]]


@cache
def scored(network: str, name: str) -> Scored:
    subject = case(network)
    graph = subject.graph()
    before = state(subject.model), deepcopy(subject.model.state_dict())
    scores = scores_of(subject, name, graph)
    after = state(subject.model), subject.model.state_dict()
    states, weights = zip(before, after, strict=True)
    return Scored(scores, {key: group.size for key, group in graph.groups.items()}, states, weights)


def known_scores(network: str, name: str) -> dict[str, Tensor]:
    return scored(network, name).scores


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", METHODS)
def test_one_finite_score_per_channel(name: str, network: str) -> None:
    scores = known_scores(network, name)
    assert {key: values.shape for key, values in scores.items()} == {
        key: (size,) for key, size in scored(network, name).sizes.items()
    }
    assert all(bool(values.isfinite().all()) for values in scores.values())
    assert any(len(values.unique()) > 1 for values in scores.values())


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", METHODS)
def test_scoring_leaves_the_network_alone(name: str, network: str) -> None:
    before, after = scored(network, name).states
    assert after == before
    assert before["gradients"] == []
    before, after = scored(network, name).weights
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", METHODS)
def test_equal_seeds_give_equal_scores(name: str, network: str) -> None:
    first, second = known_scores(network, name), scores_of(case(network), name)
    assert all(torch.equal(first[group], second[group]) for group in first)


def permute(group: CoupledGroup, order: np.ndarray) -> None:
    """Channel r of a group becomes what channel order[r] was, in every layer: same function."""
    for item in group.raw.items:
        layer = item.dep.target.module
        if not list(layer.parameters(recurse=False)):
            continue
        where = defaultdict(list)
        for index, root in zip(item.idxs, item.root_idxs, strict=True):
            where[root].append(index)
        dim = int(not group.raw._DG.is_out_channel_pruning_fn(item.dep.handler))
        for key, tensor in layer.state_dict(keep_vars=True).items():
            if tensor.ndim <= dim or (dim == 1 and key != "weight"):
                continue
            source = torch.arange(tensor.shape[dim])
            for root, new in where.items():
                source[new] = torch.tensor(where[int(order[root])])
            tensor.data.copy_(tensor.data.index_select(dim, source))


@pytest.mark.slow
@pytest.mark.parametrize(
    "network", ["residual", "concat", "shared", "groupnorm", "pyramid", "stepwise", "gated"]
)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "random"])
def test_permuting_channels_permutes_scores(name: str, network: str) -> None:
    expected = known_scores(network, name)
    subject = case(network)
    images = subject.batches[0].images
    before, graph, orders = subject.outputs(images), subject.graph(), {}
    rng = np.random.default_rng(0)
    for key, group in graph.groups.items():
        size = group.size // group.parts
        parts = [first + rng.permutation(size) for first in range(0, group.size, size)]
        orders[key] = np.concatenate(parts)
        permute(group, orders[key])
    for one, other in zip(before, subject.outputs(images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    found = scores_of(subject, name)
    for key, order in orders.items():
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(
            found[key], expected[key][torch.as_tensor(order)], rtol=1e-3, atol=1e-4 * scale
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_detector_is_cut_to_the_asked_rate_and_goes_on(name: str) -> None:
    subject, rate = case("gfl_tiny"), 0.5
    whole, graph = count_parameters(subject.model), subject.graph()
    channels = select_channels(
        graph,
        scores_of(subject, name, graph),
        CostModel(graph, "params"),
        save=rate * whole,
        tolerance=TOLERANCE * whole,
        ranking=method(name).ranking,
    )
    graph.remove(channels)
    assert 1 - count_parameters(subject.model) / whole == pytest.approx(rate, abs=TOLERANCE)

    subject.model.train()
    subject.target.detection_loss(subject.batches[0]).backward()
    gradients = [p.grad for p in subject.model.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert any(bool(g.any()) for g in gradients)

    subject.model.eval()
    file = io.BytesIO()
    torch.save([record(subject.model), subject.model.state_dict()], file)
    file.seek(0)
    structure, weights = torch.load(file, weights_only=True)
    fresh = case("gfl_tiny", seed=2)
    rebuild(fresh.model, structure, weights)
    fresh.model.load_state_dict(weights, strict=True)
    images = subject.batches[0].images
    for one, other in zip(subject.outputs(images), fresh.outputs(images), strict=True):
        assert torch.equal(one, other)
    assert all(values.isfinite().all() for values in scores_of(fresh, name).values())  # round two


@pytest.mark.slow
@pytest.mark.parametrize("network", ["residual", "gfl_tiny"])
@pytest.mark.parametrize("name", METHODS)
def test_scores_on_a_gpu_are_those_on_the_cpu(name: str, network: str) -> None:
    with StandIn():
        subject = moved(case(network))
        graph = subject.graph()
        found = scores_of(subject, name, graph)
        graph.remove({group: [0] for group, own in graph.groups.items() if own.parts == 1})
        assert all(p.device == DEVICE for p in subject.model.parameters())
        subject.forward(subject.model, subject.example)
    for group, values in known_scores(network, name).items():
        torch.testing.assert_close(found[group], values)
