"""Read the augmentation of an mmdet config: its training pipeline, and the one it ends with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from mmengine.config import Config, ConfigDict

Step = dict[str, Any]
LOADS = ("ReadImage", "LoadAnnotations")
PLAIN_LOADS = [{"type": "ReadImage"}, {"type": "LoadAnnotations", "with_bbox": True}]
STORAGE = ("backend_args", "file_client_args")  # where files lie
LEFT_OUT = (  # arguments of LoadAnnotations: masks are not loaded
    *("with_mask", "poly2mask", "with_seg", "reduce_zero_label", "ignore_index"),
)
MIX = ("Mosaic", "RandomAffine", "MixUp")  # disabled by YOLOX for the last epochs
MIXING = ("Mosaic", "MixUp", "CachedMosaic", "CachedMixUp")  # transforms of several images
PAD_COLOUR = (114.0, 114.0, 114.0)  # YOLOX's grey
NEED_MORE = (  # transforms that need more than an image and its boxes
    *("LoadPanopticAnnotations", "LoadProposals", "ProposalBroadcaster", "TransformBroadcaster"),
    *("UniformRefFrameSample", "PackTrackInputs", "CopyPaste", "InstaBoost", "MultiBranch"),
)


class UnknownTransformError(ValueError):
    """A pipeline has a transform that cannot be run here, on images with boxes only."""


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of a config, as keys of the recipe and of the detector.

    Attributes:
        augment: ``config``, unless one of the other names means the same at the config's size.
        pipeline: the transforms of ``config``.
        plain_pipeline: those of the last epochs, if they are others.
        mosaic_scale: range of the random scale of ``mosaic``.
        mixup: whether ``mosaic`` mixes images.
    """

    augment: str
    pipeline: list[Step] = field(default_factory=list)
    plain_pipeline: list[Step] = field(default_factory=list)
    mosaic_scale: tuple[float, float] = (0.1, 2.0)
    mixup: bool = True


def repeats(content: Config) -> int:
    """Return how often an epoch of a config passes through its data (``RepeatDataset``)."""
    times = [node.get("times", 1) for node in _nested(content) if node["type"] == "RepeatDataset"]
    return times[0] if times else 1


def augmentation(content: Config) -> Augmentation:
    """Return the augmentation of a config.

    Raises:
        UnknownTransformError: a transform cannot be run here.
    """
    nodes = list(_nested(content))
    found = [node["pipeline"] for node in reversed(nodes) if node.get("pipeline")]
    pipeline = [step for part in found for step in _plain(part)]
    if not pipeline:
        raise UnknownTransformError("its training data have no pipeline of their own")
    middle = [step for step in pipeline if step["type"] not in (*LOADS, "PackDetInputs")]
    if pipeline[:2] == PLAIN_LOADS and _ends_as_usual(content):
        if name := _simple(middle):
            return Augmentation(name)
        if mosaic := _mosaic(middle):
            return mosaic
    return Augmentation("config", pipeline, _last(content, pipeline))


def _nested(content: Config) -> Iterator[Mapping[str, Any]]:
    """Yield the training data set of a config and those that it wraps."""
    node = (content.get("train_dataloader") or {}).get("dataset")
    while node:
        yield node
        node = node.get("dataset")


def hooks(content: Config, *kinds: str) -> list[Mapping[str, Any]]:
    """Return the hooks of a config, or those of some kinds."""
    given = [*(content.get("custom_hooks") or []), *(content.get("default_hooks") or {}).values()]
    found = [hook for hook in given if hook]
    return [hook for hook in found if not kinds or kind_of(hook) in kinds]


def kind_of(node: Mapping[str, Any]) -> str:
    """Return the type of a hook, transform or scheduler without its package."""
    return str(node["type"]).rpartition(".")[2]


def _ends_as_usual(content: Config) -> bool:
    """Return whether the last epochs are without what YOLOX disables, if they differ at all."""
    switches = hooks(content, "YOLOXModeSwitchHook")
    usual = all(set(hook.get("skip_type_keys", MIX)) == set(MIX) for hook in switches)
    return usual and not hooks(content, "PipelineSwitchHook")


def _last(content: Config, pipeline: Sequence[Step]) -> list[Step]:
    """Return the pipeline of the last epochs; empty if it does not change."""
    for hook in hooks(content, "PipelineSwitchHook"):
        return _plain(hook["switch_pipeline"])
    for hook in hooks(content, "YOLOXModeSwitchHook"):
        skipped = hook.get("skip_type_keys", MIX)
        return [step for step in pipeline if step["type"] not in skipped]
    return []


def _plain(steps: Sequence[Any]) -> list[Step]:
    """Return transforms as plain data, with our own loading of images and without masks."""
    found = []
    for given in steps:
        step = cast(Step, ConfigDict(given).to_dict())
        kind = kind_of(step)
        check_transform(step)
        step = {key: value for key, value in step.items() if key not in STORAGE}
        if kind == "LoadImageFromFile":
            step |= {"type": "ReadImage"}
        elif kind == "LoadAnnotations":
            kept = {key: value for key, value in step.items() if key not in LEFT_OUT}
            step = kept | {"type": "LoadAnnotations", "with_bbox": True}
        elif kind == "PackDetInputs":
            step = {"type": "PackDetInputs"}
        found.append(step)
    return found


def check_transform(step: Step) -> None:
    """Check that a transform, and those that it wraps, can be run here.

    Raises:
        UnknownTransformError: it needs more than an image and its boxes, or wraps one that mixes
            images.
    """
    for node in _wrapped(step):
        kind = kind_of(node)
        if kind in NEED_MORE:
            raise UnknownTransformError(f"the transform {kind} needs more than images with boxes")
        if kind in MIXING and node is not step:
            raise UnknownTransformError(
                f"the transform {kind} mixes images, which it cannot do inside of {kind_of(step)}"
            )


def _wrapped(node: object) -> Iterator[Step]:
    """Yield a transform and those that it wraps, at any depth."""
    if isinstance(node, Mapping):
        if "type" in node:
            yield cast(Step, node)
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from _wrapped(item)


def resize_steps(scale: tuple[int, int], keep_ratio: bool, pad: str) -> list[dict]:
    """Return the steps that resize an image to `scale` (w, h), with padding if `pad`=square."""
    steps: list[dict] = [{"type": "Resize", "scale": scale, "keep_ratio": keep_ratio}]
    if pad == "square":
        steps.append({"type": "Pad", "size": scale, "pad_val": {"img": PAD_COLOUR}})
    return steps


def mosaic_steps(
    scale: tuple[int, int],
    resize: list[dict],
    ratios: tuple[float, float] = (0.1, 2.0),
    mixup: bool = True,
) -> list[Any]:
    """Return YOLOX's training steps (arXiv 2107.08430), as in mmdet's yolox_s_8xb8-300e_coco.

    They follow image and annotation loading. Contrary to its name, keep_empty=False makes
    FilterAnnotations of mmdet 3.3 keep images without boxes.

    Args:
        scale: the network's input size (width, height).
        resize: the steps that resize an image to `scale`, for the epochs without mosaic.
        ratios: range of the random scale of a mosaic; (0.5, 1.5) for YOLOX-Nano and Tiny.
        mixup: whether mosaics are mixed with images; not for YOLOX-Nano and Tiny.
    """
    border = (-scale[0] // 2, -scale[1] // 2)
    mix = {"type": "MixUp", "img_scale": scale, "ratio_range": (0.8, 1.6), "pad_val": 114.0}
    return [
        {"type": "Mosaic", "img_scale": scale, "pad_val": 114.0},
        {"type": "RandomAffine", "scaling_ratio_range": ratios, "border": border},
        *([mix] if mixup else []),
        {"type": "YOLOXHSVRandomAug"},
        {"type": "RandomFlip", "prob": 0.5},
        *resize,
        {"type": "FilterAnnotations", "min_gt_bbox_wh": (1, 1), "keep_empty": False},
        {"type": "PackDetInputs"},
    ]


def _simple(steps: Sequence[Step]) -> str | None:
    """Return the name of an augmentation that is the same for every input size."""
    flip = {"type": "RandomFlip", "prob": 0.5}
    known = {"none": [], "flip": [flip]}
    known["shift"] = [flip, {"type": "RandomShift", "prob": 0.5, "max_shift_px": 32}]
    resize = steps[0] if steps else {}
    fits = {key: value for key, value in resize.items() if key != "scale"}
    if fits != {"type": "Resize", "keep_ratio": True}:
        return None
    return next((name for name, rest in known.items() if list(steps[1:]) == rest), None)


def _mosaic(steps: Sequence[Step]) -> Augmentation | None:
    """Return YOLOX's augmentation, which is the same for every input size."""
    by_kind = {step["type"]: dict(step) for step in steps}
    if not {"Mosaic", "RandomAffine", "Pad"} <= by_kind.keys():
        return None
    by_kind["Mosaic"].setdefault("img_scale", (640, 640))  # mmdet's default
    width, height = scale = tuple(by_kind["Mosaic"]["img_scale"])
    pad = by_kind["Pad"]
    if width == height and "size" not in pad and pad.pop("pad_to_square", False):
        pad["size"] = scale
    ratios = by_kind["RandomAffine"].get("scaling_ratio_range", (0.5, 1.5))
    mixup = "MixUp" in by_kind
    usual = mosaic_steps(scale, resize_steps(scale, True, "square"), ratios, mixup)
    if len(by_kind) < len(steps) or [*by_kind.values(), {"type": "PackDetInputs"}] != usual:
        return None
    return Augmentation("mosaic", mosaic_scale=ratios, mixup=mixup)
