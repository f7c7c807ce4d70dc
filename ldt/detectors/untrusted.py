"""What a checkpoint may say: plain data of known parts. Opening one runs no code and fetches none.

:func:`checked` is the only gate between a file and the builders of mmdet. It refuses in one line
what it does not know; code of one's own is imported only for files that are trusted.
"""

import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le, Len
from mmdet.registry import MODELS, TASK_UTILS, TRANSFORMS
from mmengine.registry import WEIGHT_INITIALIZERS, Registry
from pydantic import AfterValidator, BaseModel, StrictBool, StrictInt, StringConstraints
from pydantic import ValidationError as PydanticError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldt.config.kinds import LARGEST_SIDE
from ldt.detectors.models import drop_pretrained, import_custom, use_mmdet
from ldt.pruning.structure import SIZES
from ldt.runs.formatting import check_printable
from ldt.runs.inputs import OWN_CODE, is_own

log = logging.getLogger(__name__)

SCOPES = ("mmdet", "mmcv", "mmengine")  # may precede a type: mmdet.ResNet
# `type` of what is no part of a registry: nms_cfg, roi_layer, and the connections of FPG
OTHER_TYPES = (
    *("nms", "soft_nms", "conv", "dilation", "interpolation_conv", "last_conv", "offset"),
    *("RoIAlign", "RoIPool", "SimpleRoIAlign"),
    *("DeformRoIPool", "DeformRoIPoolPack", "ModulatedDeformRoIPoolPack"),
)
LOADING_TYPES = ("BertModel", "AppearanceFreeLink", "CameraMotionCompensation", "Detectron2Wrapper")
LOADING_KEYS = re.compile(r".*(ckpt|checkpoint|_path|_file|lang_model_name)|teacher_config")
RESIZE_STEPS = (  # image transforms between loading and packing, as in mmdet's test pipelines
    *("Resize", "FixScaleResize", "FixShapeResize", "Pad", "Normalize", "CenterCrop"),
    *("RandomCenterCropPad", "RandomResize", "RandomChoiceResize", "RandomFlip"),
)
KEY = re.compile(r"[A-Za-z0-9]\w*|_delete_|_scope_")  # the last two are mmengine's
TEXT = re.compile(r"[\w.,:;?+\-\[\] ]{0,100}")  # no path, no URL, no call
MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
MOST_NODES, MOST_LEVELS, LONGEST_TEXT = 200_000, 32, 1000
LARGEST_NUMBER = 2**16  # of a model config; mmdet's own configs have at most 30000
LARGEST_IMAGE = 2**25  # pixels after a step of resizing
LARGEST_DIVISOR = 2**9  # of the sides of a padded image; mmdet's own configs have at most 128
MOST_STEPS = 16  # of resizing
LARGEST_MODEL = 2**30  # bytes that building may allocate, and so many times those of the weights:
LARGEST_RATIO = 8
MOST_TENSORS = 1000  # that building may allocate, and so many for each of the weights:
TENSORS_OF_A_WEIGHT = 10  # mmdet's detectors: 1 to 4


Printable = Annotated[str, StringConstraints(max_length=200), AfterValidator(check_printable)]
LayerName = Annotated[str, StringConstraints(max_length=300, pattern=r"^([\w-]+(\.[\w-]+)*)?$")]
LayerSize = Annotated[StrictInt, Ge(0), Le(2**20)]
Side = Annotated[StrictInt, Ge(1), Le(LARGEST_SIDE)]


class Record(BaseModel):
    """The schema of ``checkpoint["ldt"]``; see :func:`ldt.detectors.checkpoints.pruning_record`."""

    model: dict[str, Any]
    classes: list[Printable]
    structure: dict[LayerName, dict[Literal[SIZES], LayerSize]]  # type: ignore[valid-type]
    predictors: list[LayerName]
    neck: LayerName
    input_size: Annotated[list[Side], Len(2, 2)]
    background: StrictBool = False  # this and the next are not in files of earlier versions
    resize: list[dict[str, Any]] = []


def first_error(error: PydanticError, otherwise: str) -> str:
    """Return in a line where data do not fit their schema, or what of, and why."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or otherwise
    return f"{where[:200]}: {first['msg']}"


def checked(checkpoint: Mapping[str, Any], trust: bool = False) -> dict[str, Any]:
    """Return a checkpoint with a record that can be built from, without what loads further files.

    Args:
        checkpoint: ``state_dict`` and the record ``ldt``, as read from a file.
        trust: import the modules of the record's ``custom_imports``.

    Raises:
        ValueError: in one line, what is not allowed; or the modules that only a trusted file may
            import.
        ImportError: a module of a trusted file cannot be imported.
    """
    record = checkpoint["ldt"]
    _check_plain(record)
    try:
        Record.model_validate(record)
    except PydanticError as error:
        raise ValueError(first_error(error, "the record")) from error
    _check_weights(checkpoint.get("state_dict"))
    model = _without_loaders(record["model"])
    use_mmdet()
    import_parts(model, trust)
    check_parts({k: v for k, v in model.items() if k != "custom_imports"}, "model")
    checked_steps(record.get("resize", ()))
    return {**checkpoint, "ldt": {**record, "model": model}}


def _check_plain(record: object) -> None:
    """Check that a record is plain data of a size that can be walked, whatever refers to what."""
    nodes = [(record, 0)]
    for node, depth in nodes:  # grows while it is walked
        if len(nodes) > MOST_NODES or depth > MOST_LEVELS:
            raise ValueError("the record is too large or nested too deeply")
        if isinstance(node, Mapping):
            if not all(isinstance(key, str) and len(key) <= LONGEST_TEXT for key in node):
                raise ValueError("the record has a key that is no short text")
            nodes += [(value, depth + 1) for value in node.values()]
        elif isinstance(node, (list, tuple)):
            nodes += [(value, depth + 1) for value in node]
        elif isinstance(node, str):
            if len(node) > LONGEST_TEXT:
                raise ValueError(f"the record has a text of {len(node)} characters")
        elif node is not None and not isinstance(node, (bool, int, float)):
            raise ValueError(f"the record contains a {type(node).__name__}; allowed: plain data")


def _check_weights(state: object) -> None:
    """Check that tensors are as large as their shapes say."""
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError("state_dict is not a dict of tensors")
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            raise ValueError(f"state_dict has {key[:200]!r}, which is not an ordinary tensor")
        if value.device.type != "cpu" or value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(f"state_dict has {key[:200]!r} of another size than is stored")


def _without_loaders(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model config without the files that it would load: the weights are known."""
    copied: dict[str, Any] = _copied(model)
    drop_pretrained(copied)
    if copied.get("teacher_ckpt") is not None:
        log.warning(
            "the weights of the detector's teacher, which only training needs, are left out"
        )
        copied["teacher_ckpt"] = None
    return copied


def _copied(node: object) -> Any:
    if isinstance(node, Mapping):
        return {key: _copied(value) for key, value in node.items()}
    return type(node)(map(_copied, node)) if isinstance(node, (list, tuple)) else node


def import_parts(model: Mapping[str, Any], trust: bool) -> None:
    """Import what a model config names, if that runs no foreign code or the file is trusted."""
    custom = model.get("custom_imports")
    if custom is None:
        return
    given: Any = custom.get("imports", []) if isinstance(custom, Mapping) else [None]
    names = list(given) if isinstance(given, (list, tuple)) else [given]
    good = all(isinstance(name, str) and MODULE.fullmatch(name) for name in names)
    if not good or set(custom) - {"imports", "allow_failed_imports"}:
        raise ValueError(f"model.custom_imports={str(custom)[:200]}; allowed: names of modules")
    foreign = [n for n in names if n not in sys.modules and not is_own(n)]
    if foreign and not trust:
        raise ValueError(
            f"it imports code of its own, {', '.join(foreign)[:500]}, which can do anything: where "
            "you trust its author type --trust, or trust=True in Python"
        )
    import_custom(custom)


def check_parts(node: object, where: str) -> None:
    """Check the config of a model or a part of it, after :func:`ldt.detectors.models.use_mmdet`.

    Args:
        node: plain data.
        where: its key, for messages.

    Raises:
        ValueError: it names what is no registered part of mmdet, a file or an absurd number.
    """
    if isinstance(node, Mapping):
        for key, value in node.items():
            place = f"{where}.{key}"[:200]
            if not KEY.fullmatch(key):
                raise ValueError(f"{where} has the key {key[:100]!r}; allowed: letters, digits, _")
            if LOADING_KEYS.fullmatch(key) and isinstance(value, str):
                raise ValueError(f"{place}={value[:100]!r} would load a file")
            if key == "type":
                _check_type(value, place)
            elif key == "_scope_" and value not in SCOPES:
                raise ValueError(f"{place}={str(value)[:100]!r}; allowed: {', '.join(SCOPES)}")
            else:
                check_parts(value, place)
    elif isinstance(node, (list, tuple)):
        for value in node:
            check_parts(value, where)
    elif isinstance(node, str):
        if not TEXT.fullmatch(node):
            raise ValueError(f"{where}={node[:100]!r}; allowed: a short text of letters and digits")
    elif node is not None and not isinstance(node, bool):
        _check_number(node, where)


def _check_number(number: Any, where: str) -> None:
    image = where.startswith("model.data_preprocessor.") or where.startswith("resize.")
    most = LARGEST_SIDE if image else LARGEST_NUMBER
    if where.endswith("pad_size_divisor") and not 1 <= number <= LARGEST_DIVISOR:
        raise ValueError(f"{where}={number:.3g}; allowed: numbers from 1 to {LARGEST_DIVISOR}")
    small = (isinstance(number, float) and not image) or abs(number) <= most
    if not (small and math.isfinite(number)):
        told = f"{number:.3g}" if isinstance(number, float) or abs(number) < 1e300 else "..."
        raise ValueError(f"{where}={told}; allowed: numbers up to {most}")


def _check_type(name: object, where: str) -> None:
    """Check that a ``type`` is registered in a package that is imported."""
    text = name if isinstance(name, str) else type(name).__name__
    known = text in OTHER_TYPES or any(
        _registered(registry, text) for registry in (MODELS, TASK_UTILS, WEIGHT_INITIALIZERS)
    )
    if not known or text.rpartition(".")[2] in LOADING_TYPES:
        reason = "loads files" if known else "is not a registered part of mmdet"
        raise ValueError(f"{where}={text[:100]!r}, which {reason}")


def _registered(registry: Registry, name: str) -> type | None:
    """Return what is registered under a name; a package is not imported for it, as mmengine does.

    Args:
        registry: where to look, and in those above it.
        name: of a class, or after the name of an imported package: ``mmdet.ResNet``.
    """
    scope, _, own = name.rpartition(".")
    places: list[Registry] = [registry]
    while (above := places[-1].parent) is not None:
        places.append(above)
    if scope not in ("", *SCOPES):
        places = [places[-1].children[scope]] if scope in places[-1].children else []
    return next((place.module_dict[own] for place in places if own in place.module_dict), None)


def checked_steps(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the transforms that resize an image, which are usual ones with plain arguments.

    Raises:
        ValueError: in one line, what is not allowed.
    """
    _check_plain(steps)
    if len(steps) > MOST_STEPS:
        raise ValueError(f"resize has {len(steps)} steps; allowed: at most {MOST_STEPS}")
    use_mmdet()
    for step in steps:
        _check_step(step)
    return list(steps)


def _check_step(step: Mapping[str, Any]) -> None:
    """Check a transform that resizes images: one of the usual ones, or one's own."""
    name = step.get("type")
    found = _registered(TRANSFORMS, name) if isinstance(name, str) else None
    own = found is not None and found.__module__.partition(".")[0] not in (*SCOPES, OWN_CODE)
    if found is None or not (own or found.__name__ in RESIZE_STEPS):
        raise ValueError(
            f"resize: type={str(name)[:100]!r}; allowed: {', '.join(RESIZE_STEPS)}, or a "
            "transform of your own that is imported"
        )
    parts = {key: value for key, value in step.items() if key != "type"}
    check_parts(parts, "resize")
    for key, value in parts.items():
        _check_area(key, value)


def _check_area(key: str, value: object) -> None:
    """Check that a size, or each of several, is no enormous image."""
    sizes = value if isinstance(value, (list, tuple)) else []
    if len(sizes) == 2 and all(isinstance(side, (int, float)) for side in sizes):
        if abs(sizes[0] * sizes[1]) > LARGEST_IMAGE:
            raise ValueError(
                f"resize.{key}={sizes[0]}x{sizes[1]}; allowed: at most {LARGEST_IMAGE:,} pixels"
            )
    else:
        for size in sizes:
            _check_area(key, size)


class _Allocation(TorchDispatchMode):
    """Count what is allocated, and raise before it is too much."""

    def __init__(self, most: int, tensors: int) -> None:
        super().__init__()
        self.left, self.tensors = most, tensors

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if {"device", "dtype"} <= {argument.name for argument in func._schema.arguments}:
            planned = func(*args, **{**kwargs, "device": "meta"})
            self.tensors -= 1
            self.left -= planned.nbytes
            if min(self.left, self.tensors) < 0:
                raise ValueError("its model config builds a detector far larger than its weights")
        return func(*args, **kwargs)


@contextmanager
def limited_allocation(state: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a detector that is built in the block have a memory that its weights justify.

    Args:
        state: the weights of the (pruned) detector.

    Raises:
        ValueError: it is far larger.
    """
    size = sum(value.nbytes for value in state.values())
    tensors = MOST_TENSORS + TENSORS_OF_A_WEIGHT * len(state)
    with _Allocation(LARGEST_MODEL + LARGEST_RATIO * size, tensors):
        yield
