"""Group Fisher pruning (Liu et al., ICML 2021)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ldt.config.values import checked
from ldt.criteria.base import Criterion, Target
from ldt.pruning.costs import CostModel
from ldt.pruning.coupled_groups import CoupledGroup
from ldt.pruning.graph import PruningGraph
from ldt.pruning.layer_types import CONVOLUTIONS, width_of

Cost = Literal["memory", "flops", "none"]


class GroupFisherCriterion(Criterion):
    """A coupled channel is worth the Fisher information of its mask, per memory that it takes.

    g_nc = sum of A dL/dA over the positions, calls and layers at whose *input* the group's channel
    c stands; its score is sum_n g_nc^2 over images, so that a group is summed first and squared
    after. L is the detection loss.

    The paper removes one channel every 10 training steps. This criterion scores a network as it
    is, and ``method.inner_rounds`` re-scores it while it shrinks, without training in between;
    ``method=group_fisher_gradual`` is the paper's schedule.

    Args:
        cost: what a channel's score is divided by: the activations that it takes (``memory``), the
            multiply-adds that go with it (``flops``), or nothing (``none``).

    Raises:
        ValueError: unknown cost.
    """

    @checked("method.criterion")
    def __init__(self, cost: Cost = "memory") -> None:
        self.cost: Cost = cost
        self._scores: dict[nn.Module, Tensor] = {}

    def __call__(self, group: Any) -> Tensor:
        """The scores of a Torch-Pruning group, [channels of its root]."""
        return self.channel_scores(group[0].dep.target.module)

    def channel_scores(self, layer: nn.Module) -> Tensor:
        """The scores of the group that has this layer as its root."""
        return self._scores[layer]

    def collect(self, target: Target, graph: PruningGraph, batches: Iterable[Any]) -> None:
        """Sum up squared mask gradients over all images."""
        fisher = Fisher(graph)
        with fisher.watched():
            for batch in batches:
                target.detection_loss(batch).backward()
                fisher.add()
        target.model.zero_grad(set_to_none=True)
        costs = channel_costs(graph, self.cost)
        self._scores = {
            group.members[0].layer: fisher.sums[name] / costs[name]
            for name, group in graph.groups.items()
        }


class Fisher:
    """Accumulates sum_n g_nc^2 of every group from backward passes.

    Attributes:
        sums: per group, [channels], float64.
        masks: per group, [channels]: what the layers that read a channel see it multiplied with.
    """

    def __init__(self, graph: PruningGraph) -> None:
        self.graph = graph
        self._readers = _readers(graph)
        self._gradients: dict[nn.Module, dict[int, Tensor]] = {}  # by number of samples
        self.sums: dict[str, Tensor] = {}
        self.masks: dict[nn.Module, Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.sums = {
            name: torch.zeros(group.size, dtype=torch.float64)
            for name, group in self.graph.groups.items()
        }

    def mask(self, removed: Mapping[str, np.ndarray]) -> None:
        """Let the layers that read these channels of each group see zeros."""
        self.masks = {}
        for name, channels in removed.items():
            gone = np.zeros(self.graph.groups[name].size, dtype=bool)
            gone[channels] = True
            for layer, idxs, roots in self._readers[name]:
                if layer not in self.masks:
                    self.masks[layer] = torch.ones(width_of(layer, "in"))
                self.masks[layer][idxs[gone[roots]]] = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it, backward passes leave g behind for :meth:`add`, and masks are applied."""
        layers = {layer for readers in self._readers.values() for layer, _, _ in readers}
        hooks = [layer.register_forward_pre_hook(self._tap) for layer in layers]
        try:
            yield
        finally:
            self._gradients = {}
            for hook in hooks:
                hook.remove()

    def _tap(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        x = inputs[0]
        shape = (-1,) if isinstance(layer, nn.Linear) else (-1, 1, 1)
        if layer in self.masks:
            x = x * self.masks[layer].to(x).view(shape)
        elif x.requires_grad:
            x = x.view_as(x)  # other readers of the same map have gradients of their own
        if x.requires_grad:
            x.register_hook(self._received(layer, x.detach()))
        return (x, *inputs[1:])

    def _received(self, layer: nn.Module, value: Tensor) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            g = value.double() * gradient.double()
            linear = isinstance(layer, nn.Linear)
            g = g.reshape(len(g), -1, g.shape[-1]).sum(1) if linear else g.sum((2, 3))
            calls = self._gradients.setdefault(layer, {})
            calls[len(g)] = calls.get(len(g), 0) + g

        return hook

    def add(self) -> None:
        """Take the last backward's g into the sums.

        A layer that sees regions of images instead (the second stage of a detector) has each region
        for a sample of its own.
        """
        for name, readers in self._readers.items():
            totals: dict[int, Tensor] = {}  # by number of samples
            for layer, idxs, roots in readers:
                for samples, own in self._gradients.get(layer, {}).items():  # reached by the loss
                    part = torch.zeros(samples, len(self.sums[name]), dtype=torch.float64)
                    part.index_add_(1, torch.as_tensor(roots), own.cpu()[:, idxs])
                    totals[samples] = totals.get(samples, 0) + part
            for total in totals.values():
                self.sums[name] += total.square().sum(0)
        self._gradients = {}


Reader = tuple[nn.Module, np.ndarray, np.ndarray]


def _readers(graph: PruningGraph) -> dict[str, list[Reader]]:
    """Per group: the layers that read it, which of their inputs, and whose channel each is."""
    return {
        name: [
            (member.layer, member.channels, member.roots)
            for member in group.members
            if member.side != "out" and isinstance(member.layer, CONVOLUTIONS)
        ]
        for name, group in graph.groups.items()
    }


def channel_costs(
    graph: PruningGraph, cost: Cost, removed: Mapping[str, np.ndarray] | None = None
) -> dict[str, float]:
    """What one more channel of each group takes, in activations or multiply-adds of one image.

    Args:
        graph: the coupled groups.
        cost: as for :class:`GroupFisherCriterion`.
        removed: per group, channels that are masked already.
    """
    if cost == "none":
        return dict.fromkeys(graph.groups, 1.0)
    if cost == "memory":
        return {name: _activations(group, graph) for name, group in graph.groups.items()}
    model, removed = CostModel(graph, "macs"), removed or {}
    already = model.saved(removed)
    found = {}
    for name, group in graph.groups.items():
        gone = removed.get(name, np.array([], int))
        left = np.setdiff1d(np.arange(group.size), gone)[:1]
        more = model.saved({**removed, name: np.append(gone, left)})
        found[name] = max(more - already, 1.0)
    return found


def _activations(group: CoupledGroup, graph: PruningGraph) -> float:
    return float(max(sum(graph.positions[producer.name] for producer in group.producers), 1))
