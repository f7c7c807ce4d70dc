"""Laws of the refit by least squares: what is kept stands in for what is removed."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from small import SMALL, case, random_channels

from ldt.pruning.dependency import depthwise
from ldt.pruning.layer_types import CONVOLUTIONS
from ldt.pruning.refit import refit_consumers, removed_inputs


def mean_squares(subject, reference):
    """Squared differences of the raw maps over all batches."""
    return sum(
        float((own - other).double().square().sum())
        for batch in subject.batches
        for own, other in zip(
            subject.outputs(batch.images), reference.outputs(batch.images), strict=True
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_masked_detector_equals_the_cut_one(name):
    subject = case(name)
    graph = subject.graph()
    channels = random_channels(graph, seed=3)
    assert refit_consumers(graph, channels, subject.batches) > 0
    masked = [subject.outputs(batch.images) for batch in subject.batches]
    graph.remove(channels)
    if name not in ("groupnorm", "layernorm"):  # whose statistics change with the cut
        for batch, maps in zip(subject.batches, masked, strict=True):
            torch.testing.assert_close(subject.outputs(batch.images), maps, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["chain", "residual", "concat", "grouped", "upsampling", "shared"])
def test_nothing_removed_or_an_infinite_ridge_changes_no_weight_that_is_kept(name):
    subject = case(name)
    graph = subject.graph()
    nothing: dict[str, list[int]] = {name: [] for name in graph.groups}
    assert refit_consumers(graph, nothing, subject.batches) == 0
    channels = random_channels(graph, seed=3)
    refit_consumers(graph, channels, subject.batches, ridge=1e12)
    graph.remove(channels)
    plain = case(name)
    plain.graph().remove(channels)
    for key, value in plain.model.state_dict().items():
        torch.testing.assert_close(subject.model.state_dict()[key], value)


@pytest.mark.parametrize("name", ["chain", "residual", "concat", "depthwise", "grouped", "shared"])
def test_copies_of_channels_are_removed_without_a_trace(name):
    """Twice the filters, each a copy of another: removing all copies changes no output."""
    subject = case(name)
    graph = subject.graph()
    channels = {}
    for group_name, group in graph.groups.items():
        size = group.size // group.parts
        half = size // 2
        keep = np.concatenate([first + np.arange(half) for first in range(0, group.size, size)])
        lost = keep + half
        for member in group.members:
            if member.side == "in":
                continue
            tensors = [
                *member.layer.parameters(recurse=False),
                *member.layer.buffers(recurse=False),
            ]
            channel_of = {root: c for c, root in zip(member.channels, member.roots, strict=True)}
            for tensor in (t for t in tensors if t.ndim):
                for one, copy in zip(keep, lost, strict=True):
                    tensor.data[channel_of[copy]] = tensor.data[channel_of[one]]
        channels[group_name] = lost.tolist()
    whole = deepcopy(subject)
    refit_consumers(graph, channels, subject.batches, ridge=1e-9)
    graph.remove(channels)
    for batch in subject.batches:
        torch.testing.assert_close(
            subject.outputs(batch.images), whole.outputs(batch.images), atol=1e-3, rtol=1e-3
        )


@pytest.mark.parametrize("name", ["chain", "concat", "pyramid"])
def test_the_weights_are_those_of_a_slow_least_squares(name):
    """Row by row with the ridge as further observations, in double precision."""
    subject, ridge = case(name), 1e-2
    graph = subject.graph()
    channels = random_channels(graph, seed=5)
    inputs = {layer: [] for layer in removed_inputs(graph, channels)}
    hooks = [
        layer.register_forward_pre_hook(lambda own, given: inputs[own].append(given[0].detach()))
        for layer in inputs
    ]
    for batch in subject.batches:
        subject.outputs(batch.images)
    for hook in hooks:
        hook.remove()
    expected = {}
    layer: Any
    for layer, lost in removed_inputs(graph, channels).items():
        x = torch.cat([one.movedim(1, -1).flatten(0, -2) for one in inputs[layer]]).double()
        r, k = (torch.as_tensor(mask) for mask in (lost, ~lost))
        scale = (ridge * x[:, k].square().sum(0).mean()).sqrt()
        rows = torch.cat([x[:, k], scale * torch.eye(int(k.sum()), dtype=x.dtype)])
        targets = torch.cat([x[:, r], torch.zeros(int(k.sum()), int(r.sum()), dtype=x.dtype)])
        a = torch.linalg.lstsq(rows, targets).solution.float()
        w = layer.weight.detach()
        expected[layer] = w[:, k] + torch.einsum("or...,kr->ok...", w[:, r], a)
    refit_consumers(graph, channels, subject.batches, ridge=ridge)
    for layer, lost in removed_inputs(graph, channels).items():
        own = layer.weight.detach()[:, torch.as_tensor(~lost)]
        torch.testing.assert_close(own, expected[layer], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["chain", "residual", "concat", "depthwise"])
def test_outputs_are_nearer_to_the_unpruned_ones(name):
    whole = case(name)
    errors = []
    for refits in (False, True):
        subject = case(name)
        graph = subject.graph()
        channels = random_channels(graph, seed=3)
        if refits:
            refit_consumers(graph, channels, subject.batches)
        graph.remove(channels)
        errors.append(mean_squares(subject, whole))
    assert errors[1] < 0.5 * errors[0]


def test_depthwise_convolutions_stay_and_all_other_readers_are_found():
    subject = case("depthwise")
    graph = subject.graph()
    channels = {name: [0] for name in graph.groups}
    readers = set(removed_inputs(graph, channels))
    layers = [m for m in subject.model.modules() if isinstance(m, CONVOLUTIONS)]
    assert readers == {m for m in layers[1:] if not depthwise(m)}  # the first reads the image
