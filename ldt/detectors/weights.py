"""Published and own weights into a detector, without running anything that a file holds."""

import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldt.pruning.names import below

log = logging.getLogger(__name__)


def load_weights(detector: nn.Module, path: str | Path, predictors: Sequence[str]) -> None:
    """Load a published or own state dict, the predictors excepted where shapes differ.

    Args:
        detector: an mmdet detector.
        path: ``{"state_dict": ...}`` or a bare state dict; ``module.`` prefixes are removed.
        predictors: module names whose shapes may differ (another number of classes).

    Raises:
        ValueError: the file belongs to another detector (the message counts and names the keys),
            or cannot be read as plain tensors.
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"detector.checkpoint={str(path)!r}: no such file")
    content = _read(path)
    state = content.get("state_dict", content)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"detector.checkpoint={str(path)!r} holds no state dict of tensors")
    state = {key.removeprefix("module.").removeprefix("detector."): v for key, v in state.items()}
    # what mmdet 2 averaged beside the model; a later file's `state_dict` is the average itself
    state = {key: value for key, value in state.items() if not key.startswith("ema_")}
    own = detector.state_dict()
    new_head = {
        key
        for key, value in own.items()
        if key in state and state[key].shape != value.shape and below(key, predictors)
    }
    wrong = sorted(key for key in own if key not in state or state[key].shape != own[key].shape)
    wrong = [key for key in wrong if key not in new_head]
    unknown = sorted(set(state) - set(own))
    if wrong or unknown:
        pruned = " or to a pruned one, which ldt.load_pruned opens" if "ldt" in content else ""
        raise ValueError(
            f"detector.checkpoint={str(path)!r} belongs to another detector{pruned}: "
            f"{len(wrong)} of {len(own)} tensors are missing or have another shape "
            f"(first: {wrong[:3]}), {len(unknown)} are unknown (first: {unknown[:3]}). "
            "Choose the `detector` (and its options) that the file was made with"
        )
    if new_head:
        log.warning("new predictors (another number of classes): %s", sorted(new_head))
    detector.load_state_dict({k: v for k, v in state.items() if k not in new_head}, strict=False)


class _Buffer:
    """Stands for mmengine's HistoryBuffer in a published checkpoint; what it held is not used."""

    def __setstate__(self, state: Any) -> None:
        """Take nothing."""


def _nothing(*_: Any) -> None:
    """Stands for the lookup of HistoryBuffer's own methods."""


def _published() -> list[Any]:
    """What mmdet's published checkpoints hold beside tensors: logs of their training."""
    scalars = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32")]
    numpy = [np.ndarray, np.dtype, *scalars]
    names = ("numpy.core.multiarray", "numpy._core.multiarray")
    multiarray: Any = import_module(names[hasattr(np, "_core")])
    for function in (multiarray._reconstruct, multiarray.scalar):
        numpy += [(function, f"{name}.{function.__name__}") for name in names]
    buffer = (_Buffer, "mmengine.logging.history_buffer.HistoryBuffer")
    return [*numpy, buffer, (_nothing, "builtins.getattr")]


def _read(path: str | Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_published()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a truncated or foreign file
        raise ValueError(
            f"detector.checkpoint={str(path)!r} is damaged or holds more than tensors, plain data "
            f"and mmengine's log buffers ({type(error).__name__}: {str(error)[:200]}). A file that "
            "you trust becomes loadable by torch.save({'state_dict': torch.load(path, "
            "weights_only=False)['state_dict']}, path)"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"detector.checkpoint={str(path)!r} holds a {type(content).__name__}, not a state dict"
        )
    return content
