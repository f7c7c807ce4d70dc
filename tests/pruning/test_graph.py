"""Laws of tracing and cutting, on small networks and on real detectors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import (
    REAL,
    SCOPE,
    SMALL,
    Case,
    Deformable,
    LayerNorm2d,
    Shared,
    SmallDetector,
    Stages,
    block,
    case,
    random_channels,
)
from torch import Tensor, nn
from torch.nn.functional import group_norm, layer_norm

from ldt.pruning import dependency
from ldt.pruning.coupled_groups import CoupledGroup
from ldt.pruning.dependency import ChannelParameter, Tracer, traceable_split_attention
from ldt.pruning.graph import PruningGraph
from ldt.pruning.layer_types import CONVOLUTIONS
from ldt.pruning.structure import channels, record

ALL = [*SMALL, *REAL]


def gone(group: CoupledGroup, removed: list[int]) -> dict[nn.Module, set[int]]:
    """Where the removed channels of a group come out of layers."""
    producers = {member.layer for member in group.members if member.side != "in"}
    found: dict[nn.Module, set[int]] = {}
    for item in group.raw.items:
        layer = item.dep.target.module
        if layer in producers and "in_channels" not in item.dep.handler.__name__:
            pairs = zip(item.idxs, item.root_idxs, strict=True)
            found.setdefault(layer, set()).update(i for i, root in pairs if root in removed)
    return found


def masked_outputs(
    subject: Case, graph: PruningGraph, removed: dict[str, list[int]]
) -> list[Tensor]:
    """The uncut network with the removed channels exactly 0 behind every layer that has them."""
    dead: dict[nn.Module, set[int]] = {}
    for name, group in graph.groups.items():
        for layer, indices in gone(group, removed[name]).items():
            dead.setdefault(layer, set()).update(indices)

    def mask(layer: nn.Module) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            if isinstance(layer, nn.GroupNorm):  # its statistics are those of what is left
                kept = [c for c in range(layer.num_channels) if c not in dead[layer]]
                weight, bias = layer.weight[kept], layer.bias[kept]
                left = group_norm(inputs[0][:, kept], layer.num_groups, weight, bias, layer.eps)
                output = output.index_copy(1, torch.tensor(kept), left)
            if isinstance(layer, LayerNorm2d):
                kept = [c for c in range(output.shape[1]) if c not in dead[layer]]
                x, weight, bias = inputs[0][:, kept].mT, layer.weight[kept], layer.bias[kept]
                left = layer_norm(x.transpose(1, 3), weight.shape, weight, bias).transpose(1, 3).mT
                output = output.index_copy(1, torch.tensor(kept), left)
            return output.index_fill(1, torch.tensor(sorted(dead[layer]), dtype=torch.long), 0.0)

        return hook

    hooks = [layer.register_forward_hook(mask(layer)) for layer in dead]
    parameters = [layer for layer in dead if isinstance(layer, ChannelParameter)]
    before = [layer.values.clone() for layer in parameters]
    for layer in parameters:
        layer.values.data.index_fill_(layer.dim, torch.tensor(sorted(dead[layer])), 0.0)
    try:
        return subject.outputs(subject.batches[0].images)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, values in zip(parameters, before, strict=True):
            layer.values.data.copy_(values)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SMALL)
def test_cutting_equals_masking(name: str, seed: int) -> None:
    check_masking(case(name, seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*REAL, "nanodet_g"])
def test_cutting_equals_masking_in_detectors(name: str) -> None:
    check_masking(case(name), seed=0)


def check_masking(subject: Case, seed: int) -> None:
    graph = subject.graph()
    removed = random_channels(graph, seed)
    assert any(removed.values())
    before = subject.outputs(subject.batches[0].images)
    masked = masked_outputs(subject, graph, removed)
    graph.remove(removed)
    sliced = subject.outputs(subject.batches[0].images)
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(before, masked, strict=True))
    for one, other in zip(masked, sliced, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_only_the_scope_loses_filters(name: str) -> None:
    subject = case(name)
    graph, before = subject.graph(), channels(record(subject.model))
    shapes = [m.shape for m in subject.outputs(subject.example)]
    graph.remove(random_channels(graph, seed=1))
    after, modules = channels(record(subject.model)), dict(subject.model.named_modules())
    shrunk = {layer for layer in before if after[layer] < before[layer]}
    outside = {layer for layer in shrunk if not layer.startswith(SCOPE)}
    assert shrunk - outside
    assert shrunk - outside <= set(graph.scored)
    assert all(modules[layer].groups == after[layer] for layer in outside)  # depthwise: follow
    assert all(after[layer] == before[layer] for layer in subject.predictors)
    assert [m.shape for m in subject.outputs(subject.example)] == shapes


def test_depthwise_layers_of_the_head_follow() -> None:
    subject = case("depthwise")
    graph = subject.graph()
    (group,) = [g for g in graph.groups.values() if any(m.name == "head.0" for m in g.members)]
    graph.remove({group.name: [0, 3]})
    head: Any = subject.model.get_submodule("head.0")
    assert (head.in_channels, head.out_channels, head.groups) == (8, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("scope", [("backbone",), ("neck",), SCOPE])
def test_every_layer_of_the_scope_is_cut_or_left_whole_with_a_reason(
    name: str, scope: tuple[str, ...]
) -> None:
    subject = case(name)
    graph = subject.graph(scope)
    layers = {
        layer
        for layer, module in subject.model.named_modules()
        if isinstance(module, CONVOLUTIONS) and layer.startswith(scope)
    }
    assert set(graph.scored) | set(graph.excluded) == layers
    assert not set(graph.scored) & set(graph.excluded)
    assert all(graph.excluded.values())
    cut, whole = graph.prunable_share()
    modules = dict(subject.model.named_modules())
    sizes = {n: sum(p.numel() for p in modules[n].parameters(recurse=False)) for n in layers}
    assert whole == sum(sizes.values())
    assert cut == sum(sizes[layer] for layer in graph.scored)


def odd_parts(middle: nn.Module, width: int) -> SmallDetector:
    return SmallDetector(
        Stages(nn.Sequential(block(3, 12, 4), middle)),
        Shared(*block(width, 8)),
        Shared(nn.Conv2d(8, 5, 1)),
    )


class TwoPaths(nn.Module):
    """GroupNorm over two convolutions' channels at once, some of its groups holding both."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(12, 6, 1), nn.Conv2d(12, 10, 1)
        self.norm = nn.GroupNorm(2, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([self.left(x), self.right(x)], 1))


class Halves(nn.Module):
    """Splits its channels at a place that is written in the code."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes if len(sizes) > 1 else sizes[0]
        self.conv, self.last = nn.Conv2d(12, 12, 1), nn.Conv2d(6, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(self.conv(x), self.sizes, 1)
        return self.last(left * right)


class Mixing(nn.Module):
    """An operation on all channels of a position at once, which looks like one on each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).softmax(1)


class Shuffling(nn.Module):
    """Takes channels apart, by a size that is written in the code, and puts them together anew."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        return maps.view(len(maps), 3, 4, *maps.shape[2:]).transpose(1, 2).flatten(1, 2)


class ShufflingSixes(Shuffling):
    """Shuffles groups of six channels, of which there are half as many after a trial."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (-1, 6)).transpose(1, -3).flatten(1, 2)


class Weighted(nn.Module):
    """A parameter of its own for every channel, which is read in an unusual way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.weight = nn.Conv2d(12, 12, 1), nn.Parameter(torch.rand(1, 12, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.weight.flip(1)


@pytest.mark.parametrize(
    ("middle", "width", "scope", "layer", "reason"),
    [
        (nn.ConvTranspose2d(12, 12, 2, 2, groups=2), 12, SCOPE, "backbone.0.1", "grouped"),
        (nn.Conv2d(12, 6, 1, groups=6), 6, SCOPE, "backbone.0.1", "from several input channels"),
        (TwoPaths(), 16, SCOPE, "backbone.0.1.left", "contain other channels"),
        (nn.Sequential(nn.Conv2d(12, 12, 1), nn.PixelShuffle(2)), 3, SCOPE, "backbone.0.1.0", ""),
        (Deformable(12, 12, 1), 12, SCOPE, "backbone.0.1.0.conv_offset", "coordinates"),
        (Halves(6), 12, SCOPE, "backbone.0.1.conv", "does not run without half"),
        (Halves(6, 6), 12, SCOPE, "backbone.0.1.conv", "split into parts"),
        (Mixing(), 12, SCOPE, "backbone.0.1.conv", "does not see"),
        (Shuffling(), 12, SCOPE, "backbone.0.1.conv", "does not"),
        (ShufflingSixes(), 12, SCOPE, "backbone.0.1.conv", "by a hard-coded number"),
        (Weighted(), 12, SCOPE, "backbone.0.1.conv", "parameter backbone.0.1.weight"),
        (nn.Identity(), 12, ("head",), "head.0", "predictions of head.0"),
    ],
)
def test_what_cannot_be_cut_says_why(
    middle: nn.Module, width: int, scope: tuple[str, ...], layer: str, reason: str
) -> None:
    model = odd_parts(middle, width).eval()
    example = torch.zeros(1, 3, 32, 48)
    graph = PruningGraph(model, lambda net, x: net(x), example, scope, predictors=["head.0"])
    assert reason in graph.excluded[layer]
    assert layer not in graph.scored
    graph.remove(random_channels(graph, seed=0, share=0.9))
    model(torch.randn(2, 3, 32, 48))


def test_layers_that_share_channels_with_the_outside_stay() -> None:
    subject = case("residual")
    graph = subject.graph(scope=["backbone.0.1"])
    assert set(graph.scored) == {"backbone.0.1.first.0"}
    assert "outside prune.scope" in graph.excluded["backbone.0.1.second.0"]


def test_a_layer_that_tracing_does_not_reach_is_reported() -> None:
    subject = case("chain")
    neck: Any = subject.model.neck
    neck.spare = nn.Conv2d(4, 4, 1)
    neck.forward = lambda maps: [neck[0](x) for x in maps]
    assert subject.graph().excluded == {"neck.spare": "not reached by tracing"}


def test_a_scope_without_layers_names_the_parts() -> None:
    with pytest.raises(ValueError, match=r"prune.scope=\['bakbone'\].*backbone, neck, head"):
        case("chain").graph(scope=["bakbone"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_flags_survive_and_the_network_still_trains(name: str) -> None:
    subject = case(name)
    graph, parameters = subject.graph(), dict(subject.model.named_parameters())
    frozen = set(list(parameters)[::3])
    for key, parameter in parameters.items():
        parameter.requires_grad_(key not in frozen)
    graph.remove(random_channels(graph, seed=2))
    assert {k for k, p in subject.model.named_parameters() if not p.requires_grad} == frozen
    subject.model.requires_grad_(True)
    for training in (False, True):
        subject.model.train(training).zero_grad()
        subject.target.detection_loss(subject.batches[0]).backward()
        gradients = [p.grad for p in subject.model.parameters() if p.grad is not None]
        assert gradients
        assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize(
    ("middle", "width"),
    [(Shuffling(), 12), (nn.Sequential(nn.Conv2d(12, 12, 1), nn.PixelShuffle(2)), 3)],
)
def test_a_trial_leaves_the_network_as_it_was(middle: nn.Module, width: int) -> None:
    model = odd_parts(middle, width).eval()
    parameters, sizes = dict(model.named_parameters()), record(model)
    images = torch.randn(1, 3, 32, 48)
    before = model(images)
    PruningGraph(model, lambda net, x: net(x), images, SCOPE)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert record(model) == sizes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, model(images), strict=True))


def test_grouped_convolutions_count_in_equal_parts() -> None:
    graph = case("grouped").graph()
    parts = {member.name: g.parts for g in graph.groups.values() for member in g.producers}
    assert parts["backbone.0.0.0"] == 3  # read by three groups
    assert parts["backbone.0.1.0"] == 6  # made by three, read by two
    assert parts["backbone.0.2.0"] == 2


def test_the_parts_of_a_split_count_equally() -> None:
    graph = case("res2net").graph()
    group = graph.groups["backbone.1.conv1"]
    assert (group.size, group.parts) == (12, 3)
    assert {"backbone.1.convs.0", "backbone.1.conv1"} == {m.name for m in group.producers}
    graph.remove({group.name: [0, 3, 5, 6, 8, 9]})
    block: Any = graph.model.get_submodule("backbone.1")
    assert (block.conv1.out_channels, block.width) == (6, 2)


@pytest.mark.parametrize("name", ["gated", "resnest"])
def test_what_is_multiplied_or_summed_part_by_part_goes_together(name: str) -> None:
    groups = case(name).graph().groups.values()
    found = [(g, m) for g in groups for m in g.producers if m.name == "backbone.1.conv"]
    ((group, member),) = found
    assert (group.size, group.parts) == (12, 1)
    assert set(member.channels.tolist()) == set(range(24))
    assert (member.roots == member.channels % 12).all()


def test_parameters_of_channels_are_members_of_groups() -> None:
    graph = case("parametric").graph()
    assert not graph.excluded
    found = {m.name for g in graph.groups.values() for m in g.members}
    own = {f"backbone.1.{name}" for name in ("scale", "places", "gamma")}
    assert own <= found
    assert "backbone.1.weights" not in found


def test_channels_that_a_shuffle_spreads_over_groups_go_together() -> None:
    graph = case("shuffled_groups").graph()
    made = [(g, m) for g in graph.groups.values() for m in g.producers]
    ((group, member),) = [(g, m) for g, m in made if m.name == "backbone.1.first.0"]
    assert group.size == 6
    assert (member.roots == member.channels % 6).all()
    halves = case("shuffled_halves").graph()
    passing = halves.groups["backbone.0.0.0"]
    assert (passing.size, passing.parts) == (16, 4)  # two splits, the second of half of the first
    assert {f"backbone.0.1.steps.{i}.0.0" for i in (0, 1)} <= set(halves.groups)


def test_a_search_that_finds_ever_more_channels_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    build = Tracer.build_dependency

    def misread(self: Tracer, *given: Any, **options: Any) -> None:
        """As if every operation moved the channels on, and back to where they had not come from."""
        build(self, *given, **options)
        for node in self.module2node.values():
            for edge in node.dependencies:
                edge.index_mapping[1] = lambda found: [i._replace(idx=i.idx + 1) for i in found]

    with monkeypatch.context() as patch:
        patch.setattr(Tracer, "build_dependency", misread)
        graph = case("residual").graph()
    assert not graph.groups
    assert set(graph.excluded) == set(case("residual").graph().scored)
    assert all("does not have" in reason for reason in graph.excluded.values())
    monkeypatch.setattr(dependency, "MOST_CHANNELS", 20)
    found = case("residual").graph()
    assert "ever more" in found.excluded["backbone.0.1.second.0"]
    assert not set(found.excluded) & set(found.scored)


def test_split_attention_is_traced_as_what_it_computes() -> None:
    subject = case("resnest")
    expected = subject.outputs(subject.batches[0].images)
    with traceable_split_attention(subject.model):
        found = subject.outputs(subject.batches[0].images)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    again = subject.outputs(subject.batches[0].images)
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))


def test_group_norm_counts_in_equal_parts() -> None:
    graph = case("groupnorm").graph()
    parts = {member.name: g.parts for g in graph.groups.values() for member in g.producers}
    assert parts["backbone.0.0"] == 4
    assert parts["neck.1.0"] == 8
    assert parts["backbone.1.0"] == 1


def test_two_group_norms_count_in_their_least_common_multiple() -> None:
    norms = nn.Sequential(nn.GroupNorm(4, 24), nn.GroupNorm(6, 24))
    model = odd_parts(nn.Sequential(nn.Conv2d(12, 24, 1), norms), 24).eval()
    graph = PruningGraph(model, lambda net, x: net(x), torch.zeros(1, 3, 32, 48), SCOPE)
    (group,) = [g for g in graph.groups.values() if g.size == 24]
    assert group.parts == 12
    graph.remove({group.name: list(range(0, 24, 2))})
    assert (norms[0].num_channels, norms[1].num_channels) == (12, 12)
    model(torch.zeros(1, 3, 32, 48))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shared", {"backbone.0.0": "backbone.0.1", "neck.1.0": "neck.1.1", "head.0": "head.1"}),
        ("residual", {"backbone.0.1.second.0": "backbone.0.1.second.1"}),
        ("groupnorm", {"neck.1.0": "neck.1.1"}),
    ],
)
def test_the_norm_behind_a_convolution_is_known(name: str, expected: dict[str, str]) -> None:
    found = case(name).graph().norm_of
    assert {layer: found.get(layer) for layer in expected} == expected


def test_convolutions_without_a_norm_of_their_own_have_none() -> None:
    model = odd_parts(TwoPaths(), 16).eval()
    graph = PruningGraph(model, lambda net, x: net(x), torch.zeros(1, 3, 32, 48), SCOPE)
    assert "backbone.0.1.left" not in graph.norm_of
    assert "neck.lateral.0" not in case("shared").graph().norm_of


def test_a_shared_layer_is_counted_once_per_call() -> None:
    subject = case("shared")
    found = subject.graph().positions
    assert found["backbone.1.0"] == 4 * 6
    assert found["neck.1.0"] == found["head.3"] == 8 * 12 + 4 * 6
