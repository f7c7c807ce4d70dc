"""Pipelines of mmdet's transforms for training, calibration and validation."""

import copy
from typing import Any

import cv2
from mmcv.transforms import LoadImageFromFile
from mmdet.registry import TRANSFORMS
from mmengine.dataset import BaseDataset, Compose

from ldt.detectors.mmengine_internals import registered_types_only

PAD_COLOUR = (114.0, 114.0, 114.0)  # YOLOX's grey
META_KEYS = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
FOR_METRICS = ("areas", "kitti")  # where a data set has them


@TRANSFORMS.register_module()
class ReadImage(LoadImageFromFile):
    """LoadImageFromFile whose error names the file that could not be decoded.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not an image or is damaged.
    """

    def transform(self, results: dict) -> dict:
        """Add `img` (H, W, 3 uint8, BGR), `img_shape` and `ori_shape` (h, w) to `results`."""
        try:
            loaded = super().transform(results)
        except (AssertionError, cv2.error) as error:
            raise ValueError(
                f"cannot read the image {results['img_path']}: damaged or not an image; restore it"
            ) from error
        assert loaded is not None, "only ignore_empty=True returns None"
        return loaded


def resize_steps(scale: tuple[int, int], keep_ratio: bool, pad: str) -> list[dict]:
    """Return the steps that resize an image to `scale` (w, h), with padding if `pad`=square."""
    steps: list[dict] = [{"type": "Resize", "scale": scale, "keep_ratio": keep_ratio}]
    if pad == "square":
        steps.append({"type": "Pad", "size": scale, "pad_val": {"img": PAD_COLOUR}})
    return steps


def plain_steps(resize: list[dict], augment: str = "none") -> list[dict]:
    """Return a pipeline with boxes in network-input coordinates (loaded *before* Resize)."""
    steps = [{"type": "ReadImage"}, {"type": "LoadAnnotations", "with_bbox": True}, *resize]
    if augment != "none":
        steps.append({"type": "RandomFlip", "prob": 0.5})
    if augment == "shift":
        steps.append({"type": "RandomShift", "prob": 0.5, "max_shift_px": 32})
    return [*steps, {"type": "PackDetInputs"}]


def test_steps(resize: list[dict]) -> list[dict]:
    """Return the usual test pipeline: boxes in original-image coordinates (loaded after Resize)."""
    annotations = {"type": "LoadAnnotations", "with_bbox": True}
    pack = {"type": "PackDetInputs", "meta_keys": (*META_KEYS, *FOR_METRICS)}
    return [{"type": "ReadImage"}, *resize, annotations, pack]


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


def with_pipeline(dataset: BaseDataset, steps: list[dict]) -> BaseDataset:
    """Return a view of `dataset` that shares its annotations and runs the transforms `steps`."""
    view = copy.copy(dataset)
    view.pipeline = Compose(build_transforms(steps))
    return view


def build_transforms(steps: list[dict]) -> list[Any]:
    """Build the transforms of a pipeline, which may come from a file: registered types only.

    Raises:
        ValueError: a ``type`` is not registered, does not take an argument, or needs a package.
    """
    try:
        with registered_types_only():
            return [TRANSFORMS.build(step) for step in steps]
    except (KeyError, TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"mmdet cannot build the pipeline: {error}") from error
