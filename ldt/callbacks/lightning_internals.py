"""Everything of Lightning that is used and not documented, in one place.

``tests/test_internals.py`` names what is missing when a release changes it.
"""

import gc
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy


def rebuild_optimizers(trainer: L.Trainer) -> None:
    """Set up optimizers and learning-rate schedules for the module as it is now."""
    trainer.strategy.setup_optimizers(trainer)


def rewrap_ddp(trainer: L.Trainer) -> None:
    """Re-create the DDP wrapper; its gradient buckets still have the old shapes."""
    strategy: Any = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.model = trainer.lightning_module
        gc.collect()  # the old wrapper's hooks fire until it is gone, and it is part of cycles
        strategy.configure_ddp()


def set_max_epochs(trainer: L.Trainer, epochs: int) -> None:
    """Change the number of epochs of a fit that is running."""
    trainer.fit_loop.max_epochs = epochs


def copy_average(averaging: WeightAveraging, module: L.LightningModule) -> None:
    """Copy the averaged weights into a module."""
    averaging._copy_average_to_current(module)


def was_interrupted(trainer: L.Trainer) -> bool:
    """Whether a fit ended by Ctrl-C, after which Lightning raises SystemExit."""
    return trainer.interrupted


def datamodule_of(trainer: L.Trainer) -> Any:
    """Return the data module of a fit that is running."""
    return trainer.datamodule  # type: ignore[attr-defined]
