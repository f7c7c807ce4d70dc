"""Pipelines of mmdet's transforms for training, calibration and validation."""

import copy
from typing import Any

import cv2
from mmcv.transforms import LoadImageFromFile
from mmdet.registry import TRANSFORMS
from mmengine.dataset import BaseDataset, Compose

from ldt.detectors.mmengine_internals import registered_types_only

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
