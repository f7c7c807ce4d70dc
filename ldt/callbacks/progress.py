"""Lightning's progress bar: tell the display of the run which step it is at."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from ldt import progress
from ldt.progress.steps import BASE, MASK, MEASURE, RETRAIN, Step

if TYPE_CHECKING:
    from ldt.loop.prune_retrain import PruneRetrain

log = logging.getLogger(__name__)


class RunProgress(ProgressBar):
    """Count epochs and images of the steps of a run, on rank 0 only.

    Args:
        loop: knows the phase of an epoch.
        batch_size: images per optimizer step, over all processes.
    """

    def __init__(self, loop: PruneRetrain, batch_size: int) -> None:
        super().__init__()
        self.loop, self.batch_size = loop, batch_size
        self._images = 0.0  # per batch
        self._started = 0.0  # time of the beginning of the epoch
        self._step: Step | None = None
        self._silent = False

    def disable(self) -> None:
        """Show nothing."""
        self._silent = True

    def enable(self) -> None:
        """Show progress again."""
        self._silent = False

    def on_train_start(self, trainer: L.Trainer, *_: object) -> None:
        """Set the number of images of each step, as the trainer's limits leave it."""
        if self._silent:
            return
        self._images = self.batch_size / trainer.accumulate_grad_batches
        self._set_images(trainer)
        step = self._begin(trainer) if trainer.current_epoch else None
        if step is not None and (steps := progress.current_steps()) is not None:
            of = f" of {step.epochs}" if step.epochs else ""
            log.info(
                "resumed: goes on with %s, epoch %d%s", steps.label(step), self._epoch(trainer), of
            )

    def _set_images(self, trainer: L.Trainer) -> None:
        steps = progress.current_steps()
        for step in steps.all if steps else ():
            if step.is_training and step.epochs:
                step.images = step.epochs * trainer.num_training_batches * self._images

    def on_train_epoch_start(self, trainer: L.Trainer, *_: object) -> None:
        """Begin a step with the first epoch of a phase."""
        if self._silent:
            return
        self._started = time.perf_counter()
        self._step = self._begin(trainer)
        if self._step is not None:
            self._step.epoch = self._epoch(trainer)

    def _begin(self, trainer: L.Trainer) -> Step | None:
        step = progress.begin(*self._phase())
        if step is not None and not step.epoch:  # also after a resumption in the phase
            step.done = step.before = (
                (self._epoch(trainer) - 1) * trainer.num_training_batches * self._images
            )
        return step

    def _phase(self) -> tuple[str, int]:
        round_ = self.loop.round
        if not round_:
            return BASE, 0
        return (MASK if self.loop.masking else RETRAIN), round_

    def _epoch(self, trainer: L.Trainer) -> int:
        """Return the number of the current epoch in its phase, from 1."""
        return self.loop.epochs_before(trainer.current_epoch) + 1

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        """Count the images of the batch; log the epoch with its loss and time after the last."""
        if self._silent:
            return
        if self._step is not None:
            self._step.done += self._images
            every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
            if every and trainer.global_step % every == 0:  # the loss is known in these steps only
                progress.note(f"loss {_loss(trainer):.4g}")
        if trainer.is_last_batch:
            self._log_epoch(trainer)

    def _log_epoch(self, trainer: L.Trainer) -> None:
        steps, seconds = progress.current_steps(), time.perf_counter() - self._started
        name = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        if steps is not None and self._step is not None:
            name = f"{steps.label(self._step)}  {progress.epoch_of(self._step)}"
        progress.say(f"{name}  loss {_loss(trainer):.4f}  {seconds:.1f} s{progress.left()}")

    def on_validation_start(self, trainer: L.Trainer, *_: object) -> None:
        """Begin to measure a round, unless this is a validation within a phase or of a cut."""
        alone = trainer.state.fn == "validate"  # before the fit
        if self._silent or self.loop.after_cut:
            return
        if alone or self.loop.is_last_epoch(trainer.current_epoch):
            progress.begin(MEASURE, self.loop.round)

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, *_: object
    ) -> None:
        """Count the images of the batch."""
        steps = progress.current_steps()
        if not self._silent and steps and steps.current and steps.current.name == MEASURE:
            progress.advance(len(batch["inputs"]) * trainer.world_size)


def _loss(trainer: L.Trainer) -> float:
    return float(trainer.callback_metrics.get("loss", float("nan")))
