"""Load checkpoints as ordinary mmdet detectors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmdet.models.detectors import BaseDetector
from torch import Tensor, nn

from ldt.detectors.adapter import Detector
from ldt.detectors.archives import load_plain
from ldt.detectors.freezing import thaw_pruned
from ldt.detectors.models import build
from ldt.detectors.untrusted import checked, limited_allocation
from ldt.pruning import structure
from ldt.runs.refusal import one_line
from ldt.runs.run import checkpoint_of

RECORD = "pruning_record"  # attribute of a loaded detector: its checkpoint's metadata


def pruning_record(
    detector: Detector,
    model: dict[str, Any],
    classes: Sequence[str],
    resize: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Return the metadata that :func:`load_pruned` needs in addition to the weights, as plain data.

    Args:
        detector: as it is now, pruned or not.
        model: the config that the unpruned detector is built from.
        classes: class names in label order.
        resize: the transforms that resize an image to the network's input size, as in mmdet's
            configs; may be empty.
    """
    return {
        "model": model,
        "classes": list(classes),
        "structure": structure.record(detector.model),
        "predictors": detector.predictors,
        "neck": detector.neck,
        "background": detector.background,
        "input_size": list(detector.input_size),
        "resize": list(resize),
    }


def load_pruned(
    path: str | Path, device: str | torch.device = "cpu", trust: bool = False
) -> BaseDetector:
    """Load a detector from a checkpoint, with its pruned structure and weights, in eval mode.

    Loading runs no code of the file's author and fetches nothing, unless the file is trusted.

    Args:
        path: ``round-<t>.ckpt`` or ``last.ckpt`` of a run, or the run's directory: then it is the
            last round's.
        device: where to load the detector.
        trust: import the modules in ``custom_imports`` of the detector's mmdet config, which must
            be on the Python path. Those that are imported already need no trust.

    Returns:
        An ordinary mmdet detector; ``dataset_meta`` contains the class names.

    Raises:
        FileNotFoundError: there is no such file, or the directory holds no run.
        ValueError: the file is damaged, was not written by ldt, or needs trust.
        ImportError: a module in ``custom_imports`` cannot be imported.

    Example:
        >>> file = result.save("pruned.ckpt")
        >>> pruned = ldt.load_pruned(file)
        >>> pruned.dataset_meta["classes"]
        ('Car', 'Pedestrian', 'Cyclist')
    """
    return detector_of(read(path, trust), device)


def detector_of(checkpoint: dict[str, Any], device: str | torch.device = "cpu") -> BaseDetector:
    """Build the detector of a checkpoint that was loaded with :func:`read`; see above."""
    record = checkpoint["ldt"]
    state = detector_state(checkpoint)
    with limited_allocation(state), _one_line():
        detector = build(record["model"], initialise=False)
        changed = structure.changed_sizes(detector, record["structure"])
        structure.rebuild(detector, record["structure"], state)
        thaw_pruned(detector, changed)
        detector.load_state_dict(_without_aliases(state, set(detector.state_dict())), strict=True)
    names, count = record["classes"], class_count(detector)
    if count is not None and len(names) != count:
        raise ValueError(f"it names {len(names)} classes, but its detector predicts {count}")
    setattr(detector, "dataset_meta", {"classes": tuple(record["classes"])})  # noqa: B010
    setattr(detector, RECORD, record)
    detector.to(device)
    detector.eval()  # not every mmdet detector returns self
    return detector


def class_count(model: nn.Module) -> int | None:
    """Return how many classes the detector's head predicts; None if it does not say so."""
    head = getattr(model, "bbox_head", None)
    if head is None:
        head = getattr(getattr(model, "roi_head", None), "bbox_head", None)
    head = head[0] if isinstance(head, nn.ModuleList) else head  # of a cascade
    return getattr(head, "num_classes", None)


@contextmanager
def _one_line() -> Iterator[None]:
    """Tell in one line what mmdet says of a config or of weights that do not fit."""
    try:
        yield
    except (ValueError, ImportError):
        raise
    except Exception as error:  # constructors of mmdet raise many types
        reason = one_line(f"{type(error).__name__}: {error}", 300)
        raise ValueError(f"the checkpoint's detector cannot be built ({reason})") from error


def _without_aliases(state: dict[str, Tensor], known: set[str]) -> dict[str, Tensor]:
    """Remove further names of known tensors: DDQ registers shared layers when it trains."""
    places = {state[key].data_ptr() for key in known & set(state)}
    return {k: v for k, v in state.items() if k in known or v.data_ptr() not in places}


def read(path: str | Path, trust: bool = False) -> dict[str, Any]:
    """Load a checkpoint's content, checked by :mod:`ldt.detectors.untrusted`.

    Args:
        path: of the file, or of a run (:func:`ldt.runs.run.checkpoint_of`).
        trust: import the modules that its record names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, was not written by ldt, or needs trust.
        ImportError: a module of a trusted file cannot be imported.
    """
    path = checkpoint_of(path)
    content = read_unchecked(path)
    try:
        return checked(content, trust)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def read_unchecked(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint's content, whatever its record says; nothing may be built from it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or was not written by ldt.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}")
    try:
        checkpoint = load_plain(Path(path))
    except Exception as error:  # torch raises many types for truncated or foreign files
        kind = type(error).__name__
        raise ValueError(f"{str(path)!r} is damaged or not a checkpoint ({kind})") from error
    if not isinstance(checkpoint, dict) or "ldt" not in checkpoint:
        raise ValueError(f"{str(path)!r} was not written by ldt: it has no structure record")
    return checkpoint


def resize_steps(checkpoint: dict[str, Any], path: str | Path) -> list[dict[str, Any]]:
    """Return the image transforms (between loading and packing) that a detector was trained with.

    Args:
        checkpoint: the content of a file (:func:`read`).
        path: of the file, for the error message.

    Returns:
        Transforms as in mmdet's configs.

    Raises:
        ValueError: the checkpoint does not contain them.
    """
    if steps := checkpoint["ldt"].get("resize"):
        return steps
    height, width = checkpoint["ldt"]["input_size"]
    raise ValueError(
        f"{str(path)!r} does not contain how its images were resized to {width}x{height} pixels: "
        "an earlier version wrote it. Add what it was trained with: file = torch.load(path); "
        'file["ldt"]["resize"] = [{"type": "Resize", "scale": '
        f'({width}, {height}), "keep_ratio": True}}]; torch.save(file, path)'
    )


def detector_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Extract the detector's state dict from a checkpoint of its LightningModule."""
    return {
        key.removeprefix("detector."): value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith("detector.")
    }
