"""A detector from whatever a user has: a model, an mmdet config with weights, a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from torch import nn

from ldt.detectors.checkpoints import RECORD, load_pruned
from ldt.detectors.models import build, drop_pretrained, model_config
from ldt.detectors.weights import load_weights


@dataclass
class OpenedDetector:
    """A detector and what is known of it.

    Attributes:
        model: the detector.
        config: the config that the unpruned detector is built from; None where it is not known.
        classes: names in label order.
        record: what its checkpoint says of it (neck, predictors, input size, resize steps).
    """

    model: nn.Module
    config: dict[str, Any] | None
    classes: tuple[str, ...]
    record: Mapping[str, Any] = field(default_factory=dict)


def open_detector(
    detector: nn.Module | Config | Mapping[str, Any] | str | Path,
    weights: str | Path | None = None,
    classes: Sequence[str] | None = None,
    config: Config | str | Path | None = None,
) -> OpenedDetector:
    """Open a detector for pruning.

    Args:
        detector: an mmdet detector that is built already; an mmdet config (a file, a packaged one
            such as ``mmdet::gfl/gfl_r50_fpn_1x_coco.py``, or an mmengine ``Config``); or a
            checkpoint of ldt (``.ckpt``).
        weights: of a config's detector, mmdet's or mmengine's files.
        classes: names in label order; what the detector or its file says by default.
        config: that a detector which is built already is built from.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of these, or the weights are another detector's.
    """
    if isinstance(detector, nn.Module):
        if weights is not None:
            raise ValueError("weights go with a config; this detector is built already")
        about = getattr(detector, RECORD, {})
        if config is not None:
            about = {**about, "model": _config(config)}
        return _described(detector, about, classes)
    if isinstance(detector, (str, Path)) and str(detector).endswith(".ckpt"):
        loaded = load_pruned(detector)
        return _described(loaded, getattr(loaded, RECORD), classes)
    plain = _config(detector)
    model = build(plain, initialise=weights is None)
    if weights is not None:
        load_weights(model, weights, ())
    model.eval()
    return OpenedDetector(model, plain, _classes(model, plain, classes))


def _described(
    model: nn.Module, record: Mapping[str, Any], classes: Sequence[str] | None
) -> OpenedDetector:
    config = record.get("model")
    own: Any = getattr(model, "cfg", None)  # mmdet's init_detector leaves its config there
    if config is None and own is not None:
        config = _plain_model(own)
    return OpenedDetector(model, config, _classes(model, config or {}, classes), record)


def _config(detector: Any) -> dict[str, Any]:
    if isinstance(detector, (str, Path)):
        return model_config(str(detector), {}, None, pretrained=False)
    if isinstance(detector, (Config, Mapping)):
        return _plain_model(detector)
    raise ValueError(
        f"detector is a {type(detector).__name__}; give an mmdet detector, a config file, an "
        "mmengine Config, or a .ckpt file of ldt"
    )


def _plain_model(config: Any) -> dict[str, Any]:
    """The model part of a config; a config of the model alone is taken as it is."""
    model: Any = config.get("model", config)
    if "type" not in model:
        raise ValueError("the config defines no `model`; is it an mmdet config?")
    plain: Any = ConfigDict(model).to_dict()
    drop_pretrained(plain)
    return plain


def _classes(
    model: Any, config: Mapping[str, Any], classes: Sequence[str] | None
) -> tuple[str, ...]:
    known = classes or (getattr(model, "dataset_meta", None) or {}).get("classes")
    if known:
        return tuple(known)
    head = config.get("bbox_head") or (config.get("roi_head") or {}).get("bbox_head") or {}
    head = head[0] if isinstance(head, list) else head
    return tuple(f"class {index}" for index in range(head.get("num_classes", 0)))
