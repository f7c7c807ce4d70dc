"""Open a detector from a model, an mmdet config with weights, or a checkpoint."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from mmdet.models.detectors import BaseDetector
from mmengine.config import Config, ConfigDict
from torch import nn

from ldt.detectors.checkpoints import RECORD, class_count, load_pruned
from ldt.detectors.models import (
    PlainConfig,
    build,
    completed,
    drop_pretrained,
    model_config,
    use_mmdet,
)
from ldt.detectors.weights import load_weights

ALLOWED = "give an mmdet detector, a config file, an mmengine Config, or a .ckpt file of ldt"

SUFFIX = ".ckpt"  # of checkpoints of ldt; other files of weights go with a config


@dataclass
class OpenedDetector:
    """A detector with its metadata.

    Attributes:
        model: the detector.
        config: the config that the unpruned detector is built from; None if unknown.
        classes: class names in label order.
        record: metadata of its checkpoint (neck, predictors, input size, resize transforms).
        untrained: whether its weights are random, as built from a config.
    """

    model: BaseDetector
    config: PlainConfig | None
    classes: tuple[str, ...]
    record: Mapping[str, Any] = field(default_factory=dict)
    untrained: bool = False


def open_detector(
    detector: nn.Module | Config | Mapping[str, Any] | str | Path,
    weights: str | Path | None = None,
    classes: Sequence[str] | None = None,
    config: Config | str | Path | None = None,
    trust: bool = False,
) -> OpenedDetector:
    """Open a detector for pruning.

    Args:
        detector: an mmdet detector that is built already; an mmdet config (a file, a packaged one
            such as ``mmdet::gfl/gfl_r50_fpn_1x_coco.py``, or an mmengine ``Config``); or a
            checkpoint of ldt (``.ckpt``), or the directory of a run.
        weights: for a detector given by its config: a checkpoint file of mmdet or mmengine.
        classes: class names in label order; by default those of the detector or its file.
        config: the config of a detector that is built already.
        trust: of a checkpoint, see :func:`ldt.load_pruned`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of these, has weights in half precision, or the weights belong to
            another detector.
    """
    if isinstance(detector, nn.Module):
        if weights is not None:
            raise ValueError("weights are for a config; this detector is built already")
        detector = _wrapped(detector)
        if not isinstance(detector, BaseDetector):
            raise ValueError(f"detector is a {type(detector).__name__}; {ALLOWED}")
        _check_precision(detector)
        record = getattr(detector, RECORD, {})
        if config is not None:
            record = {**record, "model": _read_config(config)}
        return _opened(detector, record, classes)
    if isinstance(detector, (str, Path)) and _is_checkpoint(Path(detector)):
        loaded = load_pruned(detector, trust=trust)
        return _opened(loaded, getattr(loaded, RECORD), classes)
    plain = _read_config(detector)
    model = build(plain, initialise=weights is None)
    if weights is not None:
        load_weights(model, weights, ())
    model.eval()
    names = _classes(model, classes)
    return OpenedDetector(model, plain, names, untrained=weights is None)


def _wrapped(model: nn.Module) -> nn.Module:
    """Return a copy of a model of transformers or torchvision as an mmdet detector.

    The copy is taken apart. Other models are returned as they are.
    """
    library = type(model).__module__.partition(".")[0]
    use_mmdet()
    if library == "transformers":
        from ldt.detectors.transformers_detector import TransformersDetector

        return TransformersDetector.around(copy.deepcopy(model))
    if library == "torchvision":
        from ldt.detectors.torchvision_detector import TorchvisionDetector

        return TorchvisionDetector.around(copy.deepcopy(model))
    return model


def _is_checkpoint(path: Path) -> bool:
    """Whether a detector is given by a checkpoint of ldt or by the directory of a run."""
    return path.suffix == SUFFIX or path.is_dir()


def _check_precision(detector: nn.Module) -> None:
    """Check that scores can be computed: sums of squares and gradients vanish in half precision."""
    for name, part in detector.named_parameters():
        if part.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {part.dtype}; allowed: torch.float32, which detector.float() makes"
            )


def _opened(
    model: BaseDetector, record: Mapping[str, Any], classes: Sequence[str] | None
) -> OpenedDetector:
    config = record.get("model") or getattr(model, "own_config", None)
    own = getattr(model, "cfg", None)  # set by mmdet's init_detector
    if config is None and own is not None:
        config = _plain_model(own)
    return OpenedDetector(model, config, _classes(model, classes), record)


def _read_config(detector: object) -> PlainConfig:
    if isinstance(detector, (str, Path)):
        return model_config(str(detector), {}, None, pretrained=False)
    if isinstance(detector, (Config, Mapping)):
        return _plain_model(detector)
    raise ValueError(f"detector is a {type(detector).__name__}; {ALLOWED}")


def _plain_model(config: Config | Mapping[str, Any]) -> PlainConfig:
    """Return the model part of a config, or the config itself if it is one of a model."""
    model = config.get("model", config)
    if "type" not in model:
        raise ValueError("the config defines no `model`; is it an mmdet config?")
    plain = completed(cast(PlainConfig, ConfigDict(model).to_dict()))
    drop_pretrained(plain)
    return plain


def _classes(model: nn.Module, classes: Sequence[str] | None) -> tuple[str, ...]:
    count = class_count(model)
    if classes and count is not None and len(classes) != count:
        raise ValueError(
            f"classes={list(classes)} are {len(classes)} names; the detector predicts {count} "
            "classes"
        )
    known = classes or (getattr(model, "dataset_meta", None) or {}).get("classes")
    return tuple(known or (f"class {index}" for index in range(count or 0)))
