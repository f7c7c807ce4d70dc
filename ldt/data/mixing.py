"""Images that go through any pipeline of mmdet's, as a function of the random state alone."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmdet.datasets.transforms import MixUp, Mosaic
from mmengine.dataset import BaseDataset
from torch.utils.data import Dataset

from ldt.data.pipelines import build_transforms
from ldt.detectors.train_pipelines import LOADS, check_transform

TRIES = 1000  # images that may be dropped by a pipeline before it is given up, as in mmengine
CACHED = {"CachedMosaic": "Mosaic", "CachedMixUp": "MixUp"}
LISTS = ("prob", "mean", "std")  # arguments that are lists in mmdet's configs, not tuples


class PipelineImages(Dataset):
    """Images of a data set, run through the transforms of a training pipeline.

    ``Mosaic`` and ``MixUp`` get other images as they were loaded. ``CachedMosaic`` and
    ``CachedMixUp`` take theirs from a cache of what went through the earlier transforms, which
    would make an image depend on those before it: here they are the transforms without a cache,
    and get images at random that went through the same transforms. An image that the pipeline
    drops is replaced by another one.

    Args:
        dataset: the annotations, without a pipeline.
        steps: configs of the transforms.

    Raises:
        ValueError: a transform cannot be built, or cannot be run here.
    """

    def __init__(self, dataset: BaseDataset, steps: Sequence[dict[str, Any]]) -> None:
        self.dataset = dataset
        for step in steps:
            check_transform(step)
        self.transforms = build_transforms([_uncached(_tuples(step)) for step in steps])
        loads = next(i for i, step in enumerate([*steps, {}]) if step.get("type") not in LOADS)
        # of each transform: the transforms that its partners went through, and how often it is done
        self.before = [i if s["type"] in CACHED else loads for i, s in enumerate(steps)]
        self.shares = [s.get("prob", 1.0) if s["type"] == "CachedMixUp" else 1.0 for s in steps]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self._run(index, len(self.transforms))

    def _run(self, index: int, count: int) -> Any:
        """Return an image after so many transforms.

        Raises:
            RuntimeError: the pipeline drops every image.
        """
        for _ in range(TRIES):
            found: Any = self.dataset.get_data_info(index)
            for number in range(count):
                found = self._apply(number, found)
                if found is None:
                    break
            else:
                return found
            index = self._draw(1)[0]
        raise RuntimeError(f"the training pipeline drops every one of {TRIES} images")

    def _apply(self, number: int, results: dict[str, Any]) -> Any:
        transform = self.transforms[number]
        if not isinstance(transform, (Mosaic, MixUp)):
            return transform(results)
        if np.random.uniform() >= self.shares[number]:  # noqa: NPY002 - the seeded generator
            return results
        results["mix_results"] = self._partners(transform, self.before[number])
        mixed: Any = transform(results)
        mixed.pop("mix_results")
        return mixed

    def _partners(self, transform: Mosaic | MixUp, count: int) -> list[Any]:
        """Return three images for a mosaic; else one, which has objects if a few tries find it."""
        if isinstance(transform, Mosaic):
            return [copy.deepcopy(self._run(index, count)) for index in self._draw(3)]
        partner: dict[str, Any] = {}
        for index in self._draw(transform.max_iters):
            partner = self._run(index, count)
            if len(partner["gt_bboxes"]):
                break
        return [partner]

    def _draw(self, count: int) -> list[int]:
        """Return indices of images at random, from the generator that mmdet's transforms use."""
        return np.random.randint(len(self), size=count).tolist()  # noqa: NPY002


def _uncached(step: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a cached transform's twin without a cache."""
    kind = step["type"]
    aside = ("max_cached_images", "random_pop", *(["prob"] if kind == "CachedMixUp" else []))
    if kind not in CACHED:
        return step
    return {key: value for key, value in step.items() if key not in aside} | {"type": CACHED[kind]}


def _tuples(node: object, key: str = "") -> Any:
    """Turn lists of numbers, as configurations have them, into the tuples that mmdet asks for."""
    if isinstance(node, dict):
        return {name: _tuples(value, name) for name, value in node.items()}
    if not isinstance(node, (list, tuple)):
        return node
    numbers = all(isinstance(item, (int, float)) for item in node)
    return tuple(node) if numbers and key not in LISTS else [_tuples(item) for item in node]
