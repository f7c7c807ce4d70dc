"""Read the training recipe of an mmdet config, for ``recipe=config``.

Every key of the recipe is read by itself, so that what is given on top of it need not be readable.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmengine.config import Config

from ldt.detectors import train_pipelines
from ldt.detectors.models import input_settings, read_config
from ldt.detectors.train_pipelines import hooks, kind_of
from ldt.recipe import PARAMWISE, WARMUPS

log = logging.getLogger(__name__)
OTHERWISE = "give it on top, or choose another recipe (e.g. recipe=mmdet_1x)"
GPUS = 8  # of mmdet's trainings
OPTIMIZER = (  # keys of conf/recipe/config.yaml
    *("type", "lr", "weight_decay", "momentum", "dampening", "nesterov", "betas", "eps", "amsgrad"),
)
EMA = {"ema_type": "ExpMomentumEMA", "update_buffers": True, "gamma": 2000, "interval": 1}
SCOPES = ("mmdet", "mmengine", "mmcv")  # packages that are searched here in any case
WRAPPERS = ("OptimWrapper", "AmpOptimWrapper")
WRAPPER = (  # keys of optim_wrapper; the last two are of mixed precision, which is not read
    *("type", "optimizer", "clip_grad", "paramwise_cfg", "loss_scale", "dtype"),
)
BROKEN = (KeyError, TypeError, AttributeError)  # of keys that lack or are of another kind
HARMLESS = (  # hooks without effect on what is trained in one process, and those that are read
    *("CheckInvalidLossHook", "NumClassCheckHook", "SyncNormHook", "SetEpochInfoHook"),
    *("RuntimeInfoHook", "IterTimerHook", "DistSamplerSeedHook", "LoggerHook", "EmptyCacheHook"),
    *("ParamSchedulerHook", "CheckpointHook", "SyncBuffersHook", "MemoryProfilerHook"),
    *("DetVisualizationHook", "TrackVisualizationHook", "GroundingVisualizationHook"),
    *("YOLOXModeSwitchHook", "PipelineSwitchHook", "EMAHook"),
)


class ConfigRecipe:
    """The recipe of an mmdet config.

    Args:
        config: a file, or ``mmdet::<family>/<file>``.

    Raises:
        ValueError: there is no such config.
    """

    def __init__(self, config: str) -> None:
        self.name = os.path.expanduser(config)
        self.content = read_config(self.name)
        for key in self.content:
            _drop_scope(self.content[key])

    def of_detector(self, key: str) -> Any:
        """Return ``pad``, ``size``, ``mosaic_scale`` or ``mixup``, or the usual value if silent."""
        with contextlib.suppress(ValueError, *BROKEN):
            if key in ("pad", "size"):
                square = input_settings(self.content)["pad"] == "square"
                return "square" if square else {"pad": "none", "size": "full"}[key]
            return _listed(getattr(train_pipelines.augmentation(self.content), key))
        return {"pad": "none", "size": "full", "mosaic_scale": [0.1, 2.0], "mixup": True}[key]

    def read(self, key: str) -> Any:
        """Return a key of the recipe.

        Args:
            key: ``epochs``, ``optimizer.lr``, ...

        Raises:
            ValueError: the config does not say, or what it says cannot be expressed.
        """
        group, _, name = key.rpartition(".")
        try:
            if group == "optimizer":
                return _listed(_optimizer(self.content).get(name))
            if group == "paramwise":
                return _listed(_paramwise(self.content).get(name))
            return _listed(READERS[key](self.content))
        except NotExpressedError as error:
            told, cause = str(error), error
        except BROKEN as error:
            lacks = f"it lacks the key {error}" if isinstance(error, KeyError) else str(error)
            told, cause = f"the config cannot be read ({lacks})", error
        raise ValueError(f"recipe.{key} of {self.name}: {told}; {OTHERWISE}") from cause


def _drop_scope(node: object) -> None:
    """Drop the scopes that mmengine adds to what is inherited from a package, in place."""
    if isinstance(node, dict):
        if node.get("_scope_") in SCOPES:
            del node["_scope_"]
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for item in node:
            _drop_scope(item)


def _listed(node: object) -> Any:
    """Turn tuples into lists, as configurations are read back from files."""
    if isinstance(node, Mapping):
        return {key: _listed(value) for key, value in node.items()}
    return [_listed(item) for item in node] if isinstance(node, (list, tuple)) else node


class NotExpressedError(ValueError):
    """A config does not say a part of its recipe, or says it in a way that is not known here."""


# Optimizer ------------------------------------------------------------------------------------


def _wrapper(content: Config) -> Mapping[str, Any]:
    wrapper = content.get("optim_wrapper") or {}
    if "optimizer" not in wrapper:
        raise NotExpressedError("the config has no optim_wrapper with an optimizer")
    if "constructor" in wrapper:
        raise NotExpressedError(f"optim_wrapper.constructor={wrapper['constructor']} is not known")
    if (kind := kind_of({"type": "OptimWrapper"} | wrapper)) not in WRAPPERS:
        raise NotExpressedError(f"optim_wrapper.type={kind} is not known, only {WRAPPERS}")
    if (steps := wrapper.get("accumulative_counts", 1)) != 1:
        raise NotExpressedError(
            f"optim_wrapper.accumulative_counts={steps} is not read: remove it, multiply "
            f"auto_scale_lr.base_batch_size by {steps} and type trainer.accumulate_grad_batches"
        )
    if strange := [key for key in wrapper if key not in (*WRAPPER, "accumulative_counts")]:
        raise NotExpressedError(f"optim_wrapper has the key {strange[0]}")
    return wrapper


def _optimizer(content: Config) -> dict[str, Any]:
    optimizer = dict(_wrapper(content)["optimizer"])
    if strange := [key for key in optimizer if key not in OPTIMIZER]:
        raise NotExpressedError(f"its optimizer has the key {strange[0]}")
    return optimizer


def _paramwise(content: Config) -> dict[str, Any]:
    paramwise = dict(_wrapper(content).get("paramwise_cfg") or {})
    if strange := [key for key in paramwise if key not in PARAMWISE]:
        raise NotExpressedError(f"paramwise_cfg has the key {strange[0]}")
    return {"custom_keys": {}, **paramwise}


def _clip_grad(content: Config) -> float | None:
    clip = dict(_wrapper(content).get("clip_grad") or {})
    norm = clip.pop("max_norm", None)
    if {"norm_type": 2, "type": "norm", **clip} != {"norm_type": 2, "type": "norm"}:
        raise NotExpressedError(f"clip_grad with {clip} is not clipping by the norm")
    return norm


def _batch_size(content: Config) -> int:
    if (batch := _base_batch_size(content)) is None:
        raise NotExpressedError("auto_scale_lr.base_batch_size does not say what lr is for")
    return batch


def _base_batch_size(content: Config) -> int | None:
    """Return the images that the learning rate holds for; None if the config does not say.

    Configs that inherit a smaller number than a single GPU has (mmdet's RTMDet) are for 8 GPUs.
    """
    batch = (content.get("auto_scale_lr") or {}).get("base_batch_size")
    own = (content.get("train_dataloader") or {}).get("batch_size") or 1
    if batch is None or batch >= own:
        return batch
    _warn_once(
        f"auto_scale_lr.base_batch_size={batch} is less than the {own} images of a single GPU: "
        f"the learning rate is taken to be for {GPUS} GPUs (recipe.base_batch_size={GPUS * own})"
    )
    return GPUS * own


@functools.cache
def _warn_once(told: str) -> None:
    """Log a warning once: keys are read whenever they are asked for."""
    log.warning(told)


# Length and schedule --------------------------------------------------------------------------


def _length(content: Config) -> tuple[int, bool]:
    """Return the length of the training, and whether it is in epochs (otherwise in iterations)."""
    loop = content.get("train_cfg") or {}
    if "max_epochs" in loop or "max_iters" in loop:
        return loop.get("max_epochs") or loop["max_iters"], "max_epochs" in loop
    raise NotExpressedError("train_cfg says neither max_epochs nor max_iters")


def _epochs(content: Config) -> int:
    length, by_epoch = _length(content)
    if not by_epoch:
        raise NotExpressedError(f"train_cfg counts {length} iterations, not epochs")
    return length * train_pipelines.repeats(content)


def _schedulers(content: Config) -> Iterator[tuple[str, Mapping[str, Any]]]:
    found = content.get("param_scheduler") or []
    for each in [found] if isinstance(found, Mapping) else found:
        yield kind_of(each), each


def _schedule(content: Config) -> dict[str, Any]:
    """Return all keys of the learning-rate schedule."""
    keys: dict[str, Any] = {}
    for kind, each in _schedulers(content):
        found = _warmup(kind, each, content) if kind in SHAPES else _decay(kind, each, content)
        if found is None or keys.keys() & found.keys():
            given = ", ".join(f"{key}={value}" for key, value in each.items() if key != "type")
            raise NotExpressedError(f"the scheduler {kind}({given}) cannot be expressed")
        keys |= found
    nothing = {"schedule": "constant", "milestones": [], "gamma": 0.1, "min_lr": 0.0, "cosine": []}
    cold = {"warmup": 0, "warmup_epochs": 0.0, "warmup_shape": "linear", "warmup_start": None}
    return nothing | cold | keys


SHAPES = {"LinearLR": "linear", "QuadraticWarmupLR": "quadratic", "ConstantLR": "constant"}


def _warmup(kind: str, each: Mapping[str, Any], content: Config) -> dict[str, Any] | None:
    """Return the keys of a warm-up; None if it is none that is known."""
    length, in_epochs = _length(content)
    end, by_epoch = each.get("end"), each.get("by_epoch", True)
    start = {"LinearLR": each.get("start_factor", 1 / 3), "ConstantLR": each.get("factor", 1 / 3)}
    if kind == "ConstantLR" and start[kind] == 1:
        return {}
    stairs = by_epoch and not each.get("convert_to_iter_based") and kind != "ConstantLR"
    if end is None or (by_epoch == in_epochs and end * WARMUPS > length):
        return None
    if each.get("begin", 0) or each.get("end_factor", 1) != 1 or stairs:
        return None
    keys = {"warmup_shape": SHAPES[kind], "warmup_start": start.get(kind)}
    times = train_pipelines.repeats(content)
    return keys | ({"warmup_epochs": float(end * times)} if by_epoch else {"warmup": end})


def _decay(kind: str, each: Mapping[str, Any], content: Config) -> dict[str, Any] | None:
    """Return the keys of a decay; None if it is none that is known."""
    length, in_epochs = _length(content)
    if each.get("by_epoch", True) != in_epochs:
        return None
    begin, end = each.get("begin", 0), min(each.get("end", length), length)
    if kind == "MultiStepLR":
        passed = [begin + milestone for milestone in each["milestones"] if begin + milestone < end]
        shares = [milestone / length for milestone in passed]
        return {"schedule": "step", "milestones": shares, "gamma": each.get("gamma", 0.1)}
    if kind == "CosineAnnealingLR":
        low = each.get("eta_min_ratio") or _lowest_share(each.get("eta_min") or 0, content)
        period = each.get("T_max") or end - begin
        shares = [begin / length, end / length, period / length]
        return {"schedule": "cosine", "min_lr": low, "cosine": shares}
    return None


def _lowest_share(lowest: float, content: Config) -> float:
    """Return a lowest learning rate as a share of that of the optimizer."""
    if not lowest:
        return 0.0
    if not (lr := _optimizer(content).get("lr")):
        raise NotExpressedError(f"eta_min={lowest} is a share of an lr that its optimizer lacks")
    if own := _own_rates(_paramwise(content)):
        raise NotExpressedError(
            f"eta_min={lowest} together with {own[0]} of paramwise_cfg is another share of the "
            f"learning rate of every parameter: write eta_min_ratio={lowest / lr:g}"
        )
    return lowest / lr


def _own_rates(paramwise: Mapping[str, Any]) -> list[str]:
    """Return the keys that give some parameters another learning rate."""
    keys = ("bias_lr_mult", "dcn_offset_lr_mult")
    found = [key for key in keys if paramwise.get(key) not in (None, 1)]
    custom = paramwise["custom_keys"] or {}
    return found + [
        f"{name}.lr_mult" for name, each in custom.items() if each.get("lr_mult", 1) != 1
    ]


# Hooks ----------------------------------------------------------------------------------------


def _ema(content: Config) -> float | None:
    """Return the momentum of the moving average; also refuse hooks that are not known."""
    for hook in hooks(content):
        if kind_of(hook) not in HARMLESS:
            raise NotExpressedError(
                f"the hook {kind_of(hook)} is not run here: recipe.ema=null, or a momentum (e.g. "
                "recipe.ema=0.0002), trains without it"
            )
    for hook in hooks(content, "EMAHook"):
        usual = {"ema_type": "ExponentialMovingAverage", "update_buffers": False}
        given = EMA | usual | {k: v for k, v in hook.items() if k not in ("type", "priority")}
        momentum = given.pop("momentum", 0.0002)
        if given != EMA:
            raise NotExpressedError(f"the EMAHook with {given} cannot be expressed, only {EMA}")
        return momentum
    return None


def _plain_epochs(content: Config) -> int:
    for hook in hooks(content, "YOLOXModeSwitchHook"):
        return hook.get("num_last_epochs", 15) * train_pipelines.repeats(content)
    for hook in hooks(content, "PipelineSwitchHook"):
        return _epochs(content) - hook["switch_epoch"] * train_pipelines.repeats(content)
    return 0


def _plain_l1(content: Config) -> bool:
    """Return whether the last epochs would have YOLOX's L1 loss: not if only the images change."""
    return bool(hooks(content, "YOLOXModeSwitchHook") or not hooks(content, "PipelineSwitchHook"))


def _augment(name: str) -> Callable[[Config], Any]:
    def read(content: Config) -> Any:
        try:
            return getattr(train_pipelines.augmentation(content), name)
        except train_pipelines.UnknownTransformError as error:
            raise NotExpressedError(str(error)) from error

    return read


READERS: dict[str, Callable[[Config], Any]] = {
    "epochs": _epochs,
    "batch_size": _batch_size,
    "base_batch_size": _base_batch_size,
    "clip_grad": _clip_grad,
    "ema": _ema,
    "plain_epochs": _plain_epochs,
    "plain_l1": _plain_l1,
}
READERS |= {
    key: lambda content, key=key: _schedule(content)[key]
    for key in (
        *("schedule", "milestones", "gamma", "min_lr", "cosine"),
        *("warmup", "warmup_epochs", "warmup_shape", "warmup_start"),
    )
}
READERS |= {key: _augment(key) for key in ("augment", "pipeline", "plain_pipeline")}
