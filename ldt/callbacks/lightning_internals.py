"""The undocumented part of Lightning's API that is used, gathered in one place.

``tests/test_internals.py`` names what is missing when a release changes it.
"""

import gc
import signal
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.optim.swa_utils import AveragedModel


def rebuild_optimizers(trainer: L.Trainer) -> None:
    """Rebuild optimizers and learning-rate schedulers for the module as it is now."""
    trainer.strategy.setup_optimizers(trainer)


def rewrap_ddp(trainer: L.Trainer) -> None:
    """Re-create the DDP wrapper; its gradient buckets still have the old shapes."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.model = trainer.lightning_module
        gc.collect()  # the old wrapper is part of reference cycles, and its hooks would still fire
        strategy.configure_ddp()


def set_max_epochs(trainer: L.Trainer, epochs: int) -> None:
    """Change the number of epochs of a running fit."""
    trainer.fit_loop.max_epochs = epochs


def next_epoch(checkpoint: dict[str, Any]) -> int:
    """Return the epoch that a run resumed from a checkpoint goes on with."""
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]


def lift_step_limit(trainer: L.Trainer) -> None:
    """Let a fit take as many steps as its epochs have (``fast_dev_run`` limits it to its own)."""
    trainer.fit_loop.epoch_loop.max_steps = -1


def validate(trainer: L.Trainer) -> None:
    """Run the validation of a running fit, between two of its epochs."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def set_average(averaging: WeightAveraging, average: AveragedModel) -> None:
    """Replace the model that holds the averaged weights."""
    averaging._average_model = average


def average_of(averaging: WeightAveraging) -> AveragedModel:
    """Return the model that holds the averaged weights, from the start of a fit on."""
    assert averaging._average_model is not None
    return averaging._average_model


def copy_average(averaging: WeightAveraging, module: L.LightningModule) -> None:
    """Copy the averaged weights into the module."""
    averaging._copy_average_to_current(module)


def was_interrupted(trainer: L.Trainer) -> bool:
    """Return whether a fit was ended by Ctrl-C, after which Lightning raises SystemExit."""
    return trainer.interrupted


def ignore_signals(trainer: L.Trainer) -> None:
    """Keep Lightning from handling signals: within SLURM it would save and requeue in mid-epoch."""
    trainer._signal_connector.register_signal_handlers = lambda: None


def end_processes(trainer: L.Trainer) -> None:
    """End the processes that a trainer has started, which would wait for this one."""
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signal.SIGKILL)


def starts_processes(trainer: L.Trainer) -> bool:
    """Return whether a fit starts processes, each of which repeats the command."""
    return trainer.world_size > 1 and isinstance(
        trainer.strategy.launcher, _SubprocessScriptLauncher
    )


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """Return the callbacks of a trainer."""
    return trainer.callbacks  # type: ignore[attr-defined]


def datamodule_of(trainer: L.Trainer) -> L.LightningDataModule | None:
    """Return the data module of a running fit."""
    return trainer.datamodule  # type: ignore[attr-defined]
