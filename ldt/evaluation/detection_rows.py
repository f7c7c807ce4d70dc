"""Detections and ground truth of images as rows of a table, which ranks can gather, and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor

from ldt.data.kitti_labels import TYPES, KittiObject
from ldt.objects import Instances

COLUMNS = 11
# An image's own row has the label 1 if its annotations are KITTI's; the label of a KITTI object is
# the index of its type, and it alone has a truncation and an occlusion.
KIND, IMAGE_ID, LABEL, SCORE = range(4)
BOX = slice(4, 8)
AREA, TRUNCATION, OCCLUSION = range(8, COLUMNS)
IMAGE, DETECTION, TRUTH, IGNORED, KITTI = range(5)  # kinds of rows


class Detections(Instances, Protocol):
    """What is used of mmengine's ``InstanceData``; ground truth has no scores."""

    scores: Tensor


@dataclass(frozen=True)
class Boxes:
    """Boxes of one image, xyxy in pixels: boxes [n, 4], labels [n] (int), scores [n]; float64.

    `areas` [n] are the annotated ones, 0 where there is none.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    areas: np.ndarray


@dataclass(frozen=True)
class KittiObjects:
    """All labelled objects of one KITTI image, of any type, with boxes [n, 4] as labelled.

    Types are indices in `ldt.data.kitti_labels.TYPES`.
    """

    types: np.ndarray
    boxes: np.ndarray
    truncations: np.ndarray
    occlusions: np.ndarray


@dataclass(frozen=True)
class Image:
    """All boxes of one image; `ignored` has a copy of each class-agnostic region per class.

    `kitti` is None unless the image's annotations are KITTI's.
    """

    detections: Boxes
    truths: Boxes
    ignored: Boxes
    kitti: KittiObjects | None


def rows_of(sample: DetDataSample, classes: Sequence[str]) -> Tensor:
    """Return the rows [n, COLUMNS] of one image: its own row, then those of its boxes.

    Raises:
        ValueError: the image has no integer id, no annotation, an unknown label, or areas that are
            not those of its objects.
    """
    image = _id(sample)
    if "bboxes" not in sample.get("gt_instances", ()):
        raise ValueError(
            f"image {image} has no gt_instances.bboxes: add LoadAnnotations(with_bbox=True) "
            "to the test pipeline (an image without objects has bboxes of shape [0, 4])"
        )
    groups = {
        DETECTION: cast(Detections, sample.pred_instances),
        TRUTH: cast(Detections, sample.gt_instances),
    }
    if "bboxes" in sample.get("ignored_instances", ()):
        groups[IGNORED] = cast(Detections, sample.ignored_instances)
    own = torch.zeros(1, COLUMNS, dtype=torch.float64)
    own[0, LABEL] = "kitti" in sample
    rows = {IMAGE: own, KITTI: _kitti_rows(sample.get("kitti", ()))}
    for kind, instances in groups.items():
        _check_labels(kind, image, instances.labels, classes)
        rows[kind] = _rows(kind, instances).cpu()
    areas = sample.get("areas")
    if areas is not None:
        areas = torch.as_tensor(areas, dtype=torch.float64)
        if len(areas) != len(rows[TRUTH]):
            told = f"image {image} has {len(areas)} areas for {len(rows[TRUTH])} gt_instances"
            raise ValueError(f"{told}: the dataset must give one area for each object")
        rows[TRUTH][:, AREA] = areas
    block = torch.cat(list(rows.values()))
    block[:, IMAGE_ID] = image
    return block


def images_of(table: np.ndarray, num_classes: int) -> list[Image]:
    """Return the images of a table, ordered by id; of repeated images the first counts."""
    blocks: dict[int, np.ndarray] = {}
    for block in np.split(table, np.flatnonzero(table[:, KIND] == IMAGE))[1:]:
        blocks.setdefault(int(block[0, IMAGE_ID]), block)
    return [_image(blocks[image_id], num_classes) for image_id in sorted(blocks)]


def _id(sample: DetDataSample) -> int:
    image = sample.get("img_id")
    if isinstance(image, bool) or not isinstance(image, int | np.integer):
        raise ValueError(
            f"img_id={image!r} must be an integer; the dataset must set `img_id` and list it "
            "in PackDetInputs(meta_keys=('img_id', ...))"
        )
    return int(image)


def _check_labels(kind: int, image: int, labels: Tensor, classes: Sequence[str]) -> None:
    """Raise ValueError for labels without a class; ignored boxes may have negative ones."""
    lowest = labels.min().item() if kind != IGNORED and len(labels) else 0
    highest = labels.max().item() if len(labels) else 0
    if lowest < 0 or highest >= len(classes):
        raise ValueError(
            f"image {image} has labels from {lowest} to {highest}: allowed are 0 to "
            f"{len(classes) - 1} for {list(classes)} (and -1 for ignored boxes); "
            "use the same classes for the detector and the dataset"
        )


def _rows(kind: int, instances: Detections) -> Tensor:
    """Return the rows of instances of one kind, with image id 0."""
    boxes = get_box_tensor(instances.bboxes).detach().double()
    rows = boxes.new_zeros(len(boxes), COLUMNS)
    rows[:, KIND] = kind
    rows[:, LABEL] = instances.labels
    if kind == DETECTION:
        rows[:, SCORE] = instances.scores.detach()
    rows[:, BOX] = boxes
    return rows


def _kitti_rows(objects: Sequence[KittiObject]) -> Tensor:
    """Return the rows of KITTI's objects, with image id 0; those of one's own types are absent."""
    rows = [
        (KITTI, 0, TYPES.index(each.name), 0, *each.labelled, 0, each.truncation, each.occlusion)
        for each in objects
        if each.name in TYPES
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, COLUMNS)


def _image(block: np.ndarray, num_classes: int) -> Image:
    """Group the rows of one image by kind."""
    detections, truths, ignored, kitti = (
        block[block[:, KIND] == kind] for kind in range(DETECTION, KITTI + 1)
    )
    agnostic = np.repeat(ignored[ignored[:, LABEL] < 0], num_classes, axis=0)
    agnostic[:, LABEL] = np.arange(len(agnostic)) % num_classes
    ignored = np.concatenate((ignored[ignored[:, LABEL] >= 0], agnostic))
    objects = KittiObjects(
        kitti[:, LABEL].astype(int), kitti[:, BOX], kitti[:, TRUNCATION], kitti[:, OCCLUSION]
    )
    return Image(
        _boxes(detections), _boxes(truths), _boxes(ignored), objects if block[0, LABEL] else None
    )


def _boxes(rows: np.ndarray) -> Boxes:
    return Boxes(rows[:, BOX], rows[:, LABEL].astype(int), rows[:, SCORE], rows[:, AREA])
