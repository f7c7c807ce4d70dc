"""YOLOX's mode switch: the last epochs of a phase run without mosaic."""

from collections.abc import Callable
from typing import Any

import lightning as L

from ldt.callbacks.lightning_internals import datamodule_of


class YOLOXModeSwitch(L.Callback):
    """YOLOX's mode switch: the last epochs of a phase run without mosaic and with an L1 loss.

    Args:
        is_last_epoch: tells where phases end.
        epochs: how many.
    """

    def __init__(self, is_last_epoch: Callable[[int], bool], epochs: int) -> None:
        self.is_last_epoch, self.epochs = is_last_epoch, epochs

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Switch for the first epoch: its loader starts before `on_train_epoch_start`."""
        self._switch(trainer, pl_module, 0)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Switch for the epoch that a resumed run begins with, for the same reason."""
        self._switch(trainer, pl_module, checkpoint["epoch"] + 1)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Switch before the epoch's first batch is drawn."""
        self._switch(trainer, pl_module, trainer.current_epoch)

    def _switch(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> None:
        plain = any(self.is_last_epoch(epoch + ahead) for ahead in range(self.epochs))
        data = datamodule_of(trainer)
        (data.augment_off if plain else data.augment_on)()
        head: Any = getattr(pl_module.detector, "bbox_head", None)
        if hasattr(head, "use_l1"):
            head.use_l1 = plain
