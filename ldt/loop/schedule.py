"""What a run removes and when, and what of that is impossible."""

from dataclasses import dataclass, field

from ldt.pruning.budget import RANKINGS, Limits
from ldt.pruning.costs import Budget, parse_budget


@dataclass(frozen=True)
class PruningSchedule:
    """What is removed and when.

    Attributes:
        rate: share of the unpruned model's budget that is gone at the end, in (0, 1).
        rounds: cuts; 0 trains only.
        budget: ``params`` or ``macs`` (multiply-adds).
        base_epochs: epochs before the first cut; 0 cuts at once.
        retrain_epochs: epochs after each cut.
        ranking: how scores of different layers are compared (:data:`ldt.pruning.budget.RANKINGS`).
        inner_rounds: times that a round scores anew and cuts, without training in between.
        scope: module name prefixes that lose filters.
        limits: how far a layer may shrink.
        images: training images that the criterion sees.
        batch_size: of those per forward pass.
        retrain_lr: factor on the learning rate after a cut.

    Raises:
        ValueError: a value outside of what is allowed, naming its key.
    """

    rate: float
    rounds: int
    base_epochs: int
    retrain_epochs: int
    budget: Budget = "params"
    ranking: str = "global"
    inner_rounds: int = 1
    scope: tuple[str, ...] = ("backbone", "neck")
    limits: Limits = field(default_factory=Limits)
    images: int = 128
    batch_size: int = 16
    retrain_lr: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", parse_budget(self.budget))
        if not 0 < self.rate < 1:
            raise ValueError(
                f"prune.rate={self.rate} must lie between 0 and 1, e.g. prune.rate=0.5"
            )
        if self.rounds < 0 or self.base_epochs < 0:
            raise ValueError("prune.rounds and recipe.epochs cannot be negative")
        if self.rounds and self.retrain_epochs < 1:
            raise ValueError(
                f"recipe.retrain_epochs={self.retrain_epochs}; at least 1 epoch follows each cut"
            )
        if not self.rounds and not self.base_epochs:
            raise ValueError("recipe.epochs=0 and no rounds of pruning: nothing to do")
        if self.ranking not in RANKINGS:
            raise ValueError(
                f"method.ranking={self.ranking!r}; choose one of {', '.join(RANKINGS)}"
            )
        if self.inner_rounds < 1:
            raise ValueError(f"method.inner_rounds={self.inner_rounds} must be at least 1")
        if self.images < 1 or self.batch_size < 1:
            raise ValueError(
                f"prune.images={self.images}, prune.batch_size={self.batch_size}; both must be at "
                "least 1, e.g. prune.images=128"
            )
        if not 0 < self.limits.max_layer_rate <= 1 or self.limits.min_channels < 1:
            raise ValueError(
                f"prune.max_layer_rate={self.limits.max_layer_rate} must lie between 0 and 1, and "
                f"prune.min_channels={self.limits.min_channels} be at least 1"
            )

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run."""
        return self.base_epochs + self.rounds * self.retrain_epochs

    def is_last_epoch(self, epoch: int) -> bool:
        """Whether a phase ends with this epoch (counted from 0)."""
        after = epoch + 1 - self.base_epochs
        return after == 0 or (after > 0 and after % self.retrain_epochs == 0)

    def removed_share(self, round_: float) -> float:
        """Share of the unpruned budget that is gone after a round: 1 - (1 - rate)^(t/T).

        Inner rounds divide a round evenly, which gives them an exponential schedule of their own.
        """
        return 1 - (1 - self.rate) ** (round_ / self.rounds) if self.rounds else 0.0
