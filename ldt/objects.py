"""The ground-truth objects of a batch."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Objects(NamedTuple):
    """The ground-truth objects of a batch, without ignored regions.

    Attributes:
        boxes: [K, 4], (x1, y1, x2, y2) in pixels of the padded network input.
        labels: [K] int64, on the CPU for any device of the boxes.
        image: [K] int64, index of the object's image in the batch, on the CPU too.
        shape: (height, width) of the padded input.
    """

    boxes: Tensor
    labels: Tensor
    image: Tensor
    shape: tuple[int, int]


class Instances(Protocol):
    """What is used of mmengine's ``InstanceData``, whose fields are set at run time."""

    bboxes: Tensor  # or mmdet's BaseBoxes
    labels: Tensor

    def __len__(self) -> int: ...


class Sample(Protocol):
    """What is used of mmdet's ``DetDataSample``."""

    @property
    def gt_instances(self) -> Instances:
        """The ground truth, in pixels of the network input."""
        ...


def labelled_objects(
    samples: Sequence[Sample], shape: tuple[int, int], loaded: Sequence[Sample] | None = None
) -> Objects:
    """Collect the ground truth of mmdet's data samples, without ignored regions.

    Args:
        samples: ``DetDataSample`` with ``gt_instances`` in pixels of the network input.
        shape: (height, width) of the padded input.
        loaded: the same samples as loaded, on the CPU; reading the labels from these does not wait
            for the device of ``samples``.
    """
    boxes = [corners(sample.gt_instances) for sample in samples]
    labels = [sample.gt_instances.labels.cpu() for sample in loaded or samples]
    counts = torch.tensor([len(own) for own in boxes])
    image = torch.repeat_interleave(torch.arange(len(boxes)), counts)
    return Objects(torch.cat(boxes).float(), torch.cat(labels).long(), image, shape)


def corners(instances: Instances) -> Tensor:
    """Return the boxes of mmdet's instances as a tensor [K, 4] of (x1, y1, x2, y2)."""
    boxes = instances.bboxes
    return getattr(boxes, "tensor", boxes)
