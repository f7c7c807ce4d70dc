"""One round of pruning: score the channels, select the lowest-scoring ones, remove them."""

import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch_pruning.pruner.importance import Importance

from ldt import progress
from ldt.criteria.base import score_groups
from ldt.detectors.adapter import Detector, PreparedBatch
from ldt.detectors.batch_norm import reestimate_batch_norms
from ldt.detectors.forward import eval_with_gradients
from ldt.evaluation.round_metrics import count_params_and_macs
from ldt.loop.round_record import RoundRecord
from ldt.loop.schedule import PruningSchedule
from ldt.progress.steps import CUT
from ldt.pruning.budget import (
    TOLERANCE,
    Limits,
    UnreachableRateError,
    check_reachable,
    select_channels,
)
from ldt.pruning.costs import Budget, CostModel
from ldt.pruning.graph import PruningGraph
from ldt.pruning.latency import LatencyModel
from ldt.pruning.refit import refit_consumers
from ldt.pruning.trial import restored
from ldt.runtimes.latency_table import LatencyTable

log = logging.getLogger(__name__)

TRIALS = 6  # selections that are measured before channels are removed
NEAR, FAR = 0.01, 0.05  # of the latency asked for: no further trial; a warning
Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Unpruned:
    """The size of the unpruned detector, to which rates and limits refer.

    Attributes:
        costs: parameters, MACs and, where there is a table, latency in ms, by budget.
        channels: output channels of each convolution.
        table: times of layers and networks, for the latency budget.
    """

    costs: Mapping[str, float]
    channels: dict[str, int]
    table: LatencyTable | None = None

    @classmethod
    def of(cls, detector: Detector, table: LatencyTable | None = None) -> "Unpruned":
        """Measure the size of a detector."""
        return cls(_costs_of(detector, table), layer_channels(detector), table)

    def measure(self, detector: Detector) -> dict[str, float]:
        """Return what a detector has now, by budget."""
        return _costs_of(detector, self.table)

    def cost_model(self, detector: Detector, graph: PruningGraph, budget: Budget) -> CostModel:
        """Return what removing channels of a detector saves of a budget."""
        if budget != "latency":
            return CostModel(graph, budget)
        assert self.table is not None
        return self.table.model(detector, graph)


def _costs_of(detector: Detector, table: LatencyTable | None) -> dict[str, float]:
    counts: dict[str, float] = {**count_params_and_macs(detector)}
    return counts | ({} if table is None else {"latency": table.network_ms(detector)})


def latency_table(
    schedule: PruningSchedule, device: torch.device, known: Mapping[str, Any] | None = None
) -> LatencyTable | None:
    """Return the table that a schedule's budget needs; None if it needs none.

    Args:
        schedule: how much is pruned.
        device: of the detector.
        known: the table of a run that is resumed.

    Raises:
        ImportError: the runtime is not installed.
    """
    return LatencyTable(schedule.latency, device, known) if schedule.budget == "latency" else None


def layer_channels(detector: Detector) -> dict[str, int]:
    """Return the output channels of each convolution by its name."""
    named = detector.model.named_modules()
    widths = {name: getattr(layer, "out_channels", None) for name, layer in named}
    return {name: width for name, width in widths.items() if isinstance(width, int)}


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

    With ``lstsq`` the layers that read removed channels are refitted; :func:`repair` does the rest.

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
            scores = score_groups(criterion, detector, graph, batches)
            if schedule.channels == "random":
                scores = _shuffled(scores)
            scores = synchronize(scores)
            _log_excluded(graph, except_for=known)
            after = round_ - 1 + inner / rounds
            arguments = selection_arguments(detector, graph, schedule, unpruned, after)
            if inner < rounds:  # only the last inner round must be exact
                arguments["tolerance"] = unpruned.costs[schedule.budget]
            else:
                progress.begin(CUT, round_)
            with _rate_in_message(schedule, round_):
                if unpruned.table is not None and inner == rounds:
                    channels = _corrected(detector, graph, scores, arguments, unpruned, record)
                else:
                    channels = select_channels(graph, scores, **arguments)
            short = arguments["save"] - arguments["costs"].saved(channels)
            record.left = schedule.left_share(after) * unpruned.costs[schedule.budget] + short
            if schedule.repair == "lstsq":
                refit_consumers(graph, channels, batches)
            graph.remove(channels)
            record.add(scores, channels)
    record.excluded = dict(graph.excluded)
    check_rate(detector, schedule, round_, unpruned, record)
    return record


def _corrected(
    detector: Detector,
    graph: PruningGraph,
    scores: Scores,
    arguments: "SelectionArguments",
    unpruned: Unpruned,
    record: RoundRecord,
) -> dict[str, list[int]]:
    """Select channels that save the time asked for as measured, not as the table predicts.

    What a selection saves is measured on the network without these channels, which gets them back;
    the next selection asks the table for more or less, between the nearest on both sides.
    """
    costs, table = arguments["costs"], unpruned.table
    assert isinstance(costs, LatencyModel)
    assert table is not None
    now, save = costs.network_ms, arguments["save"]
    low, high, asked = (0.0, 0.0), None, save  # (asked, measured) savings on both sides of `save`
    found: dict[float, tuple[dict[str, list[int]], float]] = {}
    for _ in range(TRIALS):
        try:
            channels = select_channels(graph, scores, **{**arguments, "save": asked})
        except UnreachableRateError:
            if not found:
                raise
            break  # the nearest so far stays
        with restored(detector.model):
            graph.remove(channels)
            measured = table.network_ms(detector)
        found.setdefault(abs(now - save - measured), (channels, measured))
        if abs(now - save - measured) <= NEAR * (now - save):
            break
        if now - measured < save:
            low = asked, now - measured
        else:
            high = asked, now - measured
        ends = (low, high or (2 * asked, 2 * max(now - measured, save / 2)))
        asked = float(np.interp(save, [end[1] for end in ends], [end[0] for end in ends]))
    channels, measured = found[min(found)]
    record.latency = {
        "asked_ms": now - save, "predicted_ms": now - costs.saved(channels), "measured_ms": measured
    }  # fmt: skip
    return channels


def _shuffled(scores: Scores) -> Scores:
    """Return the scores of each group in random order, so that it loses as many channels."""
    return {name: own[torch.randperm(len(own))] for name, own in scores.items()}


def repair(detector: Detector, batches: Iterable[PreparedBatch], schedule: PruningSchedule) -> None:
    """Adapt the batch norms of a pruned detector to their new inputs, if the schedule says so."""
    if schedule.repair != "none":
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
    removed = total - unpruned.measure(detector)[budget]
    return {
        "costs": unpruned.cost_model(detector, graph, budget),
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
    if unpruned.table is not None:
        unpruned.table.prepare(detector, graph)
    costs = unpruned.cost_model(detector, graph, schedule.budget)
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
    detector: Detector,
    schedule: PruningSchedule,
    round_: int,
    unpruned: Unpruned,
    record: RoundRecord,
) -> dict[str, float]:
    """Raise RuntimeError unless a round has removed what the cost model said.

    A time is only predicted: a warning tells if it is far from what was asked for. Return what is
    left, by budget.
    """
    budget, asked = schedule.budget, schedule.left_share(round_)
    counts = unpruned.measure(detector)
    total, left = unpruned.costs[budget], counts[budget]
    if budget == "latency":
        if abs(left / total / asked - 1) > FAR:
            log.warning(
                "round %d: %.3g ms in %s, not the %.3g ms asked for: the grid of widths "
                "(prune.round_to) or the limits of the layers allow no nearer",
                *(round_, left, schedule.latency.runtime, asked * total),
            )
    elif abs(left - record.left) > TOLERANCE * total:
        raise RuntimeError(
            f"round {round_} removed {1 - left / total:.2%} of the {schedule.budget}, not the "
            f"{1 - record.left / total:.2%} of the cost model: it and the pruned network disagree"
        )
    return counts


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
