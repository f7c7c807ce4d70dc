"""The cost of each layer, and the saving of removing channels, without changing the network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from torch import nn

from ldt.config.kinds import Budget, Counted
from ldt.pruning.dependency import ChannelParameter, depthwise
from ldt.pruning.graph import PruningGraph
from ldt.pruning.layer_types import CONVOLUTIONS
from ldt.runs.identity import BUDGET_ALIASES, canonical_budget

UNITS: dict[Counted, str] = {"params": "parameters", "macs": "MACs"}


def parse_budget(name: str) -> Budget:
    """Return the budget of a name or alias.

    Raises:
        ValueError: unknown name.
    """
    for budget in get_args(Budget):
        if canonical_budget(name) == budget:
            return budget
    aliases = " or ".join(f"{alias} (the same as {same})" for alias, same in BUDGET_ALIASES.items())
    raise ValueError(f"prune.budget={name!r}; choose {', '.join(get_args(Budget))} or {aliases}")


@dataclass(frozen=True)
class LayerCost:
    """Cost of a layer: ``per_pair * ins * outs + per_out * outs`` (channelwise: ``ins`` is 1)."""

    ins: int
    outs: int
    per_pair: float
    per_out: float

    def saved(self, removed_in: int, removed_out: int) -> float:
        """Return the cost saved by removing this many input and output channels."""
        ins, outs = self.ins - removed_in, self.outs - removed_out
        return self.per_pair * (self.ins * self.outs - ins * outs) + self.per_out * removed_out


def _cost(layer: nn.Module, budget: Counted, positions: int, products: int) -> LayerCost:
    if isinstance(layer, ChannelParameter):
        values = layer.values.numel() / layer.num_channels
        return LayerCost(1, 1, 0.0, values if budget == "params" else 0)
    if not isinstance(layer, CONVOLUTIONS):
        learnt = sum(p.numel() > 1 for p in layer.parameters(recurse=False))
        has_weight = getattr(layer, "weight", None) is not None
        macs = (1 + has_weight) * positions  # as ldt.evaluation.profiling counts
        return LayerCost(1, 1, 0.0, learnt if budget == "params" else macs)
    if isinstance(layer, nn.Linear):
        ins, outs = layer.in_features, layer.out_features
    else:  # depthwise: one filter per channel
        ins, outs = 1 if depthwise(layer) else layer.in_channels, layer.out_channels
    scale = 1 if budget == "params" else positions
    biases = float(getattr(layer, "bias", None) is not None and budget == "params")
    return LayerCost(ins, outs, scale * layer.weight.numel() / (ins * outs), biases + products)


class CostModel:
    """Compute exactly what removing channels saves, without removing them.

    Args:
        graph: the coupled groups.
        budget: ``params`` or ``macs``; :class:`ldt.pruning.latency.LatencyModel` is for latency.
    """

    def __init__(self, graph: PruningGraph, budget: Counted) -> None:
        self.groups, self._unit = graph.groups, UNITS[budget]
        macs = budget == "macs"
        positions, products = (graph.positions, graph.products) if macs else ({}, {})
        self._costs = {
            m.name: _cost(m.layer, budget, positions.get(m.name, 0), products.get(m.name, 0))
            for group in graph.groups.values()
            for m in group.members
        }

    def told(self, amount: float) -> str:
        """Format a saving for messages."""
        return f"{amount:,.0f} {self._unit}"

    def saved(self, removed: Mapping[str, Sequence[int] | np.ndarray]) -> float:
        """Return the parameters or MACs saved by removing these channels of each group."""
        counts: dict[str, list[int]] = {name: [0, 0] for name in self._costs}
        for name, channels in removed.items():
            group = self.groups[name]
            mask = np.zeros(group.size, dtype=bool)
            mask[channels] = True
            for member in group.members:
                counts[member.name][member.side != "in"] += int(mask[member.roots].sum())
        return sum(
            self._costs[name].saved(0 if self._costs[name].ins == 1 else ins, outs)
            for name, (ins, outs) in counts.items()
        )

    def price(self, name: str, channels: np.ndarray) -> float:
        """Return what a channel of each part of a group costs, for rankings per cost.

        Args:
            name: the group.
            channels: what may be removed of it, in order, [channels of each part, parts].
        """
        return max(self.saved({name: channels[0]}), 1.0)
