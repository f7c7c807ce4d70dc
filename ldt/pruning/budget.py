"""From scores and a rate to the channels that go."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor, nn

from ldt.pruning.graph import NORMS, CoupledGroup, PruningGraph

Budget = Literal["params", "flops"]
RANKINGS = ("global", "global_per_cost", "global_normalised", "uniform")
TOLERANCE = 0.005  # of the unpruned model's budget


class UnreachableRateError(ValueError):
    """The asked rate cannot be had within the scope and the limits per layer."""


@dataclass(frozen=True)
class _Cost:
    """Cost of a layer: ``per_pair * in * out + per_out * out`` (channelwise: ``in`` is 1)."""

    ins: int
    outs: int
    per_pair: float
    per_out: float

    def saved(self, removed_in: int, removed_out: int) -> float:
        ins, outs = self.ins - removed_in, self.outs - removed_out
        return (
            self.per_pair * (self.ins * self.outs - ins * outs)
            + self.per_out * removed_out
        )


def _cost(layer: nn.Module, budget: Budget, positions: int) -> _Cost:
    weight = getattr(layer, "weight", None)
    bias = getattr(layer, "bias", None)
    if isinstance(layer, NORMS) or not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        size = 0 if weight is None else weight.numel()
        if size == 0:
            return _Cost(1, 1, 0.0, 0.0)
        learnt = 1 + (bias is not None)
        affine = 2 * positions  # the convention of ldt.profiling
        return _Cost(1, size, 0.0, learnt if budget == "params" else affine)
    assert weight is not None
    if isinstance(layer, nn.Linear):
        ins, outs = layer.in_features, layer.out_features
    else:
        ins, outs = layer.in_channels, layer.out_channels
        if layer.groups > 1:  # depthwise: one filter per channel
            ins = 1
    scale = 1 if budget == "params" else positions
    biases = float(bias is not None and budget == "params")
    return _Cost(ins, outs, scale * weight.numel() / (ins * outs), biases)


class CostModel:
    """What a choice of channels saves, exactly, without cutting anything.

    Args:
        graph: the groups.
        budget: ``params`` or ``flops`` (multiply-adds).
        positions: output positions per layer (:func:`ldt.pruning.graph.positions`).
    """

    def __init__(self, graph: PruningGraph, budget: Budget, positions: Mapping[str, int]) -> None:
        self.groups = graph.groups
        self._costs = {
            m.name: _cost(m.layer, budget, positions.get(m.name, 0))
            for group in graph.groups.values()
            for m in group.members
        }

    def saved(self, removed: Mapping[str, np.ndarray]) -> float:
        """Parameters or multiply-adds saved by removing these channels of each group."""
        gone: dict[str, list[int]] = {name: [0, 0] for name in self._costs}
        for name, channels in removed.items():
            group = self.groups[name]
            mask = np.zeros(group.size, dtype=bool)
            mask[channels] = True
            for member in group.members:
                count = int(mask[member.roots].sum())
                gone[member.name][member.side != "in"] += count
        return sum(
            self._costs[name].saved(0 if self._costs[name].ins == 1 else ins, outs)
            for name, (ins, outs) in gone.items()
        )


@dataclass(frozen=True)
class Limits:
    """How far a layer may shrink, counted from the unpruned model."""

    max_layer_rate: float = 0.95
    min_channels: int = 4

    def removable(self, group: CoupledGroup, original: int) -> int:
        """Channels of a group that may still go."""
        keep = max(self.min_channels, round(original * (1 - self.max_layer_rate)))
        return max(0, group.size - keep) // group.parts * group.parts


def _units(group: CoupledGroup, scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Channels in the order in which they go, [steps, parts], and the mean score of each step."""
    table = scores.detach().double().cpu().numpy().reshape(group.parts, -1)
    order = np.argsort(table, axis=1, kind="stable")
    ranked = np.take_along_axis(table, order, axis=1).mean(axis=0)
    first = np.arange(group.parts)[:, None] * table.shape[1]
    return (order + first).T, ranked


def _keys(
    ranking: str, group: CoupledGroup, ranked: np.ndarray, units: np.ndarray, costs: CostModel
) -> np.ndarray:
    """What the steps of a group are sorted by over all groups; non-decreasing within a group."""
    if ranking == "uniform":
        return (np.arange(len(ranked)) + 1) / len(ranked)
    if ranking == "global_normalised":
        return ranked / max(float(ranked.mean()), np.finfo(float).tiny)
    if ranking == "global_per_cost":
        return ranked / max(costs.saved({group.name: units[0]}), 1.0)
    return ranked


def choose(
    graph: PruningGraph,
    scores: Mapping[str, Tensor],
    costs: CostModel,
    *,
    save: float,
    tolerance: float,
    ranking: str = "global",
    limits: Limits | None = None,
    original: Mapping[str, int] | None = None,
) -> dict[str, list[int]]:
    """The channels to remove so that ``save`` parameters or multiply-adds are saved.

    The steps of all groups are sorted by the ranking's key, and the shortest or nearest prefix
    that meets the budget goes: the saving grows with every step, so bisection finds it.

    Args:
        graph: the coupled groups.
        scores: one score per channel of each group; the lowest go first.
        costs: the cost of the layers as they are now.
        save: how much to save, in the cost model's unit.
        tolerance: largest deviation from ``save``.
        ranking: one of ``RANKINGS``.
        limits: how far a layer may shrink.
        original: channels of each group's root layer in the unpruned model.

    Raises:
        ValueError: unknown ranking, or scores that are not finite or of the wrong length.
        UnreachableRateError: the limits do not allow it; says what is possible.
    """
    if ranking not in RANKINGS:
        raise ValueError(f"method.ranking={ranking!r}; choose one of {', '.join(RANKINGS)}")
    limits, original = limits or Limits(), original or {}
    steps: list[tuple[float, str, int]] = []
    units: dict[str, np.ndarray] = {}
    for name, group in graph.groups.items():
        _check_scores(name, group, scores[name])
        units[name], ranked = _units(group, scores[name])
        keys = _keys(ranking, group, ranked, units[name], costs)
        allowed = limits.removable(group, original.get(name, group.size)) // group.parts
        steps += [(float(keys[step]), name, step) for step in range(allowed)]
    steps.sort()

    def prefix(length: int) -> dict[str, np.ndarray]:
        counts: dict[str, int] = {}
        for _, name, _ in steps[:length]:
            counts[name] = counts.get(name, 0) + 1
        return {name: units[name][:count].reshape(-1) for name, count in counts.items()}

    low, high = 0, len(steps)
    while low < high:  # the first prefix that saves enough
        middle = (low + high) // 2
        if costs.saved(prefix(middle)) >= save:
            high = middle
        else:
            low = middle + 1
    candidates = [length for length in (low - 1, low) if 0 <= length <= len(steps)]
    best = min(candidates, key=lambda length: abs(costs.saved(prefix(length)) - save))
    reached = costs.saved(prefix(best))
    if abs(reached - save) > tolerance:
        raise UnreachableRateError(
            f"{reached:,.0f} of the {save:,.0f} that must go can be removed: at most "
            f"{limits.max_layer_rate:.0%} of a layer goes and {limits.min_channels} channels stay "
            f"(prune.max_layer_rate, prune.min_channels), and {len(graph.left_whole)} layers of "
            "the scope are left whole. Ask for a smaller prune.rate or widen prune.scope"
        )
    return {name: sorted(map(int, gone)) for name, gone in prefix(best).items()}


def _check_scores(name: str, group: CoupledGroup, scores: Tensor) -> None:
    if scores.shape != (group.size,) or not bool(scores.isfinite().all()):
        raise ValueError(
            f"the criterion gave scores of shape {tuple(scores.shape)} for {name!r}, "
            f"finite: {bool(scores.isfinite().all())}; expected {group.size} finite scores"
        )
