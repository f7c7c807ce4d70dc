"""Pipelines of mmdet's transforms for training, calibration and validation."""

import copy
from collections.abc import Sequence
from typing import Any

import cv2
from mmcv.transforms import LoadImageFromFile
from mmdet.registry import TRANSFORMS
from mmengine.dataset import BaseDataset, Compose

from ldt.data.image_files import MAX_PIXELS, read_size, unreadable
from ldt.detectors.mmengine_internals import registered_types_only

META_KEYS = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
FOR_METRICS = ("areas", "kitti")  # where a data set has them


@TRANSFORMS.register_module()
class ReadImage(LoadImageFromFile):
    """LoadImageFromFile whose errors name the file, and that decodes no image of too many pixels.

    Args:
        max_pixels: of an image, told from its header; a file of a few kB may hold gigabytes.
        options: of LoadImageFromFile.

    Raises:
        ImageError: the file is missing, is not an image, is damaged or has too many pixels.
    """

    def __init__(self, max_pixels: int = MAX_PIXELS, **options: Any) -> None:
        super().__init__(**options)
        self.max_pixels = max_pixels

    def transform(self, results: dict) -> dict:
        """Add `img` (H, W, 3 uint8, BGR), `img_shape` and `ori_shape` (h, w) to `results`."""
        path = results["img_path"]
        try:
            if self.backend_args is None and self.file_client_args is None:  # a file on a disk
                read_size(path, self.max_pixels)
            loaded = super().transform(results)
        except OSError as error:
            raise unreadable(path, error.strerror or str(error)) from error
        except (AssertionError, cv2.error) as error:
            raise unreadable(path) from error
        assert loaded is not None, "only ignore_empty=True returns None"
        return loaded


def limited(steps: Sequence[dict[str, Any]], max_pixels: int) -> list[dict[str, Any]]:
    """Return the steps of a pipeline with a limit on the pixels of the images that it reads."""
    limit = {"max_pixels": max_pixels}
    return [step | limit if step["type"] == "ReadImage" else step for step in steps]


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
