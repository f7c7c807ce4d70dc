"""Select the channels to prune for a given budget."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ldt.pruning.costs import CostModel
from ldt.pruning.coupled_groups import CoupledGroup
from ldt.pruning.graph import PruningGraph

RANKINGS = ("global", "global_per_cost", "global_normalised", "uniform")
TOLERANCE = 0.005  # of the unpruned model's budget


class UnreachableRateError(ValueError):
    """The requested rate is not reachable within the scope and the per-layer limits."""


@dataclass(frozen=True)
class Limits:
    """Per-layer limits of pruning, relative to the unpruned model.

    Attributes:
        max_layer_rate: largest share of a layer's channels that is removed.
        min_channels: smallest number of channels that every layer keeps.
    """

    max_layer_rate: float = 0.95
    min_channels: int = 4

    def __str__(self) -> str:
        return (
            f"at most {self.max_layer_rate:.0%} of a layer's channels are removed "
            f"(prune.max_layer_rate) and at least {self.min_channels} kept (prune.min_channels)"
        )

    def removable(self, group: CoupledGroup, original: int) -> int:
        """Return how many channels of a group may still be removed."""
        keep = max(self.min_channels, original - int(original * self.max_layer_rate + 1e-9))
        return max(0, group.size - keep) // group.parts * group.parts


def _removal_steps(group: CoupledGroup, scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return channels in order of removal, [steps, parts], and the mean score of each step."""
    by_part = scores.detach().double().cpu().numpy().reshape(group.parts, -1)
    order = np.argsort(by_part, axis=1, kind="stable")
    step_scores = np.take_along_axis(by_part, order, axis=1).mean(axis=0)
    first = np.arange(group.parts)[:, None] * by_part.shape[1]
    return (order + first).T, step_scores


def _sort_keys(
    ranking: str, group: CoupledGroup, scores: np.ndarray, steps: np.ndarray, costs: CostModel
) -> np.ndarray:
    """Return the keys that rank the steps of all groups; non-decreasing within a group."""
    if ranking == "uniform":
        return (np.arange(len(scores)) + 1) / len(scores)
    if ranking == "global_normalised":
        return scores / max(float(np.abs(scores).mean()), np.finfo(float).tiny)
    if ranking == "global_per_cost":
        return scores / max(costs.saved({group.name: steps[0]}), 1.0)
    return scores


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
    """Select each group's channels to remove so that ``save`` parameters or MACs are saved.

    The steps of all groups are sorted by the ranking's key, and the prefix nearest to the budget is
    selected by bisection, since the saving grows with every step. If a single step saves more than
    the tolerance and no prefix fits, the longest prefix that saves too little is completed with the
    next steps that do not save too much.

    Args:
        graph: the coupled groups.
        scores: one score per channel of each group; the lowest are removed first.
        costs: the cost of the layers as they are now.
        save: how much to save, in the cost model's unit.
        tolerance: largest deviation from ``save``.
        ranking: one of ``RANKINGS``.
        limits: per-layer limits.
        original: channels of each group's root layer in the unpruned model.

    Raises:
        ValueError: unknown ranking, or scores that are not finite or of the wrong length.
        UnreachableRateError: the limits do not allow it; the message says what is possible.
    """
    limits = limits or Limits()
    order, steps = _rank_steps(graph, scores, costs, ranking, limits, original or {})
    best, saved = _nearest(order, steps, costs, save, tolerance)
    if abs(saved - save) > tolerance:
        check_reachable(graph, costs, save, limits, original)
        raise UnreachableRateError(
            f"{save:,.0f} {costs.unit} must be removed, the nearest possible is {saved:,.0f}: "
            f"single channels exceed the tolerance of {tolerance:,.0f}. Choose another prune.rate"
        )
    return {name: sorted(map(int, found)) for name, found in _channels(steps, best).items()}


def _channels(steps: Mapping[str, np.ndarray], counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Return the channels of the first ``counts[name]`` steps of each group."""
    return {name: steps[name][:count].reshape(-1) for name, count in counts.items()}


def check_reachable(
    graph: PruningGraph,
    costs: CostModel,
    save: float,
    limits: Limits,
    original: Mapping[str, int] | None = None,
) -> None:
    """Raise UnreachableRateError if the limits do not allow saving this much.

    Args:
        graph: the coupled groups.
        costs: the cost of the layers as they are now.
        save: how much to save, in the cost model's unit.
        limits: per-layer limits.
        original: channels of each group's root layer in the unpruned model.
    """
    counts = {
        name: limits.removable(group, (original or {}).get(name, group.size))
        for name, group in graph.groups.items()
    }
    most = costs.saved({name: np.arange(count) for name, count in counts.items()})
    if most < save:
        raise UnreachableRateError(
            f"{save:,.0f} {costs.unit} must be removed, {most:,.0f} can be: {limits}, and "
            f"{len(graph.excluded)} layers of the scope are excluded. Choose a smaller "
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
    """Return the channels of the first ``steps`` steps in :func:`select_channels`'s order."""
    order, by_group = _rank_steps(graph, scores, costs, ranking, limits or Limits(), original or {})
    return _channels(by_group, Counter(order[:steps]))


def _rank_steps(
    graph: PruningGraph,
    scores: Mapping[str, Tensor],
    costs: CostModel,
    ranking: str,
    limits: Limits,
    original: Mapping[str, int],
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return the group of each step in order of removal, and the channels of its steps."""
    if ranking not in RANKINGS:
        raise ValueError(f"method.ranking={ranking!r}; choose one of {', '.join(RANKINGS)}")
    ranked: list[tuple[float, str, int]] = []
    steps: dict[str, np.ndarray] = {}
    for name, group in graph.groups.items():
        _check_scores(name, group, scores[name])
        steps[name], step_scores = _removal_steps(group, scores[name])
        keys = _sort_keys(ranking, group, step_scores, steps[name], costs)
        allowed = limits.removable(group, original.get(name, group.size)) // group.parts
        ranked += [(float(keys[step]), name, step) for step in range(allowed)]
    return [name for _, name, _ in sorted(ranked)], steps


def _nearest(
    order: Sequence[str],
    steps: Mapping[str, np.ndarray],
    costs: CostModel,
    save: float,
    tolerance: float,
) -> tuple[Mapping[str, int], float]:
    """Return the number of steps per group that saves nearest to ``save``, and its saving."""

    def saved(counts: Mapping[str, int]) -> float:
        return costs.saved(_channels(steps, counts))

    enough = bisect_left(range(len(order)), save, key=lambda n: saved(Counter(order[:n])))
    prefixes = [Counter(order[:n]) for n in (enough - 1, enough) if n >= 0]
    best = min(prefixes, key=lambda counts: abs(saved(counts) - save))
    if abs(saved(best) - save) <= tolerance:
        return best, saved(best)
    counts, closed = prefixes[0], set()
    for name in order[max(enough - 1, 0) :]:
        longer = counts + Counter([name])
        if name not in closed and saved(longer) <= save + tolerance:
            counts = longer
        else:
            closed.add(name)  # a group's steps cannot be skipped
    best = min(best, counts, key=lambda counts: abs(saved(counts) - save))
    return best, saved(best)


def _check_scores(name: str, group: CoupledGroup, scores: Tensor) -> None:
    if scores.shape != (group.size,) or not bool(scores.isfinite().all()):
        raise ValueError(
            f"the criterion gave scores of shape {tuple(scores.shape)} for {name!r}, "
            f"finite: {bool(scores.isfinite().all())}; expected {group.size} finite scores"
        )
