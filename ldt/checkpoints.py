"""Checkpoints: written whole or not at all, read as plain data, turned into mmdet detectors."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor, nn

from ldt.detectors import build
from ldt.pruning import structure

log = logging.getLogger(__name__)
LAST = "last.ckpt"
PREVIOUS = "last.ckpt.previous"


class WholeCheckpoints(TorchCheckpointIO):
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


def load_pruned(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The detector of a checkpoint, with its pruned structure and weights, in eval mode.

    Args:
        path: ``round-<t>.ckpt`` or ``last.ckpt`` of a run.
        device: where to put it.

    Returns:
        An ordinary mmdet detector; ``dataset_meta`` holds the class names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or was not written by ldt.
    """
    checkpoint = read(path)
    about = checkpoint["ldt"]
    state = detector_state(checkpoint)
    detector = build(about["model"], initialise=False)
    structure.rebuild(detector, about["structure"], state)
    detector.load_state_dict(state, strict=True)
    detector.dataset_meta = {"classes": tuple(about["classes"])}  # type: ignore[assignment]
    return detector.to(device).eval()


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content, loaded with ``weights_only=True``; errors as :func:`load_pruned`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a truncated or foreign file
        raise ValueError(f"{str(path)!r} is damaged or no checkpoint: {error}") from error
    if not isinstance(checkpoint, dict) or "ldt" not in checkpoint:
        raise ValueError(f"{str(path)!r} was not written by ldt: it has no structure record")
    return checkpoint


def detector_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The detector's own state dict out of a checkpoint of its LightningModule."""
    return {
        key.removeprefix("detector."): value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith("detector.")
    }
