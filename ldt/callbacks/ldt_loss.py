"""The two LDT losses as named terms of a detector's training loss."""

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
from ldt.discriminant import (
    PHI,
    RIDGE,
    RIDGE_ABSOLUTE,
    discriminants_of,
    object_vectors,
)
from ldt.module import DetectorModule
from ldt.objects import Objects


class LDTLoss(L.Callback):
    """Adds alpha L_LD + beta L_cov (eq. 12) to the loss of a :class:`DetectorModule`.

    Logged beside the losses: per scale the number of discriminants ``discriminants_<s>`` and the
    largest eigenvalue ``eigenvalue_<s>``, and each term's share of the detection loss.

    Args:
        phi: eigenvalues above phi * max count.
        alpha: weight of the discriminating term.
        beta: weight of the covariance term.
        ridge: ridge of S_w, in tr(S_w)/C.
        ridge_absolute: added to it.
        covariance: ``mean`` or ``sum`` of the off-diagonal entries of eq. 11.
        warmup_epochs: alpha and beta rise linearly from 0 over these first epochs of a run.
        memory: earlier batches whose detached object vectors join the scatter matrices.
        gather: take the object vectors of all processes, with gradient.

    Raises:
        ValueError: a value outside of what is allowed, naming its key.
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
        self._module: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Register the terms with the module."""
        assert isinstance(pl_module, DetectorModule)
        self._module = pl_module
        pl_module.loss_terms[self.NAME] = self

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the terms away again."""
        assert isinstance(pl_module, DetectorModule)
        pl_module.loss_terms.pop(self.NAME, None)
        self._module = None

    def state_dict(self) -> dict[str, Any]:
        """The remembered object vectors, so that a resumed run goes on as it would have."""
        return {"memory": [(vectors, labels) for vectors, labels in self._memory]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the saved memory up again."""
        self._memory.extend(state_dict["memory"])

    def __call__(self, features: Sequence[Tensor], objects: Objects) -> dict[str, Tensor]:
        """The weighted terms and what is logged beside them.

        Args:
            features: the neck's maps [N, C, h, w].
            objects: the objects of the batch.
        """
        vectors = [object_vectors(feature, objects) for feature in features]
        labels = objects.labels
        if self.gather and dist.is_available() and dist.is_initialized():
            vectors, labels = gather_vectors(vectors, labels)
        memory = self._recall([v.shape[1] for v in vectors])
        found = discriminants_of(vectors, labels, memory=memory, **self.options)
        if self._memory.maxlen:
            self._memory.append(([v.detach() for v in vectors], labels))
        rise = self._rise()
        logs = {
            "loss_ld": self.alpha * rise * found.loss_ld,
            "loss_cov": self.beta * rise * found.loss_cov,
        }
        for scale, (count, largest) in enumerate(zip(found.counts, found.largest, strict=True)):
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

    def _rise(self) -> float:
        trainer = self._module.trainer
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        steps = self.warmup_epochs * per_epoch
        return min(1.0, (trainer.global_step + 1) / steps) if steps else 1.0


def gather_vectors(vectors: Sequence[Tensor], labels: Tensor) -> tuple[list[Tensor], Tensor]:
    """Object vectors and labels of all processes, the former with gradient.

    The backward sums the gradients of all processes; DDP's averaging of parameter gradients then
    gives what one process with the whole batch would have.

    Args:
        vectors: [K, C_s] per scale; K may differ between processes.
        labels: [K].
    """
    world = dist.get_world_size()
    count = torch.tensor([len(labels)], device=labels.device)
    counts = [torch.zeros_like(count) for _ in range(world)]
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]
    widths = [v.shape[1] for v in vectors]
    rows = torch.cat(list(vectors), dim=1)  # one exchange for all scales
    padded = torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), rows.shape[1])])
    gathered = torch.cat(
        [part[:size] for part, size in zip(all_gather(padded), sizes, strict=True)]
    )
    all_labels = [labels.new_zeros(max(sizes)) for _ in range(world)]
    dist.all_gather(all_labels, torch.cat([labels, labels.new_zeros(max(sizes) - len(labels))]))
    return list(gathered.split(widths, dim=1)), torch.cat(
        [part[:size] for part, size in zip(all_labels, sizes, strict=True)]
    )
