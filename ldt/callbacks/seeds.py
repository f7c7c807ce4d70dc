"""Per-epoch reseeding so that resumed runs are deterministic."""

import lightning as L
import torch

from ldt.data.sampling import seed_generators


class EpochSeeds(L.Callback):
    """Seed torch, numpy and random at the start of every epoch, by seed, epoch and rank.

    The random numbers of an epoch, and of the pruning at its end, do not depend on earlier epochs
    then, so a resumed run has those of the uninterrupted run without restoring any state.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed the generators before the epoch's first batch."""
        key = (self.seed, trainer.current_epoch, trainer.global_rank)
        torch.manual_seed(seed_generators(*key))
