"""YOLOX's mode switch: no mosaic and an L1 loss in the last epochs of a phase."""

from collections.abc import Callable
from typing import Any

import lightning as L

from ldt.callbacks.lightning_internals import datamodule_of
from ldt.data.datamodule import DetectionDataModule
from ldt.module import DetectorModule


class YOLOXModeSwitch(L.Callback):
    """Train the last epochs of every phase without mosaic and with an L1 loss, as YOLOX does.

    Only the images change for configs that switch their pipeline alone.

    Args:
        is_last_epoch: whether a phase ends with an epoch.
        epochs: number of epochs without mosaic.
        l1: whether YOLOX's heads have the L1 loss in these epochs.
    """

    def __init__(self, is_last_epoch: Callable[[int], bool], epochs: int, l1: bool = True) -> None:
        self.is_last_epoch, self.epochs, self.l1 = is_last_epoch, epochs, l1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Switch for the first epoch, whose loader starts before `on_train_epoch_start`."""
        self._switch(trainer, pl_module, 0)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Switch for the first epoch of a resumed run, for the same reason."""
        self._switch(trainer, pl_module, checkpoint["epoch"] + 1)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Switch before the epoch's first batch is loaded."""
        self._switch(trainer, pl_module, trainer.current_epoch)

    def _switch(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> None:
        plain = any(self.is_last_epoch(epoch + ahead) for ahead in range(self.epochs))
        data = datamodule_of(trainer)
        assert isinstance(data, DetectionDataModule)
        assert isinstance(pl_module, DetectorModule)
        (data.augment_off if plain else data.augment_on)()
        head = getattr(pl_module.detector, "bbox_head", None)
        if self.l1 and hasattr(head, "use_l1"):
            setattr(head, "use_l1", plain)  # noqa: B010 - set at run time
