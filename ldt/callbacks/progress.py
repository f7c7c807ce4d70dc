"""Progress where there is no terminal."""

import logging
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

log = logging.getLogger(__name__)


class LogProgress(ProgressBar):
    """One line per epoch, for logs and pipes."""

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Say the epoch, its loss and time; one process speaks for all."""
        if not trainer.is_global_zero:
            return
        loss = float(trainer.callback_metrics.get("loss", float("nan")))
        log.info(
            "epoch %d/%s  loss %.4f  %.1f s",
            trainer.current_epoch + 1,
            trainer.max_epochs,
            loss,
            time.perf_counter() - self._started,
        )

    def disable(self) -> None:
        """Required by the base class; there is nothing to switch off."""
