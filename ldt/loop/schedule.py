"""The pruning schedule and its validation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ldt.config.kinds import Budget, Channels, LayerShare, Ranking, Repair, Weights
from ldt.config.values import (
    Count,
    NaturalNumber,
    Positive,
    Share,
    check_fields,
    check_value,
)
from ldt.pruning.budget import Limits
from ldt.pruning.costs import parse_budget
from ldt.runtimes.latency_table import LatencyTarget

KEYS = {  # what the user types for each field
    "rate": "prune.rate",
    "rounds": "prune.rounds",
    "base_epochs": "recipe.epochs",
    "retrain_epochs": "recipe.retrain_epochs",
    "inner_rounds": "method.inner_rounds",
    "images": "prune.images",
    "batch_size": "prune.batch_size",
    "retrain_lr": "recipe.retrain_lr",
    "repair": "prune.repair",
    "channels": "prune.channels",
    "weights": "prune.weights",
}


ROUND_TO = 16  # in every runtime


def default_round_to(budget: Budget) -> int:
    """Return what widths are multiples of by default; 0: any number.

    Only a latency budget rounds: the kernels of the runtimes compute in blocks of channels
    (``benchmarks/latency_budget.py``).
    """
    return ROUND_TO if budget == "latency" else 0


@dataclass(frozen=True)
class PruningSchedule:
    """How much is pruned, from which layers, and when.

    Attributes:
        rate: share of the unpruned model's budget to remove in total, in (0, 1).
        rounds: number of pruning rounds; 0 trains only.
        budget: ``params``, ``macs`` or ``latency``.
        base_epochs: epochs before the first round; 0 prunes before any training.
        retrain_epochs: epochs after each round's pruning; 0 evaluates the pruned detector as it is.
        ranking: how scores of different layers are compared (:data:`ldt.pruning.budget.RANKINGS`).
        inner_rounds: how often a round scores and prunes, without training in between.
        scope: name prefixes of the modules to prune.
        limits: per-layer limits.
        images: number of calibration images.
        batch_size: calibration images per forward pass.
        retrain_lr: factor on the learning rate after pruning.
        channels: ``random`` removes as many channels of each group as the scores say, but others: a
            control that tells what the choice within groups gives.
        weights: ``fresh`` gives the pruned detector random weights: a control that tells what the
            kept ones give.
        repair: after each pruning, ``bn`` re-estimates the statistics of batch norms; ``lstsq``
            refits the weights that read removed channels first.
        latency: where the latency is measured, and how much of it is to be left.

    Raises:
        ValueError: a value is not allowed; the message names its key.
    """

    rate: Share
    rounds: NaturalNumber
    base_epochs: NaturalNumber
    retrain_epochs: NaturalNumber
    budget: Budget = "params"
    ranking: str = "global"
    inner_rounds: Count = 1
    scope: tuple[str, ...] = ("backbone", "neck")
    limits: Limits = field(default_factory=Limits)
    images: Count = 128
    batch_size: Count = 16
    retrain_lr: Positive = 1.0
    repair: Repair = "bn"
    latency: LatencyTarget = field(default_factory=LatencyTarget)
    channels: Channels = "scored"
    weights: Weights = "kept"

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", parse_budget(self.budget))
        check_fields(self, KEYS, {"rate": 0.5, "rounds": 2, "base_epochs": 9, "retrain_epochs": 2})
        check_value("method.ranking", self.ranking, Ranking)
        limits, default = self.limits, Limits()
        most, least = limits.max_layer_rate, limits.min_channels
        check_value("prune.max_layer_rate", most, LayerShare, default.max_layer_rate)
        check_value("prune.min_channels", least, Count, default.min_channels)
        check_value("prune.round_to", limits.round_to, NaturalNumber, 8)
        if self.latency.target_ms is not None and self.budget != "latency":
            raise ValueError(
                f"prune.latency.target_ms={self.latency.target_ms:g} is of prune.budget=latency, "
                f"not of {self.budget}; type prune.budget=latency too"
            )
        if not self.rounds and not self.base_epochs:
            raise ValueError(
                "recipe.epochs=0 and no rounds of pruning: nothing to do (e.g. recipe.epochs=9)"
            )

    def aimed(self, base_ms: float) -> PruningSchedule:
        """Return the schedule with the rate that leaves the latency asked for, if one was.

        Args:
            base_ms: latency of the unpruned detector.

        Raises:
            ValueError: it is not above the latency asked for.
        """
        target, runtime = self.latency.target_ms, self.latency.runtime
        if self.budget != "latency" or target is None:
            return self
        if target >= base_ms:
            raise ValueError(
                f"prune.latency.target_ms={target:g}: the unpruned detector takes {base_ms:.3g} ms "
                f"in {runtime}; type a smaller one, e.g. prune.latency.target_ms={base_ms / 2:.3g}"
            )
        return replace(self, rate=1 - target / base_ms)

    @classmethod
    def one_shot(cls, rate: float, **options: Any) -> PruningSchedule:
        """Return the schedule of a single round without any training.

        Args:
            rate: share of the budget to remove.
            options: further fields.
        """
        return cls(rate, rounds=1, base_epochs=0, retrain_epochs=0, **options)

    @property
    def total_epochs(self) -> int:
        """Number of epochs of the whole run."""
        return self.base_epochs + self.rounds * self.retrain_epochs

    def is_last_epoch(self, epoch: int) -> bool:
        """Return whether a phase ends with this epoch (counted from 0)."""
        after = epoch + 1 - self.base_epochs
        every = self.retrain_epochs
        return after == 0 or (after > 0 and every > 0 and after % every == 0)

    def removed_share(self, round_: float) -> float:
        """Return the share of the unpruned budget removed after a round: 1 - (1 - rate)^(t/T).

        Inner rounds are fractions of a round, so they follow an exponential schedule too.
        """
        return 1 - self.left_share(round_)

    def left_share(self, round_: float) -> float:
        """Return the share of the unpruned budget that is left after a round."""
        return (1 - self.rate) ** (round_ / self.rounds) if self.rounds else 1.0
