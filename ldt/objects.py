"""The ground-truth objects of a batch."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Objects(NamedTuple):
    """The ground-truth objects of a batch, without ignored regions.

    Attributes:
        boxes: [K, 4], (x1, y1, x2, y2) in pixels of the padded network input.
        labels: [K] int64.
        image: [K] int64, index of the object's image in the batch.
        shape: (height, width) of the padded input.
    """

    boxes: Tensor
    labels: Tensor
    image: Tensor
    shape: tuple[int, int]

    def of_image(self, index: int) -> "Objects":
        """Return the objects of one image, as those of a batch of its own."""
        own = self.image == index
        return Objects(self.boxes[own], self.labels[own], self.image[own] - index, self.shape)


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


def labelled_objects(samples: Sequence[Sample], shape: tuple[int, int]) -> Objects:
    """Collect the ground truth of mmdet's data samples, without ignored regions.

    Args:
        samples: ``DetDataSample`` with ``gt_instances`` in pixels of the network input.
        shape: (height, width) of the padded input.
    """
    boxes = [corners(sample.gt_instances) for sample in samples]
    labels = [sample.gt_instances.labels for sample in samples]
    image = [
        torch.full((len(own),), index, dtype=torch.long, device=own.device)
        for index, own in enumerate(boxes)
    ]
    return Objects(torch.cat(boxes).float(), torch.cat(labels).long(), torch.cat(image), shape)


def corners(instances: Instances) -> Tensor:
    """Return the boxes of mmdet's instances as a tensor [K, 4] of (x1, y1, x2, y2)."""
    boxes = instances.bboxes
    return getattr(boxes, "tensor", boxes)
