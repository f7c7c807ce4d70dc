"""The weights alpha and beta of the LDT losses, given or set by the sizes of gradients."""

import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

AUTO = "auto"
TERMS = {"ld": ("alpha", "L_LD"), "cov": ("beta", "L_cov")}
STEPS = 20  # of an estimation, at most a tenth of a phase
EPOCH_STEPS = 5  # in which the shares are measured again, at the start of each epoch
HEALTHY = (0.005, 0.3)  # share of a term's gradient in that of the detection loss


class TermWeights:
    """Hold alpha and beta; set those that are ``auto`` by gradient norms at the neck.

    A term's ratio is its gradient's norm over that of the detection loss. An ``auto`` weight is
    share / (median ratio), so that the weighted term's gradient is this share of the detection
    loss's. Both weights are 0 until an estimation has ended.

    Args:
        given: alpha and beta by term (``ld``, ``cov``), each a number or ``auto``.
        shares: the target share of each term.
        renewed: set ``auto`` weights again in each epoch, by its first steps. The share is held,
            while the loss that is trained changes.

    Attributes:
        known: the weights; empty until they are estimated.
        measured: the latest share of each term, logged with the losses.
        steps_left: in how many next steps of the epoch to measure, once the weights are known.
    """

    def __init__(
        self,
        given: Mapping[str, float | str],
        shares: Mapping[str, float],
        renewed: bool = False,
    ) -> None:
        self.given, self.shares, self.renewed = dict(given), dict(shares), renewed
        fixed = {k: float(v) for k, v in given.items() if v != AUTO}
        self.known: dict[str, float] = fixed if len(fixed) == len(given) else {}
        self.measured: dict[str, float] = {}
        self._ratios: list[dict[str, float]] = []  # of an estimation
        self._epoch: list[dict[str, float]] = []  # of an epoch
        self.steps_left = 0
        self._unhealthy: set[str] = set()

    @property
    def estimated(self) -> bool:
        """Whether a weight is ``auto``."""
        return AUTO in self.given.values()

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the state of an estimation."""
        return {"known": self.known, "ratios": self._ratios, "unhealthy": sorted(self._unhealthy)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the weights and the state of an estimation."""
        self.known, self._ratios = dict(state["known"]), list(state["ratios"])
        self._unhealthy = set(state["unhealthy"])

    def begin_epoch(self, steps: float = EPOCH_STEPS) -> None:
        """Measure the shares again in the next steps, of `steps` in the epoch."""
        self._epoch, self.steps_left = [], int(min(EPOCH_STEPS, steps))

    def add(self, norms: Sequence[float], steps: int) -> None:
        """Add the gradient norms of the detection loss and of each term in one step.

        Args:
            norms: of the detection loss, L_LD and L_cov. A step in which one is zero (the batch has
                a single class) or not finite (a gradient scaler is still too high) does not count.
            steps: the number of steps after which an estimation ends.
        """
        detection, *terms = norms
        kept = self._epoch if self.known else self._ratios
        if all(0 < norm < float("inf") for norm in norms):
            terms_by_name = zip(self.given, terms, strict=True)
            kept.append({name: norm / detection for name, norm in terms_by_name})
        if not self.known:
            if len(kept) >= steps:
                self.settle()
            return
        self.steps_left -= 1
        if kept:
            medians = self._medians(kept)
            if self.renewed and not self.steps_left:
                self.known = self._weights(medians)
            self.measured = {name: self.known[name] * medians[name] for name in self.given}

    def settle(self) -> None:
        """End an estimation with the steps measured so far; without any it goes on."""
        if self.known or not self._ratios:
            return
        medians = self._medians(self._ratios)
        self.known = self._weights(medians)
        self.measured = {name: self.known[name] * medians[name] for name in self.given}

    def _medians(self, ratios: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {name: statistics.median(one[name] for one in ratios) for name in self.given}

    def _weights(self, medians: Mapping[str, float]) -> dict[str, float]:
        """Return the weights whose terms have their shares at these ratios."""
        return {
            name: self.shares[name] / medians[name] if value == AUTO else float(value)
            for name, value in self.given.items()
        }

    def unhealthy(self) -> list[str]:
        """Return a message for each term whose share has left the healthy range since the last."""
        low, high = HEALTHY
        out = {
            name
            for name, share in self.measured.items()
            if self.known[name] and not low <= share <= high
        }
        new, self._unhealthy = out - self._unhealthy, out
        return [
            f"the gradient of {TERMS[name][0]}*{TERMS[name][1]} at the neck is "
            f"{self.measured[name]:.2%} of the detection loss's, outside of {low:.1%} to {high:.0%}"
            + self._advice(name)
            for name in sorted(new)
        ]

    def _advice(self, name: str) -> str:
        return "" if self.given[name] == AUTO else f": type ldt.{TERMS[name][0]}=auto"


def squared_gradient_norms(
    losses: Sequence[Tensor], maps: Sequence[Tensor], scale: Tensor | float = 1.0
) -> Tensor:
    """Return the squared norm of each loss's gradient with respect to all `maps`: [len(losses)].

    The graph is kept and ``.grad`` untouched. `scale` multiplies the losses during the backward
    pass, so that gradients in half precision do not vanish.
    """
    found = []
    for loss in losses:
        gradients = torch.autograd.grad(
            loss * scale, list(maps), retain_graph=True, allow_unused=True
        )
        sums = [(g.float() / scale).square().sum() for g in gradients if g is not None]
        found.append(torch.stack(sums).sum() if sums else loss.new_zeros(()).float())
    return torch.stack(found)
