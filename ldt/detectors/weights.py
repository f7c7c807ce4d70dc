"""Load published or own weights into a detector without executing code from the file."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ldt.config.names import below
from ldt.config.places import need_checkpoint
from ldt.detectors.archives import load_plain
from ldt.pruning.attention import upgraded

log = logging.getLogger(__name__)


def load_weights(
    detector: nn.Module, path: str | Path, predictors: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Load a published or own state dict, except for predictors whose shapes differ.

    Args:
        detector: an mmdet detector.
        path: ``{"state_dict": ...}`` or a bare state dict. A prefix of all names (``module.`` of
            DDP, ``model.``) and ``_orig_mod.`` of ``torch.compile`` are removed.
        predictors: names of modules whose shapes may differ (another number of classes).

    Returns:
        The metadata of a file that ldt wrote, empty for others; and the names of the predictors'
        tensors that keep their initial values.

    Raises:
        ValueError: the file belongs to another detector (the message counts and lists the keys),
            or contains more than plain tensors.
        FileNotFoundError: there is no such file.
    """
    need_checkpoint(path)
    content = _read(path)
    state = content.get("state_dict", content)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"detector.checkpoint={str(path)!r} contains no state dict of tensors")
    own = detector.state_dict()
    state = _without_prefixes(state, own)
    # mmdet 2 stored both the model's and the averaged weights; later files have only the latter
    state = {key: value for key, value in state.items() if not key.startswith("ema_")}
    state = upgraded(detector, {}, state)[1]
    new_head = {
        key
        for key, value in own.items()
        if key in state and state[key].shape != value.shape and below(key, predictors)
    }
    wrong = sorted(key for key in own if key not in state or state[key].shape != own[key].shape)
    wrong = [key for key in wrong if key not in new_head]
    unknown = sorted(set(state) - set(own))
    if wrong or unknown:
        pruned, way = "", "Choose"
        if "ldt" in content:
            pruned = " or to a pruned one"
            way = f"A pruned one is pruned further by ldt prune {path} DATA --rate 0.3; else choose"
        raise ValueError(
            f"detector.checkpoint={str(path)!r} belongs to another detector{pruned}: "
            f"{len(wrong)} of {len(own)} tensors are missing or have another shape "
            f"(first: {wrong[:3]}), {len(unknown)} are unknown (first: {unknown[:3]}). "
            f"{way} the `detector` (and its options) that the file was saved from"
        )
    if new_head:
        log.warning("new predictors (another number of classes): %s", sorted(new_head))
    detector.load_state_dict({k: v for k, v in state.items() if k not in new_head}, strict=False)
    return content.get("ldt", {}), sorted(new_head)


def _without_prefixes(state: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers: the one below which most of the detector's names are."""
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    prefixes = Counter(
        key[: len(key) - len(name)] for key in state for name in _ends(key) if name in own
    )
    prefix = max(prefixes, key=lambda found: prefixes[found], default="")
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _ends(key: str) -> list[str]:
    """Return a dotted name and what is left of it without its first parts."""
    parts = key.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


class _DiscardedBuffer:
    """Replacement of mmengine's HistoryBuffer in published checkpoints, without its content."""

    def __setstate__(self, state: object) -> None:
        """Discard the state."""


def _ignore(*_: object) -> None:
    """Replace the lookup of HistoryBuffer's methods."""


SafeGlobal = Callable | tuple[Callable, str]  # what to unpickle a name as


def _allowed_globals() -> list[SafeGlobal]:
    """Return what mmdet's published checkpoints contain besides tensors: their training logs."""
    scalars = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32")]
    allowed: list[SafeGlobal] = [np.ndarray, np.dtype, *scalars]
    names = ("numpy.core.multiarray", "numpy._core.multiarray")
    multiarray = import_module(names[hasattr(np, "_core")])
    for function in (multiarray._reconstruct, multiarray.scalar):
        allowed += [(function, f"{name}.{function.__name__}") for name in names]
    buffer = (_DiscardedBuffer, "mmengine.logging.history_buffer.HistoryBuffer")
    return [*allowed, buffer, (_ignore, "builtins.getattr")]


def _read(path: str | Path) -> dict[str, Any]:
    try:
        content = load_plain(Path(path), _allowed_globals())
    except Exception as error:  # torch raises many types for truncated or foreign files
        raise ValueError(
            f"detector.checkpoint={str(path)!r} is damaged or contains more than tensors, plain "
            f"data and mmengine's log buffers ({type(error).__name__}: {str(error)[:200]}). A file "
            "that you trust can be converted: torch.save({'state_dict': torch.load(path, "
            "weights_only=False)['state_dict']}, path)"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"detector.checkpoint={str(path)!r} contains a {type(content).__name__}, not a state "
            "dict"
        )
    return content
