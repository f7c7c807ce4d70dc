"""YOLOX's exponential moving average of the weights, based on Lightning's WeightAveraging."""

import math
from itertools import chain
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ldt.callbacks.lightning_internals import average_of, copy_average, set_average


class ExponentialMovingAverage(WeightAveraging):
    """mmdet's ExpMomentumEMA, whose momentum decreases during training.

    At update t the average moves towards the weights by the factor
    (1 - momentum) exp(-(1 + t) / gamma) + momentum. Validation and checkpoints use the average. It
    is on the device of the module.

    Args:
        momentum: the factor after many updates.
        gamma: number of updates over which the initial factor decays.
    """

    def __init__(self, momentum: float = 1e-4, gamma: int = 2000) -> None:
        super().__init__()
        self.momentum, self.gamma = momentum, gamma

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin with the module's current weights."""
        if stage == "fit":
            set_average(self, Average(pl_module, self.momentum, self.gamma))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follow the module to its device and memory format, which it gets after :meth:`setup`."""
        average = average_of(self).module.to(pl_module.device)
        for own, value in zip(average.parameters(), pl_module.parameters(), strict=True):
            if own.stride() != value.stride():
                own.data = torch.empty_like(value).copy_(own.data)

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


class Average(AveragedModel):
    """The average of a module's parameters and buffers.

    The number of updates, ``n_averaged``, stays on the CPU: an update reads it, and would wait for
    a GPU.
    """

    def __init__(self, model: nn.Module, momentum: float, gamma: int) -> None:
        super().__init__(model, use_buffers=True)
        self.momentum, self.gamma = momentum, gamma

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the weights; the first update copies them."""
        updates, averages, values = int(self.n_averaged), _tensors(self.module), _tensors(model)
        pairs = list(zip(averages, values, strict=True))
        moving = [pair for pair in pairs if updates and pair[0].is_floating_point()]
        for average, value in pairs:
            if not updates or not average.is_floating_point():
                average.copy_(value)
        if moving:  # all at once: a GPU would spend more time on launching the operations
            step = (1 - self.momentum) * math.exp(-(1 + updates) / self.gamma) + self.momentum
            averages, values = map(list, zip(*moving, strict=True))
            difference = torch._foreach_sub(values, averages)
            torch._foreach_mul_(difference, step)
            torch._foreach_add_(averages, difference)
        self.n_averaged += 1


def _tensors(module: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in chain(module.parameters(), module.buffers())]
