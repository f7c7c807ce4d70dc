"""The two LDT losses as additional terms of a detector's training loss."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from ldt.config.values import NaturalNumber, NotNegative, Share, checked
from ldt.discriminant import PHI, RIDGE, RIDGE_ABSOLUTE, discriminants_of
from ldt.location import object_vectors
from ldt.module import DetectorModule
from ldt.objects import Objects


class LDTLoss(L.Callback):
    """Add alpha L_LD + beta L_cov (eq. 12) to the loss of a :class:`DetectorModule`.

    Beside the losses, it logs the number of discriminants ``discriminants_<s>`` and the largest
    eigenvalue ``eigenvalue_<s>`` of each scale, and each term's ratio to the detection loss.

    Args:
        phi: eigenvalues above phi times the largest one count.
        alpha: weight of the discriminant term.
        beta: weight of the covariance term.
        ridge: ridge of S_w, relative to tr(S_w)/C.
        ridge_absolute: constant added to the ridge.
        covariance: ``mean`` or ``sum`` of the off-diagonal entries in eq. 11.
        warmup_epochs: alpha and beta increase linearly from 0 over these first epochs of a run.
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
        alpha: NotNegative = 5e-4,
        beta: NotNegative = 7.5,
        ridge: NotNegative = RIDGE,
        ridge_absolute: NotNegative = RIDGE_ABSOLUTE,
        covariance: Literal["mean", "sum"] = "mean",
        warmup_epochs: NotNegative = 1.0,
        memory: NaturalNumber = 0,
        gather: bool = True,
    ) -> None:
        self.alpha, self.beta, self.warmup_epochs = alpha, beta, warmup_epochs
        self.gather = gather
        self.options = {
            "phi": phi,
            "ridge": ridge,
            "absolute": ridge_absolute,
            "covariance": covariance,
        }
        self._memory: deque[tuple[list[Tensor], Tensor]] = deque(maxlen=memory)
        self._module: DetectorModule | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Register the loss terms with the module."""
        assert isinstance(pl_module, DetectorModule)
        self._module = pl_module
        pl_module.loss_terms[self.NAME] = self

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the loss terms from the module."""
        assert isinstance(pl_module, DetectorModule)
        pl_module.loss_terms.pop(self.NAME, None)
        self._module = None

    def state_dict(self) -> dict[str, Any]:
        """Return the memory bank of object vectors."""
        return {"memory": [(vectors, labels) for vectors, labels in self._memory]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the memory bank."""
        self._memory.extend(state_dict["memory"])

    def __call__(self, features: Sequence[Tensor], objects: Objects) -> dict[str, Tensor]:
        """Return the weighted loss terms and further values to log.

        Args:
            features: the neck's feature maps [N, C, h, w].
            objects: the objects of the batch.
        """
        vectors = [object_vectors(feature, objects) for feature in features]
        labels = objects.labels
        if self.gather and dist.is_available() and dist.is_initialized():
            vectors, labels = gather_vectors(vectors, labels)
        memory = self._recall([v.shape[1] for v in vectors])
        result = discriminants_of(vectors, labels, memory=memory, **self.options)
        if self._memory.maxlen:
            self._memory.append(([v.detach() for v in vectors], labels))
        warmup = self._warmup_factor()
        logs = {
            "loss_ld": self.alpha * warmup * result.loss_ld,
            "loss_cov": self.beta * warmup * result.loss_cov,
        }
        for scale, (count, largest) in enumerate(zip(result.counts, result.largest, strict=True)):
            logs[f"discriminants_{scale}"] = count.float()
            logs[f"eigenvalue_{scale}"] = largest.float()
        return logs

    def _recall(self, widths: list[int]) -> tuple[list[Tensor], Tensor] | None:
        if self._memory and [v.shape[1] for v in self._memory[0][0]] != widths:
            self._memory.clear()  # the neck has been pruned
        if not self._memory:
            return None
        vectors = [torch.cat(scale) for scale in zip(*(v for v, _ in self._memory), strict=True)]
        return vectors, torch.cat([labels for _, labels in self._memory])

    def _warmup_factor(self) -> float:
        assert self._module is not None
        trainer = self._module.trainer
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        steps = self.warmup_epochs * per_epoch
        return min(1.0, (trainer.global_step + 1) / steps) if steps else 1.0


def gather_vectors(vectors: Sequence[Tensor], labels: Tensor) -> tuple[list[Tensor], Tensor]:
    """Gather object vectors, with gradients, and labels of all ranks.

    The backward pass sums the gradients of all ranks, so that DDP's averaged parameter gradients
    are those of a single process with the whole batch. The labels travel as a further column, so
    that there are two communications: the ranks' numbers of objects, and everything else.

    Args:
        vectors: [K, C_s] per scale; K may differ between ranks.
        labels: [K], on the CPU.
    """
    rows = torch.cat([*vectors, labels[:, None].to(vectors[0])], dim=1)
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = torch.cat(counts).tolist()
    padded = torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), rows.shape[1])])
    parts = zip(all_gather(padded), sizes, strict=True)
    gathered = torch.cat([part[:size] for part, size in parts])
    *found, names = gathered.split([*(v.shape[1] for v in vectors), 1], dim=1)
    return found, names[:, 0].detach().long().cpu()
