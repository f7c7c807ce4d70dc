"""Per-epoch reseeding so that resumed runs are deterministic."""

import random

import lightning as L
import numpy as np
import torch


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
        state = int(np.random.SeedSequence(key).generate_state(1)[0])
        random.seed(state)
        np.random.seed(state)  # noqa: NPY002 - mmdet and Torch-Pruning use the global generator
        torch.manual_seed(state)
