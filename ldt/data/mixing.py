"""Images that go through any pipeline of mmdet's, as a function of the random state alone."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmdet.datasets.transforms import CachedMixUp, CachedMosaic, MixUp, Mosaic
from mmengine.dataset import BaseDataset
from torch.utils.data import Dataset

from ldt.data.pipelines import build_transforms
from ldt.detectors.train_pipelines import LOADS

TRIES = 1000  # images that may be dropped by a pipeline before it is given up, as in mmengine


class PipelineImages(Dataset):
    """Images of a data set, run through the transforms of a training pipeline.

    ``Mosaic`` and ``MixUp`` get other images as they were loaded. ``CachedMosaic`` and
    ``CachedMixUp`` take theirs from a cache of what went through the earlier transforms, which
    would make an image depend on those before it; here they get images at random that went through
    the same transforms. An image that the pipeline drops is replaced by another one.

    Args:
        dataset: the annotations, without a pipeline.
        steps: configs of the transforms.

    Raises:
        ValueError: a transform cannot be built.
    """

    def __init__(self, dataset: BaseDataset, steps: Sequence[dict[str, Any]]) -> None:
        self.dataset = dataset
        self.loads = next(i for i, step in enumerate([*steps, {}]) if step.get("type") not in LOADS)
        self.transforms = build_transforms([_tuples(step) for step in steps])

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
            for number, transform in enumerate(self.transforms[:count]):
                found = self._apply(transform, found, number)
                if found is None:
                    break
            else:
                return found
            index = np.random.randint(len(self))  # noqa: NPY002 - `seeded` seeds this generator
        raise RuntimeError(f"the training pipeline drops every one of {TRIES} images")

    def _apply(self, transform: Any, results: dict[str, Any], number: int) -> Any:
        if not isinstance(transform, (Mosaic, MixUp)):
            return transform(results)
        cached = isinstance(transform, (CachedMosaic, CachedMixUp))
        if isinstance(transform, CachedMixUp) and np.random.uniform() > transform.prob:  # noqa: NPY002
            return results
        results["mix_results"] = self._partners(transform, number if cached else self.loads)
        kind = Mosaic if isinstance(transform, Mosaic) else MixUp
        mixed: Any = kind.transform(transform, results)
        mixed.pop("mix_results", None)
        return mixed

    def _partners(self, transform: Mosaic | MixUp, count: int) -> list[dict[str, Any]]:
        """Return three images for a mosaic; else one, which has objects if a few tries find it."""
        others = 3 if isinstance(transform, Mosaic) else transform.max_iters
        found = []
        for index in np.random.randint(len(self), size=others):  # noqa: NPY002
            partner = copy.deepcopy(self._run(int(index), count))
            if isinstance(transform, MixUp):
                found = [partner]
                if len(partner["gt_bboxes"]):
                    break
            else:
                found.append(partner)
        return found


def _tuples(node: Any, key: str = "") -> Any:
    """Turn lists of numbers into tuples, which mmdet's transforms ask for, but for ``prob``."""
    if isinstance(node, dict):
        return {name: _tuples(value, name) for name, value in node.items()}
    if not isinstance(node, (list, tuple)):
        return node
    numbers = all(isinstance(item, (int, float)) for item in node)
    return tuple(node) if numbers and key != "prob" else [_tuples(item) for item in node]
