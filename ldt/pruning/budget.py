"""Select the channels to prune for a given budget."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from torch import Tensor

from ldt.config.kinds import Ranking
from ldt.pruning.costs import CostModel
from ldt.pruning.coupled_groups import CoupledGroup
from ldt.pruning.graph import PruningGraph

RANKINGS = get_args(Ranking)
TOLERANCE = 0.005  # of the unpruned model's budget


class UnreachableRateError(ValueError):
    """The requested rate is not reachable within the scope and the per-layer limits."""


@dataclass(frozen=True)
class Limits:
    """Per-layer limits of pruning, relative to the unpruned model.

    Attributes:
        max_layer_rate: largest share of a layer's channels that is removed.
        min_channels: smallest number of channels that every layer keeps.
        round_to: what a pruned layer keeps is a multiple of this; 0 and 1: any number.
    """

    max_layer_rate: float = 0.95
    min_channels: int = 4
    round_to: int = 0

    def __str__(self) -> str:
        rounded = f", in multiples of {self.round_to} (prune.round_to)" * (self.round_to > 1)
        return (
            f"at most {self.max_layer_rate:.0%} of a layer's channels are removed "
            f"(prune.max_layer_rate) and at least {self.min_channels} kept (prune.min_channels)"
            f"{rounded}"
        )

    def removable(self, group: CoupledGroup, original: int) -> int:
        """Return how many channels of a group may still be removed."""
        keep = max(self.min_channels, original - int(original * self.max_layer_rate + 1e-9))
        multiple = self.multiple(group)
        return max(0, group.size - -(-keep // multiple) * multiple)

    def multiple(self, group: CoupledGroup) -> int:
        """Return the number that what is kept of a group must be a multiple of."""
        return math.lcm(group.parts, max(1, self.round_to))


@dataclass(frozen=True)
class _Steps:
    """The steps in which a group loses its channels.

    Attributes:
        channels: in order of removal, [channels of each part, parts].
        scores: mean score of each row of ``channels``.
        ends: rows removed after 0, 1, ... steps: one a step, or as many as reach the next multiple.
    """

    channels: np.ndarray
    scores: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, group: CoupledGroup, scores: Tensor, limits: Limits, original: int) -> "_Steps":
        by_part = scores.detach().double().cpu().numpy().reshape(group.parts, -1)
        order = np.argsort(by_part, axis=1, kind="stable")
        row_scores = np.take_along_axis(by_part, order, axis=1).mean(axis=0)
        first = np.arange(group.parts)[:, None] * by_part.shape[1]
        multiple, most = limits.multiple(group), limits.removable(group, original)
        nearest = (group.size - 1) % multiple + 1  # to the next multiple below
        ends = np.append(0, np.arange(nearest, most + 1, multiple) // group.parts)
        return cls((order + first).T, row_scores, ends)

    def first(self, count: int) -> np.ndarray:
        """Return the channels of the first ``count`` steps."""
        return self.channels[: self.ends[count]].reshape(-1)

    def sort_keys(self, ranking: str, name: str, costs: CostModel) -> np.ndarray:
        """Return the keys that rank the steps of all groups; non-decreasing within a group."""
        if ranking == "uniform":
            return self.ends[1:] / len(self.scores)
        sums = np.add.reduceat(self.scores[: self.ends[-1]], self.ends[:-1])
        means = sums / np.diff(self.ends)
        if ranking == "global_normalised":
            return means / max(float(np.abs(self.scores).mean()), np.finfo(float).tiny)
        if ranking == "global_per_cost":
            return means / costs.price(name, self.channels[: self.ends[-1]])
        return means


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
    next steps that do not save too much. Where widths are multiples of ``limits.round_to``, a step
    removes several channels, and half of the saving of the step that meets the budget is tolerated.

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
    best, saved, last = _nearest(order, steps, costs, save, tolerance)
    if abs(saved - save) > max(tolerance, last / 2 * (limits.round_to > 1)):
        check_reachable(graph, costs, save, limits, original)
        raise UnreachableRateError(
            f"{costs.told(save)} must be removed, the nearest possible is {costs.told(saved)}: "
            f"single channels exceed the tolerance of {costs.told(tolerance)}. Choose another "
            "prune.rate"
        )
    return {name: sorted(map(int, found)) for name, found in _channels(steps, best).items()}


def _channels(steps: Mapping[str, _Steps], counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Return the channels of the first ``counts[name]`` steps of each group."""
    return {name: steps[name].first(count) for name, count in counts.items()}


def some_of(group: CoupledGroup, count: int) -> np.ndarray:
    """Return the first ``count`` channels of a group, as many of each of its parts."""
    starts = np.arange(group.parts)[:, None] * (group.size // group.parts)
    return (starts + np.arange(count // group.parts)).reshape(-1)


def lowest_of(group: CoupledGroup, scores: Tensor, count: int) -> list[int]:
    """Return the ``count`` lowest-scoring channels of a group, as many of each of its parts."""
    none = Limits(max_layer_rate=1.0, min_channels=0)
    steps = _Steps.of(group, scores, none, group.size)
    return sorted(steps.channels[: count // group.parts].reshape(-1).tolist())


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
    most = costs.saved({name: some_of(graph.groups[name], n) for name, n in counts.items()})
    if most < save:
        raise UnreachableRateError(
            f"{costs.told(save)} must be removed, {costs.told(most)} can be: {limits}, and "
            f"{len(graph.excluded)} layers of the scope are excluded. Choose a smaller "
            f"prune.rate{', a smaller prune.round_to' * (limits.round_to > 1)} or widen prune.scope"
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
    """Return the channels of the first ``steps`` steps in :func:`select_channels`'s order.

    A step is a channel of each part of a group, also where the end widths are to be multiples.
    """
    limits = replace(limits or Limits(), round_to=0)
    order, by_group = _rank_steps(graph, scores, costs, ranking, limits, original or {})
    return _channels(by_group, Counter(order[:steps]))


def _rank_steps(
    graph: PruningGraph,
    scores: Mapping[str, Tensor],
    costs: CostModel,
    ranking: str,
    limits: Limits,
    original: Mapping[str, int],
) -> tuple[list[str], dict[str, _Steps]]:
    """Return the group of each step in order of removal, and the steps of each group."""
    if ranking not in RANKINGS:
        raise ValueError(f"method.ranking={ranking!r}; choose one of {', '.join(RANKINGS)}")
    ranked: list[tuple[float, str, int]] = []
    steps: dict[str, _Steps] = {}
    for name, group in graph.groups.items():
        _check_scores(name, group, scores[name])
        own = steps[name] = _Steps.of(group, scores[name], limits, original.get(name, group.size))
        if len(own.ends) > 1:
            keys = own.sort_keys(ranking, name, costs)
            ranked += [(float(key), name, step) for step, key in enumerate(keys)]
    return [name for _, name, _ in sorted(ranked)], steps


def _nearest(
    order: Sequence[str],
    steps: Mapping[str, _Steps],
    costs: CostModel,
    save: float,
    tolerance: float,
) -> tuple[Mapping[str, int], float, float]:
    """Return the number of steps per group that saves nearest to ``save``, and its saving.

    The last number is what the step saves with which the ranking's order reaches ``save``.
    """

    def saved(counts: Mapping[str, int]) -> float:
        return costs.saved(_channels(steps, counts))

    enough = bisect_left(range(len(order)), save, key=lambda n: saved(Counter(order[:n])))
    prefixes = [Counter(order[:n]) for n in (enough - 1, enough) if n >= 0]
    last = saved(prefixes[-1]) - saved(prefixes[0])
    best = min(prefixes, key=lambda counts: abs(saved(counts) - save))
    if abs(saved(best) - save) <= tolerance:
        return best, saved(best), last
    counts, closed = prefixes[0], set()
    for name in order[max(enough - 1, 0) :]:
        longer = counts + Counter([name])
        if name not in closed and saved(longer) <= save + tolerance:
            counts = longer
        else:
            closed.add(name)  # a group's steps cannot be skipped
    best = min(best, counts, key=lambda counts: abs(saved(counts) - save))
    return best, saved(best), last


def _check_scores(name: str, group: CoupledGroup, scores: Tensor) -> None:
    if scores.shape != (group.size,) or not bool(scores.isfinite().all()):
        raise ValueError(
            f"the criterion gave scores of shape {tuple(scores.shape)} for {name!r}, "
            f"finite: {bool(scores.isfinite().all())}; expected {group.size} finite scores"
        )
