"""The two LDT losses as additional terms of a detector's training loss."""

import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from ldt.callbacks.ldt_weights import AUTO, STEPS, TermWeights, squared_gradient_norms
from ldt.config.kinds import Covariance, Estimation, Weight
from ldt.config.values import NaturalNumber, NotNegative, Share, checked
from ldt.discriminant import PHI, RIDGE, RIDGE_ABSOLUTE, discriminants_of
from ldt.location import object_vectors
from ldt.module import DetectorModule
from ldt.objects import Objects

log = logging.getLogger(__name__)


class LDTLoss(L.Callback):
    """Add alpha L_LD + beta L_cov (eq. 12) to the loss of a :class:`DetectorModule`.

    Beside the losses, it logs the number of discriminants ``discriminants_<s>`` and the largest
    eigenvalue ``eigenvalue_<s>`` of each scale, alpha and beta, and the share of each term's
    gradient at the neck in that of the detection loss.

    With ``auto``, LDT is off until the warm-up of the learning rate has ended and the memory is
    full. Then the weight is estimated (:class:`TermWeights`). It is kept from there on, also in the
    runs that begin with a checkpoint of this one and have no base training of their own, unless
    `estimation` is ``epoch``.

    Args:
        phi: eigenvalues above phi times the largest one count.
        alpha: weight of the discriminant term, or ``auto``.
        beta: weight of the covariance term, or ``auto``.
        alpha_share: share of the discriminant term's gradient at the neck in that of the detection
            loss that ``alpha=auto`` aims at.
        beta_share: the same for the covariance term.
        estimation: ``once``, or again in each ``epoch``: the detection loss's gradient falls while
            it trains and the discriminant term's grows, so that a share of 5% may become 70%.
        ridge: ridge of S_w, relative to tr(S_w)/C.
        ridge_absolute: constant added to the ridge.
        covariance: ``mean`` or ``sum`` of the off-diagonal entries in eq. 11, or ``correlation``,
            the mean of those of the correlation matrix, which shrinking the features cannot lower.
        warmup_epochs: alpha and beta increase linearly from 0 over so many epochs, the first of a
            run or those after an estimation.
        memory: number of earlier batches whose detached object vectors are included in the scatter
            matrices.
        gather: gather the object vectors of all ranks, with gradients.

    Raises:
        ValueError: a value is not allowed; the message names its key.
    """

    NAME = "ldt"

    @checked("ldt")
    def __init__(
        self,
        phi: Share = PHI,
        alpha: Weight = AUTO,
        beta: Weight = AUTO,
        alpha_share: Share = 0.05,
        beta_share: Share = 0.05,
        estimation: Estimation = "once",
        ridge: NotNegative = RIDGE,
        ridge_absolute: NotNegative = RIDGE_ABSOLUTE,
        covariance: Covariance = "mean",
        warmup_epochs: NotNegative = 1.0,
        memory: NaturalNumber = 0,
        gather: bool = True,
    ) -> None:
        shares = {"ld": alpha_share, "cov": beta_share}
        self.weights = TermWeights({"ld": alpha, "cov": beta}, shares, estimation == "epoch")
        self.warmup_epochs, self.gather = warmup_epochs, gather
        self.options = {
            "phi": phi,
            "ridge": ridge,
            "absolute": ridge_absolute,
            "covariance": covariance,
        }
        self._memory: deque[tuple[list[Tensor], Tensor]] = deque(maxlen=memory)
        self._module: DetectorModule | None = None
        self._begun = 0  # the optimizer step from which alpha and beta increase

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Register the loss terms with the module; take over the weights that it comes with."""
        assert isinstance(pl_module, DetectorModule)
        self._module = pl_module
        pl_module.loss_terms[self.NAME] = self
        kept = pl_module.term_constants.get(self.NAME, {})
        if kept.get("of") == self._settings and self.weights.estimated:
            self.weights.known = dict(kept["weights"])

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the loss terms from the module."""
        assert isinstance(pl_module, DetectorModule)
        pl_module.loss_terms.pop(self.NAME, None)
        self._module = None

    @property
    def _settings(self) -> dict[str, Any]:
        """What an estimated weight depends on, as plain data."""
        given = {"given": self.weights.given, "shares": self.weights.shares}
        if self.weights.renewed:  # checkpoints of earlier versions lack it
            given["renewed"] = True
        return {**self.options, **given, "memory": self._memory.maxlen}

    def state_dict(self) -> dict[str, Any]:
        """Return the memory bank of object vectors, and the weights."""
        memory = [(vectors, labels) for vectors, labels in self._memory]
        return {"memory": memory, "begun": self._begun, **self.weights.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the memory bank and the weights."""
        self._memory.extend(state_dict["memory"])
        if "begun" in state_dict:  # checkpoints of earlier versions, whose weights were given
            self._begun = state_dict["begun"]
            self.weights.load_state_dict(state_dict)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the shares again."""
        self.weights.begin_epoch(trainer.num_training_batches)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn of shares that have left the healthy range."""
        for message in self.weights.unhealthy():
            if trainer.is_global_zero:
                log.warning(message)

    def finish(self) -> None:
        """End a phase, and an estimation with the steps measured so far."""
        if not self.weights.known:
            assert self._module is not None
            self.weights.settle()
            self._keep(self._module.global_step)
            if not self.weights.known and self._global_zero:
                log.warning(
                    "ldt.alpha, ldt.beta: no step had a gradient of both terms, so LDT was off. "
                    "Batches need two classes with two objects each: type ldt.memory=4, or more"
                )

    def forget(self) -> None:
        """Empty the memory: its vectors are those of a network that has changed."""
        self._memory.clear()

    def __call__(
        self, features: Sequence[Tensor], objects: Objects, detection: Tensor
    ) -> dict[str, Tensor]:
        """Return the weighted loss terms and further values to log.

        Args:
            features: the neck's feature maps [N, C, h, w].
            objects: the objects of the batch.
            detection: the detection loss, a function of the features.
        """
        vectors = [object_vectors(feature, objects) for feature in features]
        labels = objects.labels
        if self.gather and dist.is_available() and dist.is_initialized():
            vectors, labels = gather_vectors(vectors, labels)
        memory = self._recall([v.shape[1] for v in vectors])
        result = discriminants_of(vectors, labels, memory=memory, **self.options)
        factor, weights = self._warmup_factor(), self.weights.known
        self._measure(features, (detection, result.loss_ld, result.loss_cov))
        if self._memory.maxlen:
            self._memory.append(([v.detach() for v in vectors], labels))
        alpha, beta = (factor * weights.get(name, 0.0) for name in ("ld", "cov"))
        logs = {"loss_ld": alpha * result.loss_ld, "loss_cov": beta * result.loss_cov}
        for scale, (count, largest) in enumerate(zip(result.counts, result.largest, strict=True)):
            logs[f"discriminants_{scale}"] = count.float()
            logs[f"eigenvalue_{scale}"] = largest.float()
        numbers = {"alpha": alpha, "beta": beta}
        numbers |= {f"gradient_share_{k}": v for k, v in self.weights.measured.items()}
        # filled on the device: a copy from the host would wait for it
        return logs | {k: result.loss_ld.new_full((), v) for k, v in numbers.items()}

    def _measure(self, features: Sequence[Tensor], losses: Sequence[Tensor]) -> None:
        """Measure the losses' gradients at the neck over all ranks, in the steps where it is due.

        All ranks take part in the same steps: the backward pass of gathered vectors communicates.
        """
        assert self._module is not None
        module, trainer = self._module, self._module.trainer
        before = self.weights.known
        if (before and not self.weights.steps_left) or not self._representative():
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        one = torch.ones((), device=features[0].device)  # scaled: the scale, without waiting for it
        scale = 1.0 if scaler is None else scaler.scale(one)
        squared = squared_gradient_norms(losses, features, scale)
        squared = trainer.strategy.reduce(squared, reduce_op="sum")
        steps = min(STEPS, max(1, module.phase_steps // 10))
        self.weights.add(squared.sqrt().tolist(), steps)
        if self.weights.known is not before:
            self._keep(self._begun if before else module.global_step + 1)

    def _representative(self) -> bool:
        """Return whether the learning rate has warmed up and the memory is full."""
        assert self._module is not None
        full = len(self._memory) == self._memory.maxlen
        return full and self._module.phase_step >= self._module.warmup_steps

    def _keep(self, begun: int) -> None:
        """Store weights that have become known with the module, and use them from a step on."""
        if not (known := self.weights.known):
            return
        assert self._module is not None
        self._begun = begun
        self._module.term_constants[self.NAME] = {"weights": known, "of": self._settings}
        if self._global_zero:
            log.info("ldt: alpha %.4g, beta %.4g", known["ld"], known["cov"])

    @property
    def _global_zero(self) -> bool:
        return self._module is not None and self._module.trainer.is_global_zero

    def _recall(self, widths: list[int]) -> tuple[list[Tensor], Tensor] | None:
        if self._memory and [v.shape[1] for v in self._memory[0][0]] != widths:
            self._memory.clear()  # the neck has been pruned
        if not self._memory:
            return None
        vectors = [torch.cat(scale) for scale in zip(*(v for v, _ in self._memory), strict=True)]
        return vectors, torch.cat([labels for _, labels in self._memory])

    def _warmup_factor(self) -> float:
        if not self.warmup_epochs:
            return 1.0
        assert self._module is not None
        trainer = self._module.trainer
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        steps = self.warmup_epochs * per_epoch
        return min(1.0, (trainer.global_step - self._begun + 1) / steps)


def gather_vectors(vectors: Sequence[Tensor], labels: Tensor) -> tuple[list[Tensor], Tensor]:
    """Gather object vectors, with gradients, and labels of all ranks.

    The backward pass sums the gradients of all ranks, so that DDP's averaged parameter gradients
    are those of a single process with the whole batch. The labels travel as a further column, so
    that there are two communications: the ranks' numbers of objects, and everything else.

    Args:
        vectors: [K, C_s] per scale; K may differ between ranks.
        labels: [K], on the CPU.
    """
    rows = torch.cat([*vectors, labels[:, None].to(vectors[0], non_blocking=True)], dim=1)
    count = torch.full((1,), len(rows), device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = torch.cat(counts).tolist()
    padded = torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), rows.shape[1])])
    parts = zip(all_gather(padded), sizes, strict=True)
    gathered = torch.cat([part[:size] for part, size in parts])
    *found, names = gathered.split([*(v.shape[1] for v in vectors), 1], dim=1)
    return found, names[:, 0].detach().long().cpu()
