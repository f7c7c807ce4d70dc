"""Atomic writing of a run's checkpoints, and finding the newest intact one."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ldt.detectors.checkpoints import read_unchecked
from ldt.runs.files import LAST, PREVIOUS, writing

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint to a draft, flush it to disk, and then rename it.

    The previous ``last.ckpt`` is kept as ``last.ckpt.previous``.

    Args:
        needed: a file that is there as long as the run's directory has not been removed.
    """

    def __init__(self, needed: Path | None = None) -> None:
        super().__init__()
        self.needed = needed

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            FileNotFoundError: the run's directory has been removed.
            OSError: the file cannot be written; the previous one is intact.
        """
        path = Path(path)
        if self.needed is not None and not self.needed.exists():
            raise FileNotFoundError(
                f"{path.parent} was removed during the run; the same command begins it again"
            )
        try:
            with writing(path) as draft:
                with draft.open("wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())  # before the earlier file is moved away
                if path.name == LAST and path.exists():
                    os.replace(path, path.with_name(PREVIOUS))
        except (OSError, RuntimeError) as error:  # torch wraps a full disk into a RuntimeError
            raise OSError(
                f"cannot write {path} ({error}); free disk space or choose another folder; the "
                "same command then resumes from the previous checkpoint, which is intact"
            ) from error


def resumable(folder: Path) -> Path | None:
    """Return the newest intact checkpoint in a run's directory; log the damaged ones."""
    for file in (folder / LAST, folder / PREVIOUS):
        if file.is_file():
            try:
                read_unchecked(file)
                return file
            except ValueError as error:
                log.warning("%s; trying the previous one", error)
    return None
