"""One round of pruning: score the channels, select the lowest-scoring ones, remove them."""

import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor
from torch_pruning.pruner.importance import Importance

from ldt.criteria.base import score_groups
from ldt.detectors.adapter import Detector, PreparedBatch
from ldt.detectors.batch_norm import reestimate_batch_norms
from ldt.detectors.forward import eval_with_gradients
from ldt.evaluation.round_metrics import count_params_and_macs
from ldt.loop.round_record import RoundRecord
from ldt.loop.schedule import PruningSchedule
from ldt.pruning.budget import (
    TOLERANCE,
    Limits,
    UnreachableRateError,
    check_reachable,
    select_channels,
)
from ldt.pruning.costs import CostModel
from ldt.pruning.graph import PruningGraph

log = logging.getLogger(__name__)

Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Unpruned:
    """The size of the unpruned detector, to which rates and limits refer.

    Attributes:
        costs: parameters and MACs, by budget.
        channels: output channels of each convolution.
    """

    costs: dict[str, int]
    channels: dict[str, int]

    @classmethod
    def of(cls, detector: Detector) -> "Unpruned":
        """Measure the size of a detector."""
        widths = {
            name: getattr(layer, "out_channels", None)
            for name, layer in detector.model.named_modules()
        }
        channels = {name: width for name, width in widths.items() if isinstance(width, int)}
        return cls(count_params_and_macs(detector), channels)


def prune_round(
    detector: Detector,
    criterion: Importance,
    batches: Iterable[PreparedBatch],
    schedule: PruningSchedule,
    round_: int,
    unpruned: Unpruned,
    synchronize: Callable[[Scores], Scores] = lambda scores: scores,
) -> RoundRecord:
    """Score, select and remove channels in place, once per inner round of the schedule.

    Args:
        detector: the detector to prune.
        criterion: one of ours or any importance of Torch-Pruning.
        batches: calibration images; may be iterated more than once.
        schedule: how much is pruned, from which layers.
        round_: number of the round, from 1.
        unpruned: size of the unpruned detector.
        synchronize: makes the scores equal on all ranks.

    Returns:
        The scores and the removed channels of the round.

    Raises:
        UnreachableRateError: the rate is not reachable within the scope and per-layer limits.
    """
    record, rounds = RoundRecord(), schedule.inner_rounds
    with eval_with_gradients(detector.model):
        for inner in range(1, rounds + 1):
            graph = detector.trace(schedule.scope)
            if inner == 1:
                check_prunable(graph, schedule)
            known = set(graph.excluded)
            scores = synchronize(score_groups(criterion, detector, graph, batches))
            _log_excluded(graph, except_for=known)
            after = round_ - 1 + inner / rounds
            arguments = selection_arguments(detector, graph, schedule, unpruned, after)
            if inner < rounds:  # only the last inner round must be exact
                arguments["tolerance"] = unpruned.costs[schedule.budget]
            with _rate_in_message(schedule, round_):
                channels = select_channels(graph, scores, **arguments)
            graph.remove(channels)
            record.add(scores, channels)
    record.excluded = dict(graph.excluded)
    check_rate(detector, schedule, round_, unpruned)
    return record


def repair(detector: Detector, batches: Iterable[PreparedBatch], schedule: PruningSchedule) -> None:
    """Adapt a pruned detector to its new inputs, without training, as the schedule says."""
    if schedule.repair == "bn":
        reestimate_batch_norms(detector, batches)


class SelectionArguments(TypedDict):
    """Keyword arguments of :func:`ldt.pruning.budget.select_channels`."""

    costs: CostModel
    save: float
    tolerance: float
    ranking: str
    limits: Limits
    original: Mapping[str, int]


def selection_arguments(
    detector: Detector,
    graph: PruningGraph,
    schedule: PruningSchedule,
    unpruned: Unpruned,
    after: float,
) -> SelectionArguments:
    """Return the arguments of ``select_channels`` that end round ``after``, possibly a fraction."""
    budget = schedule.budget
    total = unpruned.costs[budget]
    removed = total - count_params_and_macs(detector)[budget]
    return {
        "costs": CostModel(graph, budget),
        "save": schedule.removed_share(after) * total - removed,
        "tolerance": TOLERANCE * total,
        "ranking": schedule.ranking,
        "limits": schedule.limits,
        "original": unpruned.channels,
    }


def check_schedule(
    detector: Detector, schedule: PruningSchedule, unpruned: Unpruned
) -> dict[str, str]:
    """Check before any training that a schedule's rate is reachable; return excluded layers.

    Raises:
        ValueError: the detector has no part of a name in the scope.
        UnreachableRateError: the rate is not reachable.
    """
    with eval_with_gradients(detector.model):
        graph = detector.trace(schedule.scope)
    check_prunable(graph, schedule)
    save = (schedule.rate - TOLERANCE) * unpruned.costs[schedule.budget]
    costs = CostModel(graph, schedule.budget)
    with _rate_in_message(schedule, schedule.rounds):
        check_reachable(graph, costs, save, schedule.limits, unpruned.channels)
    return dict(graph.excluded)


def check_prunable(graph: PruningGraph, schedule: PruningSchedule) -> None:
    """Log the excluded layers; raise UnreachableRateError if they are most of the scope."""
    _log_excluded(graph)
    prunable, total = graph.prunable_share()
    if prunable < total / 2:
        listed = "; ".join(f"{name}: {why}" for name, why in list(graph.excluded.items())[:20])
        raise UnreachableRateError(
            f"only {prunable:,} of the {total:,} parameters in prune.scope="
            f"{list(schedule.scope)} can be pruned. Excluded layers: {listed}"
        )


def _log_excluded(graph: PruningGraph, except_for: Container[str] = ()) -> None:
    for name, reason in graph.excluded.items():
        if name not in except_for:
            log.warning("excluded: %s (%s)", name, reason)


def check_rate(
    detector: Detector, schedule: PruningSchedule, round_: int, unpruned: Unpruned
) -> None:
    """Raise RuntimeError unless a round has removed what was requested."""
    budget = schedule.budget
    achieved = 1 - count_params_and_macs(detector)[budget] / unpruned.costs[budget]
    requested = schedule.removed_share(round_)
    if abs(achieved - requested) > TOLERANCE:
        raise RuntimeError(
            f"round {round_} removed {achieved:.2%} of the {budget}, not the requested "
            f"{requested:.2%}: the cost model and the pruned network disagree"
        )


@contextmanager
def _rate_in_message(schedule: PruningSchedule, round_: int) -> Iterator[None]:
    """Add the requested rate and the round to the message of an UnreachableRateError."""
    try:
        yield
    except UnreachableRateError as error:
        raise UnreachableRateError(
            f"prune.rate={schedule.rate:g} is not reachable (round {round_} of {schedule.rounds}, "
            f"{schedule.removed_share(round_):.1%} of the {schedule.budget}): {error}"
        ) from error
