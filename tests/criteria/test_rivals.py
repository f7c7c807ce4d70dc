"""HRank, CHIP, GroupFisher and PX equal slow references written from their papers' formulas."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from small import REAL, Batch, Case, case, composed
from torch import Tensor, nn
from torch.nn import functional as F

from ldt.criteria.base import score_groups
from ldt.criteria.chip import CHIPCriterion, channel_independence
from ldt.criteria.group_fisher import Fisher, GroupFisherCriterion
from ldt.criteria.hrank import HRankCriterion
from ldt.criteria.px import PXCriterion
from ldt.criteria.taylor import OBDCriterion, TaylorCriterion
from ldt.pruning.graph import PruningGraph
from ldt.pruning.layer_types import CONVOLUTIONS
from ldt.pruning.trial import restored

RIVALS = {
    "hrank": HRankCriterion,
    "chip": CHIPCriterion,
    "group_fisher": GroupFisherCriterion,
    "px": PXCriterion,
    "taylor": TaylorCriterion,
    "obd": OBDCriterion,
}


def double(name: str) -> Case:
    """A small network whose every number is float64."""
    subject = case(name)
    subject.model.double()
    subject.example = subject.example.double()
    subject.batches = [Batch(b.images.double(), b.objects) for b in subject.batches]
    return subject


def chain_maps(subject: Case) -> dict[str, list[Tensor]]:
    """The plain network's maps behind their activation, each image by itself, [C, h, w]."""
    backbone, neck = subject.model.backbone[0], subject.model.neck
    found: dict[str, list[Tensor]] = {"backbone.0.0.0": [], "backbone.0.1.0": [], "neck.0": []}
    with torch.no_grad():
        for image in torch.cat([batch.images for batch in subject.batches]):
            (conv, norm, _), (conv2, norm2, _) = backbone
            x = norm(conv(image[None])).clamp(min=0)
            found["backbone.0.0.0"].append(x[0])
            x = norm2(conv2(x)).clamp(min=0)
            found["backbone.0.1.0"].append(x[0])
            found["neck.0"].append(neck[0](x)[0])
    return found


# HRank ----------------------------------------------------------------------------------------


def test_hrank_is_the_mean_matrix_rank_of_pooled_maps():
    subject, criterion = case("chain"), HRankCriterion(size=6, tolerance=0.05)
    scores = score_groups(criterion, subject.target, subject.graph(), subject.batches)
    for layer, maps in chain_maps(subject).items():
        for c in range(len(maps[0])):
            pooled = [F.adaptive_avg_pool2d(x[c][None], 6)[0] for x in maps]
            ranks = [int(torch.linalg.matrix_rank(x, rtol=0.05)) for x in pooled]
            extra = float(scores[layer][c]) - np.mean(ranks)
            assert -1e-9 <= extra <= 0.5 / len(maps) + 1e-9


def test_small_maps_are_not_pooled():
    subject, criterion = case("chain"), HRankCriterion(size=100, tolerance=1e-3)
    scores = score_groups(criterion, subject.target, subject.graph(), subject.batches)
    for layer, maps in chain_maps(subject).items():
        ranks = torch.stack([torch.linalg.matrix_rank(x, rtol=1e-3) for x in maps]).double()
        extra = scores[layer] - ranks.mean(0)
        assert bool(((extra > -1e-9) & (extra < 0.5 / len(maps) + 1e-9)).all())


def test_equal_ranks_are_ordered_by_the_nuclear_norm():
    subject, criterion = case("chain"), HRankCriterion(size=3)  # nearly all have rank 3
    scores = score_groups(criterion, subject.target, subject.graph(), subject.batches)
    tied = everything = 0
    for layer, maps in chain_maps(subject).items():
        pooled = torch.stack([F.adaptive_avg_pool2d(x, 3) for x in maps])
        ranks = torch.linalg.matrix_rank(pooled, rtol=1e-2).double().mean(0)
        norms = torch.linalg.matrix_norm(pooled.double(), "nuc").sum(0)
        expected = np.lexsort((norms.numpy(), ranks.numpy()))
        assert scores[layer].argsort().tolist() == expected.tolist()
        for rank in ranks.tolist():
            tied += ranks.tolist().count(rank) > 1
            everything += 1
    assert criterion.notes == {"tied_channels": pytest.approx(tied / everything)}
    assert tied / everything > 0.5


# CHIP -----------------------------------------------------------------------------------------


def independence(x: Tensor) -> Tensor:
    """||X||_* - ||X with row c zeroed||_*, by one SVD per row."""
    found = []
    for c in range(len(x)):
        without = x.clone()
        without[c] = 0
        found.append(torch.linalg.svdvals(x).sum() - torch.linalg.svdvals(without).sum())
    return torch.stack(found)


@pytest.mark.parametrize("shape", [(1, 7), (12, 40), (40, 12), (20, 20)])
@pytest.mark.parametrize("kind", ["full", "low rank", "scaled", "dead and doubled"])
def test_channel_independence_equals_one_svd_per_channel(shape: tuple[int, int], kind: str):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    if kind == "low rank":
        x = x[:, :1] @ x[:1] + 0.5 * x[:, -1:] @ x[-1:]
    if kind == "scaled":
        x = x * torch.logspace(-3, 3, len(x), dtype=torch.double)[:, None]
    if kind == "dead and doubled":
        x[0], x[-1] = 0, x[len(x) // 2]
    found, norm = channel_independence(x)
    assert float(norm) == pytest.approx(float(torch.linalg.matrix_norm(x, "nuc")), rel=1e-6)
    torch.testing.assert_close(found, independence(x), rtol=1e-6, atol=1e-6 * float(norm))


def test_a_dead_layer_has_no_independence():
    found, norm = channel_independence(torch.zeros(5, 9))
    assert found.tolist() == [0.0] * 5
    assert float(norm) == 0


@pytest.mark.parametrize("normalise", [True, False])
def test_chip_averages_over_images(normalise: bool):
    subject, criterion = double("chain"), CHIPCriterion(normalise)
    scores = score_groups(criterion, subject.target, subject.graph(), subject.batches)
    for layer, maps in chain_maps(subject).items():
        rows = [x.flatten(1) for x in maps]
        mean = torch.stack([independence(x) for x in rows]).mean(0)
        norm = torch.stack([torch.linalg.matrix_norm(x, "nuc") for x in rows]).mean()
        expected = mean / norm if normalise else mean
        torch.testing.assert_close(scores[layer], expected, rtol=1e-6, atol=1e-6)


# GroupFisher ----------------------------------------------------------------------------------


@contextmanager
def masked(graph: PruningGraph, name: str, channel: int, image: int, value: float) -> Iterator[Any]:
    """One image's channel of a group times `value`, in front of every layer that reads it."""

    def multiply(where: Tensor) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
            mask = torch.ones_like(inputs[0])
            mask[image, where] = value
            return inputs[0] * mask

        return hook

    hooks = []
    for member in graph.groups[name].members:
        if member.side != "out" and isinstance(member.layer, CONVOLUTIONS):
            where = torch.as_tensor(member.channels[member.roots == channel])
            hooks.append(member.layer.register_forward_pre_hook(multiply(where)))
    yield
    for hook in hooks:
        hook.remove()


def mask_gradient(subject: Case, graph: PruningGraph, name: str, channel: int, batch: Any) -> Any:
    """d loss / d mask of every image, by central differences."""
    step = 1e-4
    found = []
    for image in range(len(batch.images)):
        sides = []
        for value in (1 + step, 1 - step):
            with masked(graph, name, channel, image, value), torch.no_grad():
                sides.append(float(subject.target.detection_loss(batch)))
        found.append((sides[0] - sides[1]) / (2 * step))
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chain", "residual", "concat", "shared", "depthwise"])
def test_group_fisher_sums_squared_mask_gradients(name: str):
    subject, criterion = double(name), GroupFisherCriterion(cost="none")
    graph = subject.graph()
    scores = score_groups(criterion, subject.target, graph, subject.batches)
    for key, group in graph.groups.items():
        expected = [
            sum(
                (mask_gradient(subject, graph, key, channel, batch) ** 2).sum()
                for batch in subject.batches
            )
            for channel in range(group.size)
        ]
        np.testing.assert_allclose(scores[key], expected, rtol=1e-5, atol=1e-6 * max(expected))
    assert max(values.max() for values in scores.values()) > 0


def test_group_fisher_loops_over_samples_and_positions_of_a_plain_network():
    subject = double("chain")
    scores = score_groups(
        GroupFisherCriterion(cost="none"), subject.target, subject.graph(), subject.batches
    )
    (conv, norm, _), (conv2, norm2, _) = subject.model.backbone[0]
    expected = torch.zeros(8, dtype=torch.double)
    for batch in subject.batches:
        a = norm(conv(batch.images)).clamp(min=0).detach().requires_grad_()
        maps = [subject.model.head[0](subject.model.neck[0](norm2(conv2(a)).clamp(min=0)))]
        torch.stack([m.sigmoid().square().mean() for m in maps]).sum().backward()
        assert a.grad is not None
        for n in range(len(a)):
            for c in range(8):
                expected[c] += (a[n, c] * a.grad[n, c]).sum().detach() ** 2
    torch.testing.assert_close(scores["backbone.0.0.0"], expected, rtol=1e-6, atol=1e-15)


def test_group_fisher_divides_by_what_a_channel_costs():
    subject = case("shared")
    graph = subject.graph()

    def scores(cost: Any) -> dict[str, Tensor]:
        criterion = GroupFisherCriterion(cost)
        return score_groups(criterion, subject.target, graph, subject.batches)

    plain, memory, flops = scores("none"), scores("memory"), scores("flops")
    # backbone.0 makes an 8x12 map; its norm and the 1x1 lateral convolution read it, and
    # backbone.1, which makes 12 channels of 4x6
    key = "backbone.0.0"
    torch.testing.assert_close(plain[key] / memory[key], torch.full((8,), 96.0).double())
    work = 96 * (3 * 9 + 2) + 96 * 8 + 24 * 12 * 9
    torch.testing.assert_close(plain[key] / flops[key], torch.full((8,), float(work)).double())
    with pytest.raises(ValueError, match=r"cost='acts'; allowed: memory, flops, none"):
        GroupFisherCriterion("acts")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["chain", "residual", "concat", "shared", "depthwise", "gfl_tiny"])
def test_masked_channels_are_as_good_as_cut(name: str):
    subject = case(name)
    graph = subject.graph()
    rng = np.random.default_rng(0)
    gone = {
        key: rng.permutation(group.size)[: group.size // 2] for key, group in graph.groups.items()
    }
    fisher = Fisher(graph)
    fisher.mask(gone)
    images = subject.batches[0].images
    with fisher.record_gradients():
        expected = subject.outputs(images)
    graph.remove({key: sorted(channels.tolist()) for key, channels in gone.items()})
    for one, other in zip(expected, subject.outputs(images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# PX -------------------------------------------------------------------------------------------


class Gate(nn.Module):
    """An activation that records its gates, or multiplies by those of its recorder."""

    def __init__(self, recorder: "Gate | None" = None) -> None:
        super().__init__()
        self.gates: list[Tensor] = [] if recorder is None else recorder.gates
        self.records = recorder is None

    def forward(self, x: Tensor) -> Tensor:
        if not self.records:
            return x * self.gates.pop(0)
        self.gates.append((x > 0).to(x))
        return x.clamp(min=0)


def with_activations(model: nn.Module, replacement: Callable[[str], nn.Module]) -> nn.Module:
    """A copy of a network with all its ReLU modules replaced."""
    copy = deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            copy.set_submodule(name, replacement(name))
    return copy


def authors_networks(subject: Case) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The networks of the authors' code: one records gates, z1 and z2 are in training mode."""
    gates: dict[str, Gate] = defaultdict(Gate)
    activation = with_activations(subject.model, lambda name: gates[name])
    z1 = with_activations(subject.model, lambda name: Gate(gates[name])).train()
    z2 = with_activations(subject.model, lambda _name: nn.Identity()).train()
    for network, change in ((z1, torch.ones_like), (z2, torch.square)):
        for name, layer in network.named_modules():
            if isinstance(layer, nn.Conv2d) and name not in subject.predictors:
                layer.weight.data = change(layer.weight.data)
                layer.bias = None
    return activation.eval(), z1, z2


@pytest.mark.slow
@pytest.mark.parametrize("aggregate", ["mean", "sum"])
@pytest.mark.parametrize(
    "name", ["chain", "residual", "concat", "shared", "depthwise", "groupnorm", "layernorm"]
)
def test_px_keeps_batch_norms_and_predictors_as_the_authors_do(name: str, aggregate: Any):
    subject, criterion = double(name), PXCriterion(aggregate=aggregate)
    graph = subject.graph()
    scores = score_groups(criterion, subject.target, graph, subject.batches)
    activation, z1, z2 = authors_networks(subject)
    for images in (batch.images for batch in subject.batches):
        with torch.no_grad():
            activation(images)
            active = z1(images.square())
        weights = z2(torch.ones_like(images))
        torch.stack([(a * b).sum() for a, b in zip(active, weights, strict=True)]).sum().backward()
    layers = dict(z2.named_modules())
    for key, group in graph.groups.items():
        total, count = torch.zeros(2, group.size, dtype=torch.double)
        for member in (m for m in group.producers if m.name in graph.scored):
            square: Any = layers[member.name].weight
            score = (square.grad.abs() * square.detach()).sum((1, 2, 3))
            total.index_add_(0, torch.as_tensor(member.roots), score[member.channels])
            each = torch.full((len(member.roots),), square[0].numel()).double()
            count.index_add_(0, torch.as_tensor(member.roots), each)
        expected = total / count if aggregate == "mean" else total
        torch.testing.assert_close(scores[key], expected, rtol=1e-6, atol=1e-9 * expected.max())


def test_px_fused_equals_its_two_auxiliary_networks():
    subject = double("chain")
    criterion = PXCriterion(bn="fuse", aggregate="sum")
    scores = score_groups(criterion, subject.target, subject.graph(), subject.batches)
    (conv, norm, _), (conv2, norm2, _) = subject.model.backbone[0]
    neck, head = subject.model.neck[0], subject.model.head[0]

    def fuse(layer: Any, after: Any) -> Tensor:
        return (
            layer.weight
            * (after.weight / (after.running_var + after.eps).sqrt())[:, None, None, None]
        )

    fused = [(fuse(conv, norm), 2), (fuse(conv2, norm2), 2), (neck.weight, 1), (head.weight, 1)]
    squares = [weight.detach().square().requires_grad_() for weight, _ in fused]
    R = torch.zeros((), dtype=torch.double)
    for image in torch.cat([batch.images for batch in subject.batches]):
        with torch.no_grad():
            first = norm(conv(image[None]))
            gates = [first > 0, norm2(conv2(first.clamp(min=0))) > 0]
        z1, z2 = image[None].square(), torch.ones_like(image[None])
        for layer, ((weight, stride), square) in enumerate(zip(fused, squares, strict=True)):
            padding = weight.shape[-1] // 2
            z1 = F.conv2d(z1, torch.ones_like(weight), None, stride, padding)
            z2 = F.conv2d(z2, square, None, stride, padding)
            if layer < 2:
                z1 = z1 * gates[layer]
        R = R + (z1 * z2).sum()
    gradients = torch.autograd.grad(R, squares)
    names = ["backbone.0.0.0", "backbone.0.1.0", "neck.0"]
    for name, square, gradient in zip(names, squares[:3], gradients[:3], strict=True):
        expected = (gradient * square).abs().detach().sum((1, 2, 3))
        torch.testing.assert_close(scores[name], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["chain", "shared", "residual", "upsampling"])
def test_px_fused_shares_all_paths_among_the_filters_of_a_layer(name: str):
    """Where every path crosses two layers, the scores of both sum to R."""
    subject, criterion = double(name), PXCriterion(bn="fuse")
    graph = subject.graph(("backbone", "neck", "head"))
    score_groups(criterion, subject.target, graph, subject.batches)
    first = next(layer for key, layer in graph.scored.items() if key.startswith("backbone.0"))
    R = float(criterion.channel_scores(first).sum())
    cuts = {
        "chain": [["backbone.0.1.0"], ["neck.0"]],
        "shared": [["neck.0.lateral.0", "neck.0.lateral.1"], ["neck.1.0"], ["head.0"]],
        "residual": [["neck.lateral.0", "neck.lateral.1"]],
        "upsampling": [["backbone.0.1"], ["neck.0"]],
    }
    for layers in cuts[name]:
        total = sum(float(criterion.channel_scores(graph.scored[key]).sum()) for key in layers)
        assert total == pytest.approx(R, rel=1e-9)
    assert R > 0


# Taylor and OBD -------------------------------------------------------------------------------


def parameters_that_go(graph: PruningGraph, channels: dict[str, list[int]]) -> dict[str, Tensor]:
    """For every parameter, which of its entries these channels take with them."""
    model, gone = graph.model, {}
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    with restored(model):
        for parameter in model.parameters():  # numbers its entries
            parameter.data = torch.arange(parameter.numel()).view(parameter.shape).to(parameter)
        graph.remove(channels)
        for name, parameter in model.named_parameters():
            gone[name] = torch.ones_like(weights[name], dtype=torch.bool)
            gone[name].flatten()[parameter.detach().flatten().long()] = False
    for name, parameter in model.named_parameters():
        parameter.data = weights[name]
    return gone


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["chain", "residual", "concat", "shared", "depthwise", "pyramid", "upsampling"]
)
def test_taylor_and_obd_sum_over_all_parameters_that_go(name: str):
    subject = double(name)
    graph, target = subject.graph(), subject.target
    taylor = score_groups(TaylorCriterion(), target, graph, subject.batches)
    obd = score_groups(OBDCriterion(), target, graph, subject.batches)
    images = torch.cat([batch.images for batch in subject.batches])
    every = subject.batches[0].objects
    parameters = dict(subject.model.named_parameters())
    per_image = [
        torch.autograd.grad(target.detection_loss(Batch(image[None], every)), parameters.values())
        for image in images
    ]
    for key, group in graph.groups.items():
        first, second = [], []
        for channel in range(group.size):
            gone = parameters_that_go(graph, {key: [channel]})
            linear = quadratic = 0.0
            for index, (where, theta) in enumerate(parameters.items()):
                g = torch.stack([gradients[index] for gradients in per_image])
                linear += float((theta.detach() * g.mean(0))[gone[where]].sum())
                quadratic += float((theta.detach() ** 2 * (g**2).mean(0))[gone[where]].sum())
            first.append(abs(linear))
            second.append(quadratic)
        np.testing.assert_allclose(taylor[key], first, rtol=1e-6, atol=1e-9 * max(first))
        np.testing.assert_allclose(obd[key], second, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["grouped", "groupnorm", "deformable"])
def test_obd_counts_the_parameters_of_tied_parts_together(name: str):
    subject = double(name)
    graph, target = subject.graph(), subject.target
    obd = score_groups(OBDCriterion(), target, graph, subject.batches)
    for key, group in graph.groups.items():
        step = list(range(0, group.size, group.size // group.parts))  # the first of every part
        gone = parameters_that_go(graph, {key: step})
        expected = 0.0
        for batch in subject.batches:
            for index in range(len(batch.images)):
                target.detection_loss(batch.of_image(index)).backward()
                for where, theta in subject.model.named_parameters():
                    if theta.grad is not None:
                        squares = (theta.detach() * theta.grad).square()
                        expected += float(squares[gone[where]].sum()) / 5
                subject.model.zero_grad(set_to_none=True)
        assert float(obd[key][step].sum()) == pytest.approx(expected, rel=1e-6)


# All ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("detector", [*REAL, "retinanet"])
@pytest.mark.parametrize("rival", RIVALS)
def test_rivals_score_every_group_of_the_detectors(rival: str, detector: str):
    subject = case(detector)
    graph = subject.graph()
    scores = score_groups(RIVALS[rival](), subject.target, graph, subject.batches)
    for name, group in graph.groups.items():
        assert scores[name].shape == (group.size,)
        assert bool(scores[name].isfinite().all())
        assert len(scores[name].unique()) > 1, f"{name} is not told apart"


BY_IMAGE = {**RIVALS, "px": partial(PXCriterion, bn="fuse")}  # else with statistics of batches
del BY_IMAGE["group_fisher"]  # the detection loss is a mean over the batch


@pytest.mark.parametrize("rival", BY_IMAGE)
def test_batches_are_only_a_matter_of_memory(rival: str):
    subject = double("shared")
    together = score_groups(BY_IMAGE[rival](), subject.target, subject.graph(), subject.batches)
    singles = [
        Batch(image[None], batch.objects) for batch in subject.batches for image in batch.images
    ]
    alone = score_groups(BY_IMAGE[rival](), subject.target, subject.graph(), singles)
    for name, values in together.items():
        torch.testing.assert_close(values, alone[name], rtol=1e-6, atol=1e-12)


@pytest.mark.slow
def test_rankings_are_those_of_the_papers():
    rankings = {name: composed(f"method={name}").method.ranking for name in RIVALS}
    assert rankings == {
        "hrank": "uniform",
        "chip": "uniform",
        "group_fisher": "global",
        "px": "global",
        "taylor": "global",
        "obd": "global",
    }


@pytest.mark.parametrize("wrong", [{"size": 0}, {"tolerance": 0.0}, {"tolerance": 1.5}])
def test_hrank_names_a_key_out_of_range(wrong: dict[str, Any]):
    ((key, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"method.criterion.{key}={value}; allowed: a .*e.g. "):
        HRankCriterion(**wrong)
