"""From a checkpoint back to an ordinary mmdet detector."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldt.detectors.adapter import Detector
from ldt.detectors.models import build
from ldt.pruning import structure

RECORD = "pruning_record"  # attribute of a loaded detector: what its checkpoint says of it


def pruning_record(
    detector: Detector,
    model: dict[str, Any],
    classes: Sequence[str],
    resize: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Return what a checkpoint says of its detector, as plain data; see :func:`load_pruned`.

    Args:
        detector: as it is now, pruned or not.
        model: the config that the unpruned detector is built from.
        classes: names in label order.
        resize: the steps that bring an image to the network's input size, as mmdet's configs have
            them; may be empty.
    """
    return {
        "model": model,
        "classes": list(classes),
        "structure": structure.record(detector.model),
        "predictors": detector.predictors,
        "neck": detector.neck,
        "input_size": list(detector.input_size),
        "resize": list(resize),
    }


def load_pruned(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The detector of a checkpoint, with its pruned structure and weights, in eval mode.

    A detector of one's own parts (``custom_imports`` of its mmdet config) needs their modules on
    the Python path; they are imported.

    Args:
        path: ``round-<t>.ckpt`` or ``last.ckpt`` of a run.
        device: where to put it.

    Returns:
        An ordinary mmdet detector; ``dataset_meta`` holds the class names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or was not written by ldt.
        ImportError: a module of the detector's own config cannot be found.

    Example:
        >>> file = result.save("pruned.ckpt")
        >>> pruned = ldt.load_pruned(file)
        >>> pruned.dataset_meta["classes"]
        ('Car', 'Pedestrian', 'Cyclist')
    """
    return detector_of(read(path), device)


def detector_of(checkpoint: dict[str, Any], device: str | torch.device = "cpu") -> nn.Module:
    """:func:`load_pruned` of a checkpoint's content (:func:`read`)."""
    about = checkpoint["ldt"]
    state = detector_state(checkpoint)
    detector = build(about["model"], initialise=False)
    structure.rebuild(detector, about["structure"], state)
    detector.load_state_dict(_without_aliases(state, set(detector.state_dict())), strict=True)
    setattr(detector, "dataset_meta", {"classes": tuple(about["classes"])})  # noqa: B010
    setattr(detector, RECORD, about)
    detector.to(device)
    detector.eval()  # not every detector's gives itself back
    return detector


def _without_aliases(state: dict[str, Tensor], known: set[str]) -> dict[str, Tensor]:
    """The state without further names of the known tensors: DDQ shares layers once it trains."""
    places = {state[key].data_ptr() for key in known & set(state)}
    return {k: v for k, v in state.items() if k in known or v.data_ptr() not in places}


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


def resize_steps(checkpoint: dict[str, Any], path: str | Path) -> list[dict[str, Any]]:
    """The steps between reading and packing an image that a checkpoint's detector was trained with.

    Args:
        checkpoint: the content of a file (:func:`read`).
        path: of the file, for the error.

    Returns:
        Transforms as mmdet's configs write them.

    Raises:
        ValueError: the checkpoint does not tell them.
    """
    if steps := checkpoint["ldt"].get("resize"):
        return steps
    height, width = checkpoint["ldt"]["input_size"]
    raise ValueError(
        f"{str(path)!r} does not tell how its images were brought to {width}x{height} pixels: an "
        "earlier version wrote it. Add what it was trained with: file = torch.load(path); "
        'file["ldt"]["resize"] = [{"type": "Resize", "scale": '
        f'({width}, {height}), "keep_ratio": True}}]; torch.save(file, path)'
    )


def detector_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The detector's own state dict out of a checkpoint of its LightningModule."""
    return {
        key.removeprefix("detector."): value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith("detector.")
    }
