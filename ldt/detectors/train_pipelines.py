"""Read the augmentation of an mmdet config: its training pipeline, and the one it ends with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from mmengine.config import Config, ConfigDict

Step = dict[str, Any]
LOADS = ("ReadImage", "LoadAnnotations")
MIX = ("Mosaic", "RandomAffine", "MixUp")  # disabled by YOLOX for the last epochs
NEED_MORE = (  # transforms that need more than an image and its boxes
    *("LoadPanopticAnnotations", "LoadProposals", "ProposalBroadcaster", "TransformBroadcaster"),
    *("UniformRefFrameSample", "PackTrackInputs", "CopyPaste", "InstaBoost", "MultiBranch"),
)
YOLOX = (*MIX, "YOLOXHSVRandomAug", "RandomFlip", "Resize", "Pad", "FilterAnnotations")


class UnknownTransformError(ValueError):
    """A pipeline has a transform that cannot be run on images with boxes only."""


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
        UnknownTransformError: a transform needs more than an image and its boxes.
    """
    nodes = list(_nested(content))
    found = [node["pipeline"] for node in reversed(nodes) if node.get("pipeline")]
    pipeline = [step for part in found for step in _plain(part)]
    if not pipeline:
        raise UnknownTransformError("its training data have no pipeline of their own")
    middle = [step for step in pipeline if step["type"] not in (*LOADS, "PackDetInputs")]
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


def _last(content: Config, pipeline: Sequence[Step]) -> list[Step]:
    """Return the pipeline of the last epochs; empty if it does not change."""
    for hook in content.get("custom_hooks") or []:
        if hook["type"].endswith("PipelineSwitchHook"):
            return _plain(hook["switch_pipeline"])
        if hook["type"].endswith("YOLOXModeSwitchHook"):
            skipped = hook.get("skip_type_keys", MIX)
            return [step for step in pipeline if step["type"] not in skipped]
    return []


def _plain(steps: Sequence[Any]) -> list[Step]:
    """Return transforms as plain data, with our own loading of images and without masks."""
    found = []
    for given in steps:
        step = cast(Step, ConfigDict(given).to_dict())
        kind = str(step["type"]).rpartition(".")[2]
        if kind in NEED_MORE:
            raise UnknownTransformError(f"the transform {kind} needs more than images with boxes")
        step.pop("backend_args", None)
        if kind == "LoadImageFromFile":
            step |= {"type": "ReadImage"}
        elif kind == "LoadAnnotations":
            step = {"type": "LoadAnnotations", "with_bbox": True}
        elif kind == "PackDetInputs":
            step = {"type": "PackDetInputs"}
        found.append(step)
    return found


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
    by_kind = {step["type"]: step for step in steps}
    mixup = "MixUp" in by_kind
    if [step["type"] for step in steps] != [kind for kind in YOLOX if mixup or kind != "MixUp"]:
        return None
    width, height = by_kind["Mosaic"]["img_scale"]
    scales = by_kind["RandomAffine"].get("scaling_ratio_range", (0.5, 1.5))
    usual: dict[str, Step] = {
        "Mosaic": {"img_scale": (width, height), "pad_val": 114.0},
        "RandomAffine": {"scaling_ratio_range": scales, "border": (-width // 2, -height // 2)},
        "MixUp": {"img_scale": (width, height), "ratio_range": (0.8, 1.6), "pad_val": 114.0},
        "YOLOXHSVRandomAug": {},
        "RandomFlip": {"prob": 0.5},
        "FilterAnnotations": {"min_gt_bbox_wh": (1, 1), "keep_empty": False},
    }
    if any({"type": kind, **usual[kind]} != by_kind[kind] for kind in usual.keys() & by_kind):
        return None
    return Augmentation("mosaic", mosaic_scale=scales, mixup=mixup)
