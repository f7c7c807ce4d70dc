"""The ground-truth objects of a batch."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

BACKGROUND = -1  # label of boxes without an object
TRIALS = 64  # positions tried per background box


class Objects(NamedTuple):
    """The ground-truth objects of a batch, without ignored regions.

    Boxes of the background may be among them, as a further class of its own.

    Attributes:
        boxes: [K, 4], (x1, y1, x2, y2) in pixels of the padded network input.
        labels: [K] int64, on the CPU for any device of the boxes; ``BACKGROUND`` without an object.
        image: [K] int64, index of the object's image in the batch, on the CPU too.
        shape: (height, width) of the padded input.
    """

    boxes: Tensor
    labels: Tensor
    image: Tensor
    shape: tuple[int, int]

    def foreground(self) -> "Objects":
        """Return the objects alone."""
        return self._where(self.labels != BACKGROUND)

    def of_image(self, index: int) -> "Objects":
        """Return the objects of one image, as those of a batch of its own."""
        own = self._where(self.image == index)
        return own._replace(image=own.image - index)

    def _where(self, mask: Tensor) -> "Objects":
        """Return the objects of a mask, which is on the CPU as labels are."""
        (rows,) = mask.nonzero(as_tuple=True)
        boxes = self.boxes[rows.to(self.boxes.device, non_blocking=True)]
        return Objects(boxes, self.labels[rows], self.image[rows], self.shape)


class Instances(Protocol):
    """What is used of mmengine's ``InstanceData``, whose fields are set at run time."""

    bboxes: Tensor  # or mmdet's BaseBoxes
    labels: Tensor

    def __len__(self) -> int: ...


class Sample(Protocol):
    """What is used of mmdet's ``DetDataSample``."""

    @property
    def img_shape(self) -> tuple[int, int]:
        """(height, width) of the image, before batches are padded."""
        ...

    @property
    def gt_instances(self) -> Instances:
        """The ground truth, in pixels of the network input."""
        ...


def labelled_objects(
    samples: Sequence[Sample],
    shape: tuple[int, int],
    loaded: Sequence[Sample] | None = None,
    background: Sequence[Tensor] = (),
) -> Objects:
    """Collect the ground truth of mmdet's data samples, without ignored regions.

    Args:
        samples: ``DetDataSample`` with ``gt_instances`` in pixels of the network input.
        shape: (height, width) of the padded input.
        loaded: the same samples as loaded, on the CPU; reading the labels from these does not wait
            for the device of ``samples``.
        background: further boxes of every image (:func:`background_boxes`).
    """
    boxes = [corners(sample.gt_instances) for sample in samples]
    labels = [sample.gt_instances.labels.cpu() for sample in loaded or samples]
    for sample, relative in zip(samples, background, strict=bool(background)):
        height, width = sample.img_shape[:2]
        pixels = relative * relative.new_tensor([width, height] * 2)
        boxes.append(pixels.to(boxes[0], non_blocking=True))
        labels.append(torch.full((len(relative),), BACKGROUND))
    counts = torch.tensor([len(own) for own in boxes])
    order = torch.arange(len(samples)).repeat(1 + bool(background))
    image = torch.repeat_interleave(order, counts)
    return Objects(torch.cat(boxes).float(), torch.cat(labels).long(), image, shape)


def background_boxes(sample: Sample) -> Tensor:
    """Return boxes outside of all boxes of an image, as shares of its size: [M, 4], on the CPU.

    For each object it is a box of the same size at a random place that touches neither an object
    nor an ignored region; an object without such a place after some trials has none. The places are
    a function of the objects' boxes, so that they are the same in every pass over an image.
    """
    objects = corners(sample.gt_instances).cpu().double()
    ignored = getattr(sample, "ignored_instances", None)
    taken = objects if ignored is None else torch.cat([objects, corners(ignored).cpu().double()])
    height, width = sample.img_shape[:2]
    limit = objects.new_tensor([width, height])
    size = (objects[:, 2:] - objects[:, :2]).clamp(min=1).minimum(limit)
    seed = int(taken.abs().sum() * 64) + 7 * width + height
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(TRIALS, len(objects), 2, generator=generator, dtype=torch.float64)
    start = place * (limit - size)
    found = torch.cat([start, start + size], dim=-1)
    meets = (found[:, :, None, :2] < taken[:, 2:]) & (found[:, :, None, 2:] > taken[:, :2])
    free = ~meets.all(-1).any(-1)
    first = free.int().argmax(0)
    chosen = found[first, torch.arange(len(objects))][free.any(0)]
    return (chosen / limit.repeat(2)).float()


def corners(instances: Instances) -> Tensor:
    """Return the boxes of mmdet's instances as a tensor [K, 4] of (x1, y1, x2, y2)."""
    boxes = instances.bboxes
    return getattr(boxes, "tensor", boxes)
