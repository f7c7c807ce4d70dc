"""Build any mmdet detector from its config."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from mmdet.models.dense_heads import SSDHead
from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.config.utils import ConfigParsingError
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmengine.utils import import_modules_from_strings

from ldt.config.places import CONFIGS, config_folder
from ldt.detectors.mmengine_internals import (
    packages_by_importlib,
    registered_types_only,
)
from ldt.pruning.attention import make_prunable

PlainConfig = dict[str, Any]
TRANSFORMERS = "ldt::transformers.py"  # the config of any detector of transformers
UNREADABLE = (  # raised by mmengine for files that are not configs
    *(OSError, KeyError, ImportError, SyntaxError, AssertionError, ConfigParsingError),
)
Plain = dict | list | tuple | str | float | int | bool | None


def use_mmdet() -> None:
    """Register mmdet's modules and make ``mmdet`` the default scope (idempotent)."""
    register_all_modules(init_default_scope=False)
    setattr(SSDHead, "loss_cls", None)  # noqa: B010 - mmdet 3.3 reads it from every dense head
    MMLogger.get_current_instance().setLevel(logging.WARNING)  # it logs every initialised tensor
    if DefaultScope.get_current_instance() is None:
        DefaultScope.get_instance("ldt", scope_name="mmdet")


def model_config(
    config: str, options: dict[str, Any], n_classes: int | None, pretrained: bool
) -> dict[str, Any]:
    """Return the ``model`` part of an mmdet config as plain data, with our changes.

    The config's ``custom_imports`` are included under this name.

    Args:
        config: an mmdet config file, or ``mmdet::<family>/<file>`` for a packaged one.
        options: merged into ``model`` by mmengine's rules (``_delete_`` works).
        n_classes: replaces every ``num_classes``; None keeps the config's.
        pretrained: keep the ``init_cfg`` entries that load pretrained backbones.

    Raises:
        ValueError: there is no such config, or it defines no ``model``.
    """
    content = read_config(config)
    if "model" not in content:
        raise ValueError(f"detector.config={config!r} defines no `model`; is it an mmdet config?")
    content.merge_from_dict({"model": options})
    model = cast(PlainConfig, ConfigDict(content.model).to_dict())
    if n_classes is not None:
        for head in _holders(model, "num_classes"):
            head["num_classes"] = n_classes
    model = completed(model)
    if not pretrained:
        drop_pretrained(model)
    _read_teacher(model)
    if "custom_imports" in content:
        model["custom_imports"] = ConfigDict(content.custom_imports).to_dict()
    return cast(PlainConfig, _plain(model))


def completed(model: PlainConfig) -> PlainConfig:
    """Return a user's model config with what another library's detector looks up by its name.

    Never called for configs of checkpoints, which are complete.
    """
    complete = getattr(MODELS.module_dict.get(str(model.get("type"))), "complete", None)
    return model if complete is None else complete(model)


def _read_teacher(model: PlainConfig) -> None:
    """Replace the file of a distilling detector's teacher by its content, in place.

    A checkpoint with the name of a file could not be opened: it would be run.
    """
    file = model.get("teacher_config")
    if isinstance(file, str) and ("::" in file or Path(file).is_file()):
        teacher = cast(PlainConfig, ConfigDict(read_config(file).model).to_dict())
        drop_pretrained(teacher)
        model["teacher_config"] = {"model": teacher}


def input_settings(config: str | Config) -> dict[str, Any]:
    """Return ``scale`` (width, height), ``keep_ratio`` and ``pad`` of a config's test pipeline.

    Args:
        config: as for :func:`model_config`, or one that has been read.

    Raises:
        ValueError: there is no such config, or its test pipeline has no ``Resize`` to a size.
    """
    content = config if isinstance(config, Config) else read_config(config)
    loader = content.get("test_dataloader") or {}
    steps = (loader.get("dataset") or {}).get("pipeline") or content.get("test_pipeline") or []
    resize = next((step for step in steps if step["type"] == "Resize"), None)
    if resize is None or resize.get("scale") is None:
        lacks = "Resize" if resize is None else "scale in its Resize"
        name = content.filename if content is config else config
        raise ValueError(f"{name!r} has no test pipeline with a {lacks}, so no input size")
    scale = resize["scale"]
    square = any(step["type"] == "Pad" and "size_divisor" not in step for step in steps)
    return {
        "scale": (scale, scale) if isinstance(scale, int) else tuple(scale),
        "keep_ratio": bool(resize.get("keep_ratio")),
        "pad": "square" if square else "none",
    }


def read_config(config: str) -> Config:
    """Read an mmdet config.

    Args:
        config: as for :func:`model_config`.

    Raises:
        ValueError: there is no such config.
    """
    use_mmdet()
    try:
        with packages_by_importlib():
            return Config.fromfile(_config_file(config))
    except UNREADABLE as error:
        reason = str(error).partition(", the current sys.path")[0]
        raise ValueError(
            f"detector.config={config!r} cannot be read ({reason}); {CONFIGS}"
        ) from error


def _config_file(config: str) -> str:
    """Return the path of a file, of ``package::family/file``, or of ``ldt::file``."""
    package, separator, file = config.partition("::")
    if not separator:
        return config
    folder = config_folder(package)
    if folder is None:
        raise ModuleNotFoundError(f"no package {package!r} with configs is installed")
    return str(folder / file)


def is_packaged(config: str) -> bool:
    """Return whether a config is one of mmdet's or ldt's, which are code that is installed."""
    return re.fullmatch(r"(mmdet|ldt)::\w[\w.+-]*(/\w[\w.+-]*)*\.py", config) is not None


def raise_max_per_img(model: PlainConfig, least: int) -> None:
    """Let a detector return at least so many boxes of an image, as far as it has queries; in place.

    Args:
        model: the result of :func:`model_config`.
        least: replaces every lower ``max_per_img`` (and CenterNet's ``topk``, CornerNet's
            ``corner_topk``) of its ``test_cfg``.
    """
    limits = ("num_queries", "num_proposals")
    queries = [part[key] for key in limits for part in _holders(model, key)]
    least = min([least, *queries])
    for key in ("max_per_img", "topk", "corner_topk"):
        for part in _holders(model.get("test_cfg"), key):
            part[key] = max(part[key], least)


def _holders(node: object, key: str) -> Iterator[PlainConfig]:
    """Yield the dicts below ``node`` with a number under ``key``."""
    if isinstance(node, dict):
        if isinstance(node.get(key), int):
            yield node
        for value in node.values():
            yield from _holders(value, key)
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from _holders(item, key)


def drop_pretrained(node: object) -> None:
    """Remove every ``init_cfg`` that would load a file, in place."""
    if isinstance(node, dict):
        init = node.get("init_cfg")
        if isinstance(init, (list, tuple)):
            node["init_cfg"] = [each for each in init if not _loads(each)]
        elif _loads(init):
            node["init_cfg"] = None
        if "pretrained" in node:
            node["pretrained"] = None
        for value in node.values():
            drop_pretrained(value)
    elif isinstance(node, (list, tuple)):
        for item in node:
            drop_pretrained(item)


def _loads(init: object) -> bool:
    return isinstance(init, dict) and (init.get("type") == "Pretrained" or "checkpoint" in init)


def _plain(node: object) -> Plain:
    """Convert to dicts, lists, strings and numbers, which a checkpoint can contain."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, tuple):
        return tuple(_plain(value) for value in node)
    if isinstance(node, list):
        return [_plain(value) for value in node]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise ValueError(
        f"the mmdet config contains {node!r} ({type(node).__name__}), which cannot be stored in a "
        "checkpoint; write it as text or a number"
    )


def build(model: PlainConfig, initialise: bool = True) -> BaseDetector:
    """Build an mmdet detector from the result of :func:`model_config`.

    Args:
        model: the model config.
        initialise: run mmdet's weight initialisation (False if weights are loaded next).

    Raises:
        ValueError: a ``type`` is not registered, or does not take an argument.
        RuntimeError: pretrained weights are requested and cannot be loaded.
        ImportError: a module of its ``custom_imports`` cannot be imported.
    """
    use_mmdet()
    parts = {key: value for key, value in model.items() if key != "custom_imports"}
    import_custom(model.get("custom_imports", {"imports": []}))
    try:
        with registered_types_only():
            detector = MODELS.build(ConfigDict(parts))
    except (KeyError, TypeError) as error:  # an unknown type or argument
        raise ValueError(f"mmdet cannot build the detector from its config: {error}") from error
    if initialise:
        try:
            detector.init_weights()
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"the pretrained backbone could not be loaded ({error}). Without a network, put "
                "the file into torch's hub cache, name a local file with "
                "+detector.options.backbone.init_cfg.checkpoint=<file>, or train from scratch with "
                "detector.pretrained=false"
            ) from error
    make_prunable(detector)  # afterwards: mmdet initialises the tensors that it knows
    return detector


def import_custom(custom: Mapping[str, Any]) -> None:
    """Import the modules of a config's ``custom_imports``, which register its own components."""
    try:
        import_modules_from_strings(**custom)
    except ImportError as error:
        raise ImportError(
            f"the detector's config imports {custom['imports']}, of which one cannot be imported "
            f"({error}); put its folder on PYTHONPATH"
        ) from error


def quiet() -> None:
    """Silence warnings of libraries that a user cannot act on."""
    for text in (
        "torch.meshgrid",
        "does not have many workers",
        "Trying to infer the `batch_size`",
        "`num_anchors` is deprecated",
        "torch.cuda.amp.autocast",
        "LeafSpec",
        "in eval mode at the start of training",  # `norm_eval`, frozen stages
        "have overridden `transfer_batch_to_device`",
        "exists and is not empty",  # a run's folder: expected when resuming
        "smaller than the logging interval",
        "out of bounds, the drawn",  # bounding boxes in figures
        "sync_dist=True",  # DetectionMetrics gathers the tables of all ranks itself
    ):
        warnings.filterwarnings("ignore", message=f".*{re.escape(text)}")
    for name in ("faster_coco_eval", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning").handlers.clear()  # its own, beside those of the root
