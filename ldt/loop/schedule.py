"""The pruning schedule and its validation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le

from ldt.config.values import (
    Count,
    NaturalNumber,
    Positive,
    Share,
    check_fields,
    check_value,
)
from ldt.pruning.budget import RANKINGS, Limits
from ldt.pruning.costs import Budget, parse_budget

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
}
Repair = Literal["bn", "none"]


@dataclass(frozen=True)
class PruningSchedule:
    """How much is pruned, from which layers, and when.

    Attributes:
        rate: share of the unpruned model's budget to remove in total, in (0, 1).
        rounds: number of pruning rounds; 0 trains only.
        budget: ``params`` or ``macs``.
        base_epochs: epochs before the first round; 0 prunes before any training.
        retrain_epochs: epochs after each round's pruning; 0 evaluates the pruned detector as it is.
        ranking: how scores of different layers are compared (:data:`ldt.pruning.budget.RANKINGS`).
        inner_rounds: how often a round scores and prunes, without training in between.
        scope: name prefixes of the modules to prune.
        limits: per-layer limits.
        images: number of calibration images.
        batch_size: calibration images per forward pass.
        retrain_lr: factor on the learning rate after pruning.
        repair: ``bn`` re-estimates the statistics of batch norms after each pruning.

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", parse_budget(self.budget))
        check_fields(self, KEYS, {"rate": 0.5, "rounds": 2, "base_epochs": 9, "retrain_epochs": 2})
        check_value("method.ranking", self.ranking, Literal[RANKINGS])
        limits, default = self.limits, Limits()
        most, least = limits.max_layer_rate, limits.min_channels
        allowed = Annotated[float, Gt(0), Le(1)]
        check_value("prune.max_layer_rate", most, allowed, default.max_layer_rate)
        check_value("prune.min_channels", least, Count, default.min_channels)
        if not self.rounds and not self.base_epochs:
            raise ValueError(
                "recipe.epochs=0 and no rounds of pruning: nothing to do (e.g. recipe.epochs=9)"
            )

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
        return 1 - (1 - self.rate) ** (round_ / self.rounds) if self.rounds else 0.0
