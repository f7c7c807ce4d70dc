"""Checkpoints of a run: written whole or not at all, and found again."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ldt.detectors.checkpoints import read
from ldt.runs.files import LAST, PREVIOUS

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, on the disk for good, and then moves it there.

    The ``last.ckpt`` that it replaces stays as ``last.ckpt.previous``. OSError if it cannot be
    written; what was there is intact then.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write ``checkpoint`` to ``path``."""
        path = Path(path)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and path.exists():
                os.replace(path, path.with_name(PREVIOUS))
            os.replace(draft, path)
        except (OSError, RuntimeError) as error:  # torch wraps a full disk into a RuntimeError
            draft.unlink(missing_ok=True)
            raise OSError(
                f"cannot write {path} ({error}); make room or choose another folder, and the same "
                "command goes on from the checkpoint before, which is intact"
            ) from error


def resumable(folder: Path) -> Path | None:
    """The newest checkpoint of a run's directory that is whole; damaged ones are named."""
    for file in (folder / LAST, folder / PREVIOUS):
        if file.is_file():
            try:
                read(file)
                return file
            except ValueError as error:
                log.warning("%s; it is skipped for the one before", error)
    return None
