"""Refit the weights of layers that lose inputs, so that the remaining inputs stand in for them."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ldt.pruning.dependency import depthwise
from ldt.pruning.graph import PruningGraph
from ldt.pruning.layer_types import width_of

log = logging.getLogger(__name__)

RIDGE = 1e-3  # of the mean square of the remaining inputs
MOST_INPUTS = 4096  # of a group of a layer: their moments take 128 MiB


class Images(Protocol):
    """A batch with normalised images [N, 3, H, W]."""

    @property
    def images(self) -> Tensor:
        """The images."""
        ...


@torch.no_grad()
def refit_consumers(
    graph: PruningGraph,
    channels: Mapping[str, Sequence[int]],
    batches: Iterable[Images],
    ridge: float = RIDGE,
) -> int:
    """Let the consumers of channels compute the same without them as well as they can, in place.

    Call it before ``graph.remove(channels)``, in eval mode. For every consumer, the inputs that it
    loses, x_r, are regressed on those that it keeps, x_k: A minimises E ||x_r - A x_k||^2 +
    ridge mean(E x_k^2) ||A||_F^2 over all positions and calls of the layer. The weights of x_k
    become W_k + W_r A and those of x_r zero. This holds for any kernel and stride, also of
    transposed and deformable convolutions, since x_r is replaced position by position. The groups
    of a grouped convolution are regressed apart; depthwise convolutions mix no channels and stay.

    Args:
        graph: the coupled groups of the network.
        channels: for a group's name, the channels to remove.
        batches: calibration images; iterated once.
        ridge: ridge of the regression, relative to the mean square of the remaining inputs.

    Returns:
        The number of layers that were refitted.
    """
    removed = removed_inputs(graph, channels)
    moments = _second_moments(graph, list(removed), batches)
    for layer, moment in moments.items():
        if bool(moment.isfinite().all()):
            _refit(layer, moment, removed[layer], ridge)
        else:
            log.warning("a %s has inputs that are not finite: not refitted", type(layer).__name__)
    return len(moments)


def removed_inputs(
    graph: PruningGraph, channels: Mapping[str, Sequence[int]]
) -> dict[nn.Module, np.ndarray]:
    """Return the consumers that mix channels, each with a mask of the inputs that it loses."""
    found: dict[nn.Module, np.ndarray] = {}
    for name, indices in channels.items():
        for member in graph.groups[name].consumers if indices else ():
            layer, lost = member.layer, member.channels[np.isin(member.roots, indices)]
            if not depthwise(layer):
                found.setdefault(layer, np.zeros(width_of(layer, "in"), bool))[lost] = True
    return {
        layer: mask for layer, mask in found.items() if len(mask) // _groups(layer) <= MOST_INPUTS
    }


def _second_moments(
    graph: PruningGraph, layers: Sequence[nn.Module], batches: Iterable[Images]
) -> dict[nn.Module, Tensor]:
    """Return the sum of x x^T over all inputs of each layer, [groups, width, width], on the CPU."""
    sums: dict[nn.Module, Tensor] = {}

    def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        x = x.flatten(0, -2).T if isinstance(layer, nn.Linear) else x.transpose(0, 1).flatten(1)
        x = x.unflatten(0, (_groups(layer), -1))
        own = (x @ x.transpose(1, 2)).double()
        sums[layer] = own if layer not in sums else sums[layer].add_(own)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(add).remove)
        for batch in batches:
            graph.forward(graph.model, batch.images)
    return {layer: own.cpu() for layer, own in sums.items()}


def _refit(layer: Any, moments: Tensor, removed: np.ndarray, ridge: float) -> None:
    weight: Tensor = layer.weight.data
    if isinstance(layer, nn.ConvTranspose2d):  # [in, out, ...], and a single group
        weight = weight.transpose(0, 1)
    groups = _groups(layer)
    for part, moment, lost in zip(
        weight.chunk(groups), moments, removed.reshape(groups, -1), strict=True
    ):
        r, k = (torch.as_tensor(np.flatnonzero(mask)) for mask in (lost, ~lost))
        square = moment[k][:, k]
        added = (ridge * square.diagonal().mean()).clamp(min=torch.finfo(torch.double).tiny)
        square.diagonal().add_(added)
        a = torch.linalg.solve(square, moment[k][:, r])  # [kept, removed]: A^T
        r, k = r.to(part.device), k.to(part.device)
        stand_in = torch.einsum("or...,kr->ok...", part[:, r].double(), a.to(part.device))
        part[:, k] += stand_in.to(part)
        part[:, r] = 0


def _groups(layer: nn.Module) -> int:
    return getattr(layer, "groups", 1)
