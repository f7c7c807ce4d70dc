"""Progress reports for output that is not a terminal."""

import logging
import time

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

log = logging.getLogger(__name__)


class LogProgress(ProgressBar):
    """Log one line per epoch, for log files and pipes."""

    def on_train_epoch_start(self, trainer: L.Trainer, *_: object) -> None:
        """Start the timer."""
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Log the epoch with its loss and time, on rank 0 only."""
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
        """Do nothing; the base class requires this method."""
