"""The labelled objects of a batch: what LDT measures and where it looks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Objects(NamedTuple):
    """The ground-truth objects of a batch, ignored regions left out.

    `boxes` [K, 4] are (x1, y1, x2, y2) in pixels of the padded network input, `labels` [K] int64,
    `image` [K] int64 is the index in the batch, `shape` the (height, width) of the padded input.
    """

    boxes: Tensor
    labels: Tensor
    image: Tensor
    shape: tuple[int, int]


def labelled_objects(samples: Sequence[Any], shape: tuple[int, int]) -> Objects:
    """Collect the ground truth of mmdet's data samples; ignored regions are left out.

    Args:
        samples: ``DetDataSample`` with ``gt_instances`` in pixels of the network input.
        shape: (height, width) of the padded input.
    """
    boxes = [corners(sample.gt_instances) for sample in samples]
    labels = [sample.gt_instances.labels for sample in samples]
    image = [
        torch.full((len(found),), index, dtype=torch.long, device=found.device)
        for index, found in enumerate(boxes)
    ]
    return Objects(torch.cat(boxes).float(), torch.cat(labels).long(), torch.cat(image), shape)


def corners(instances: Any) -> Tensor:
    """Return the boxes of mmdet's instances as [K, 4] (x1, y1, x2, y2), whatever their type."""
    boxes = instances.bboxes
    return getattr(boxes, "tensor", boxes)
