"""From scores and a rate to the channels that go."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ldt.pruning.costs import CostModel
from ldt.pruning.coupled_groups import CoupledGroup
from ldt.pruning.graph import PruningGraph

RANKINGS = ("global", "global_per_cost", "global_normalised", "uniform")
TOLERANCE = 0.005  # of the unpruned model's budget


class UnreachableRateError(ValueError):
    """The asked rate cannot be had within the scope and the limits per layer."""


@dataclass(frozen=True)
class Limits:
    """How far a layer may shrink, counted from the unpruned model."""

    max_layer_rate: float = 0.95
    min_channels: int = 4

    def __str__(self) -> str:
        return (
            f"at most {self.max_layer_rate:.0%} of a layer goes (prune.max_layer_rate) and "
            f"{self.min_channels} channels stay (prune.min_channels)"
        )

    def removable(self, group: CoupledGroup, original: int) -> int:
        """Channels of a group that may still go."""
        keep = max(self.min_channels, original - int(original * self.max_layer_rate + 1e-9))
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
        return ranked / max(float(np.abs(ranked).mean()), np.finfo(float).tiny)
    if ranking == "global_per_cost":
        return ranked / max(costs.saved({group.name: units[0]}), 1.0)
    return ranked


def select_channels(
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

    The steps of all groups are sorted by the ranking's key, and the prefix that comes nearest to
    the budget goes: the saving grows with every step, so bisection finds it. Where one step is
    worth more than the tolerance and no prefix fits, the steps that would save too much are passed
    over, and the next cheaper ones complete the longest prefix that saves too little.

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
    limits = limits or Limits()
    order, units = _order(graph, scores, costs, ranking, limits, original or {})

    def channels(counts: Mapping[str, int]) -> dict[str, np.ndarray]:
        return {name: units[name][:count].reshape(-1) for name, count in counts.items()}

    def saved(counts: Mapping[str, int]) -> float:
        return costs.saved(channels(counts))

    best = _nearest(order, saved, save, tolerance)
    if abs(saved(best) - save) > tolerance:
        check_reachable(graph, costs, save, limits, original)
        raise UnreachableRateError(
            f"{save:,.0f} {costs.unit} must go, {saved(best):,.0f} is the nearest to it: single "
            f"channels are worth more than the tolerance of {tolerance:,.0f}. Choose another "
            "prune.rate"
        )
    return {name: sorted(map(int, gone)) for name, gone in channels(best).items()}


def check_reachable(
    graph: PruningGraph,
    costs: CostModel,
    save: float,
    limits: Limits,
    original: Mapping[str, int] | None = None,
) -> None:
    """UnreachableRateError if the limits do not allow to save so much; arguments as above."""
    counts = {
        name: limits.removable(group, (original or {}).get(name, group.size))
        for name, group in graph.groups.items()
    }
    most = costs.saved({name: np.arange(count) for name, count in counts.items()})
    if most < save:
        raise UnreachableRateError(
            f"{save:,.0f} {costs.unit} must go, {most:,.0f} can: {limits}, and "
            f"{len(graph.excluded)} layers of the scope are excluded. Ask for a smaller "
            "prune.rate or widen prune.scope"
        )


def lowest_scoring(
    graph: PruningGraph,
    scores: Mapping[str, Tensor],
    costs: CostModel,
    *,
    steps: int,
    ranking: str = "global",
    limits: Limits | None = None,
    original: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """The channels that go in the first ``steps`` steps of :func:`select_channels`'s order."""
    order, units = _order(graph, scores, costs, ranking, limits or Limits(), original or {})
    return {name: units[name][:n].reshape(-1) for name, n in Counter(order[:steps]).items()}


def _order(
    graph: PruningGraph,
    scores: Mapping[str, Tensor],
    costs: CostModel,
    ranking: str,
    limits: Limits,
    original: Mapping[str, int],
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The groups in which steps are taken one after another, and each group's own steps."""
    if ranking not in RANKINGS:
        raise ValueError(f"method.ranking={ranking!r}; choose one of {', '.join(RANKINGS)}")
    steps: list[tuple[float, str, int]] = []
    units: dict[str, np.ndarray] = {}
    for name, group in graph.groups.items():
        _check_scores(name, group, scores[name])
        units[name], ranked = _units(group, scores[name])
        keys = _keys(ranking, group, ranked, units[name], costs)
        allowed = limits.removable(group, original.get(name, group.size)) // group.parts
        steps += [(float(keys[step]), name, step) for step in range(allowed)]
    return [name for _, name, _ in sorted(steps)], units


def _nearest(
    order: Sequence[str], saved: Callable[[Mapping[str, int]], float], save: float, tolerance: float
) -> Mapping[str, int]:
    """How many steps of each group to take, in this order, to save as much as is asked."""
    enough = bisect_left(range(len(order)), save, key=lambda n: saved(Counter(order[:n])))
    prefixes = [Counter(order[:n]) for n in (enough - 1, enough) if n >= 0]
    best = min(prefixes, key=lambda counts: abs(saved(counts) - save))
    if abs(saved(best) - save) <= tolerance:
        return best
    counts, closed = prefixes[0], set()
    for name in order[max(enough - 1, 0) :]:
        longer = counts + Counter([name])
        if name not in closed and saved(longer) <= save + tolerance:
            counts = longer
        else:
            closed.add(name)  # steps of a group go in their order or not at all
    return min(best, counts, key=lambda counts: abs(saved(counts) - save))


def _check_scores(name: str, group: CoupledGroup, scores: Tensor) -> None:
    if scores.shape != (group.size,) or not bool(scores.isfinite().all()):
        raise ValueError(
            f"the criterion gave scores of shape {tuple(scores.shape)} for {name!r}, "
            f"finite: {bool(scores.isfinite().all())}; expected {group.size} finite scores"
        )
