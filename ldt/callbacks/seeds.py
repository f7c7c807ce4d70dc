"""Chance that a resumed run meets again."""

import random

import lightning as L
import numpy as np
import torch


class EpochSeeds(L.Callback):
    """Seeds torch, numpy and random at the start of every epoch, by seed, epoch and process.

    What a run draws in an epoch, and in the cut at its end, then does not depend on the epochs
    before, and a resumed run draws what the uninterrupted one did without any state to restore.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called before the epoch's first batch."""
        key = (self.seed, trainer.current_epoch, trainer.global_rank)
        state = int(np.random.SeedSequence(key).generate_state(1)[0])
        random.seed(state)
        np.random.seed(state)  # noqa: NPY002 - mmdet and Torch-Pruning draw from the global one
        torch.manual_seed(state)
