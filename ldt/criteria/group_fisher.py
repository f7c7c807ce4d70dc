"""Group Fisher pruning (Liu et al., ICML 2021)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ldt.config.kinds import Cost
from ldt.config.values import checked
from ldt.criteria.base import Batch, GroupCriterion, Target
from ldt.pruning.costs import CostModel
from ldt.pruning.coupled_groups import CoupledGroup
from ldt.pruning.graph import PruningGraph
from ldt.pruning.layer_types import width_of


class GroupFisherCriterion(GroupCriterion):
    """Channel importance = Fisher information of the channel's mask, divided by its cost.

    g_nc is the sum of A dL/dA over positions, calls and all layers that have the group's channel c
    as an *input*; the score is sum_n g_nc^2 over images n, so gradients are summed over the group
    before they are squared. L is the detection loss.

    The paper removes one channel every 10 training steps (``method=group_fisher_gradual``). This
    criterion scores a network without training; with ``method.inner_rounds`` it is scored again
    while channels are removed.

    Args:
        cost: what a channel's score is divided by: the size of its activations (``memory``), its
            MACs (``flops``), or nothing (``none``).

    Raises:
        ValueError: unknown cost.
    """

    @checked("method.criterion")
    def __init__(self, cost: Cost = "memory") -> None:
        self.cost: Cost = cost

    def collect(self, target: Target, graph: PruningGraph, batches: Iterable[Batch]) -> None:
        """Sum the squared mask gradients over all images."""
        fisher = Fisher(graph)
        with fisher.record_gradients():
            for batch in batches:
                target.detection_loss(batch).backward()
                fisher.add()
        target.model.zero_grad(set_to_none=True)
        costs = channel_costs(graph, self.cost)
        self.scores = {
            group.members[0].layer: fisher.sums[name] / costs[name]
            for name, group in graph.groups.items()
            if group.consumers  # queries meet keys in no layer
        }


class Fisher:
    """Accumulate sum_n g_nc^2 of every group over backward passes.

    Attributes:
        sums: per group, [channels], float64.
        masks: per consumer layer, [input channels]: factor on its input channels.
    """

    def __init__(self, graph: PruningGraph) -> None:
        self.graph = graph
        self._consumers = _find_consumers(graph)
        self._gradients: dict[nn.Module, dict[int, Tensor]] = {}  # by number of samples
        self.sums: dict[str, Tensor] = {}
        self.masks: dict[nn.Module, Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Reset the sums to zero."""
        self.sums = {
            name: torch.zeros(group.size, dtype=torch.float64)
            for name, group in self.graph.groups.items()
        }

    def mask(self, removed: Mapping[str, np.ndarray]) -> None:
        """Mask these channels of each group with zeros at the input of all their consumers."""
        self.masks = {}
        for name, channels in removed.items():
            masked = np.zeros(self.graph.groups[name].size, dtype=bool)
            masked[channels] = True
            for layer, idxs, roots in self._consumers[name]:
                if layer not in self.masks:
                    self.masks[layer] = torch.ones(width_of(layer, "in"))
                self.masks[layer][idxs[masked[roots]]] = 0

    @contextmanager
    def record_gradients(self) -> Iterator[None]:
        """Apply the masks, and record g of backward passes for :meth:`add`, within the context."""
        layers = {layer for consumers in self._consumers.values() for layer, _, _ in consumers}
        hooks = [layer.register_forward_pre_hook(self._mask_inputs) for layer in layers]
        try:
            yield
        finally:
            self._gradients = {}
            for hook in hooks:
                hook.remove()

    def _mask_inputs(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        shape = (-1,) if isinstance(layer, nn.Linear) else (-1, 1, 1)
        if layer in self.masks:
            x = x * self.masks[layer].to(x).view(shape)
        elif x.requires_grad:
            x = x.view_as(x)  # separates the gradient from those of the map's other consumers
        if x.requires_grad:
            x.register_hook(self._gradient_hook(layer, x.detach()))
        return (x, *inputs[1:])

    def _gradient_hook(self, layer: nn.Module, value: Tensor) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            g = value.double() * gradient.double()
            linear = isinstance(layer, nn.Linear)
            g = g.reshape(len(g), -1, g.shape[-1]).sum(1) if linear else g.sum((2, 3))
            calls = self._gradients.setdefault(layer, {})
            calls[len(g)] = calls.get(len(g), 0) + g

        return hook

    def add(self) -> None:
        """Accumulate squared mask gradients of the last backward pass.

        For layers that process regions (the second stage of a detector), each region is a sample.
        """
        for name, consumers in self._consumers.items():
            totals: dict[int, Tensor] = {}  # by number of samples
            for layer, idxs, roots in consumers:
                for samples, own in self._gradients.get(layer, {}).items():  # reached by the loss
                    part = torch.zeros(samples, len(self.sums[name]), dtype=torch.float64)
                    part.index_add_(1, torch.as_tensor(roots), own.cpu()[:, idxs])
                    totals[samples] = totals.get(samples, 0) + part
            for total in totals.values():
                self.sums[name] += total.square().sum(0)
        self._gradients = {}


Consumer = tuple[nn.Module, np.ndarray, np.ndarray]


def _find_consumers(graph: PruningGraph) -> dict[str, list[Consumer]]:
    """Return each group's consumer layers, their input channels, and the group channel of each."""
    return {
        name: [(member.layer, member.channels, member.roots) for member in group.consumers]
        for name, group in graph.groups.items()
    }


def channel_costs(
    graph: PruningGraph, cost: Cost, removed: Mapping[str, np.ndarray] | None = None
) -> dict[str, float]:
    """Return the cost of one channel of each group, in activations or MACs of one image.

    Args:
        graph: the coupled groups.
        cost: as for :class:`GroupFisherCriterion`.
        removed: per group, the channels that are masked already.
    """
    if cost == "none":
        return dict.fromkeys(graph.groups, 1.0)
    if cost == "memory":
        return {name: _activations(group, graph) for name, group in graph.groups.items()}
    model, removed = CostModel(graph, "macs"), removed or {}
    saved = model.saved(removed)
    costs = {}
    for name, group in graph.groups.items():
        masked = removed.get(name, np.array([], int))
        next_channel = np.setdiff1d(np.arange(group.size), masked)[:1]
        saved_then = model.saved({**removed, name: np.append(masked, next_channel)})
        costs[name] = max(saved_then - saved, 1.0)
    return costs


def _activations(group: CoupledGroup, graph: PruningGraph) -> float:
    return float(max(sum(graph.positions[producer.name] for producer in group.producers), 1))
