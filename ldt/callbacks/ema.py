"""YOLOX's exponential moving average of the weights, based on Lightning's WeightAveraging."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from ldt.callbacks.lightning_internals import copy_average


class ExponentialMovingAverage(WeightAveraging):
    """mmdet's ExpMomentumEMA, whose momentum decreases during training.

    At update t the average moves towards the weights by the factor
    (1 - momentum) exp(-(1 + t) / gamma) + momentum. Validation and checkpoints use the average.

    Args:
        momentum: the factor after many updates.
        gamma: number of updates over which the initial factor decays.
    """

    def __init__(self, momentum: float = 1e-4, gamma: int = 2000) -> None:
        def move(average: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
            if not average.is_floating_point():
                return current
            step = (1 - momentum) * math.exp(-(1 + int(updates)) / gamma) + momentum
            return average + step * (current - average)

        super().__init__(avg_fn=move)

    def finish(self, pl_module: L.LightningModule) -> None:
        """Copy the average into the module, at the end of a phase."""
        copy_average(self, pl_module)

    def restart(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restart the average from the module's current weights, after its structure changed."""
        self.setup(trainer, pl_module, "fit")

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adopt the module's current structure, which may be pruned, before loading."""
        self.restart(trainer, pl_module)
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
