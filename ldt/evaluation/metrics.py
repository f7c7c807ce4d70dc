"""Detection accuracy: COCO AP and VOC-style mAP of the same detections, over all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from mmdet.evaluation.functional.mean_ap import average_precision, tpfp_default
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision

from ldt.objects import Instances

# One row of the state: kind, image id, label, score, x1, y1, x2, y2.
COLUMNS = 8
IMAGE, DETECTION, TRUTH, IGNORED = range(4)

# Our name of a COCO average -> torchmetrics' name of it.
COCO_AVERAGES = {
    "AP": "map",
    "AP50": "map_50",
    "AP75": "map_75",
    "AP_small": "map_small",
    "AP_medium": "map_medium",
    "AP_large": "map_large",
}


class DetectionMetrics(Metric):
    """COCO AP and VOC-style mAP of a detector, in total and per class.

    `compute` returns one float per key, in [0, 1], or nan if there is no ground truth (no image, no
    object of that size or class):

    - `AP` (IoU 0.50:0.95), `AP50`, `AP75`, `AP_small`, `AP_medium`, `AP_large`, `AP/<class>`:
      COCO's averages, from the 100 best detections per image and class. Sizes are box areas, split
      at 32^2 and 96^2 pixels (COCO's own annotations have mask areas instead).
    - `mAP`, `mAP/<class>`: area under the precision-recall curve at IoU 0.5, as computed by mmdet's
      `eval_map` (Pascal VOC since 2010), from all detections.

    An ignored box with a class label is a COCO crowd or one of mmdet's `bboxes_ignore` of that
    class; with a negative label it applies to all classes (KITTI's DontCare).

    Results do not depend on the number of ranks or the sampler's padding: the tables of all ranks
    are concatenated, each image id counts once, and images are evaluated in the order of their ids.

    Args:
        classes: class names; label i is `classes[i]`.

    Raises:
        ValueError: there is no class, or a name is repeated.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    table: list[Tensor]

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        if not classes or len(set(classes)) != len(classes):
            raise ValueError(
                f"classes={list(classes)}: give at least one class, each name once, for example "
                "DetectionMetrics(['Car', 'Pedestrian', 'Cyclist'])"
            )
        self.classes = tuple(classes)
        self.add_state("table", default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Remove all images."""
        super().reset()
        # An empty table, not an empty list: torchmetrics gathers an empty list as a 1-D float32
        # tensor, which cannot be concatenated with the 2-D float64 tables of other ranks.
        self.table = [torch.zeros(0, COLUMNS, dtype=torch.float64, device=self.device)]

    def update(self, data_samples: Sequence[DetDataSample]) -> None:
        """Add images with their detections and ground truth.

        Args:
            data_samples: per image an integer `img_id`, `pred_instances` (bboxes [n, 4], scores
                [n], labels [n]), `gt_instances` (bboxes [m, 4], labels [m]) and optionally
                `ignored_instances` (bboxes [k, 4], labels [k]). All boxes are (x1, y1, x2, y2) in
                pixels of the original image.

        Raises:
            ValueError: an image has no integer id, no annotation, or an unknown label.
        """
        self.table.extend(self._rows(sample) for sample in data_samples)

    def compute(self) -> dict[str, float]:
        """Return the metrics by name; see the class for the keys."""
        table = torch.cat(self.table) if isinstance(self.table, list) else self.table
        images = _split(table.cpu().numpy(), len(self.classes))
        averages, coco = coco_ap(images, len(self.classes))
        voc = voc_ap(images, len(self.classes))
        averages["mAP"] = _nan_mean(voc)
        averages |= {f"AP/{name}": ap for name, ap in zip(self.classes, coco, strict=True)}
        return averages | {f"mAP/{name}": ap for name, ap in zip(self.classes, voc, strict=True)}

    def _rows(self, sample: DetDataSample) -> Tensor:
        """Return the rows [1 + n + m + k, 8] of one image: its first row, then its boxes."""
        image = sample.get("img_id")
        if isinstance(image, bool) or not isinstance(image, int | np.integer):
            raise ValueError(
                f"img_id={image!r} must be an integer; the dataset must set `img_id` and list it "
                "in PackDetInputs(meta_keys=('img_id', ...))"
            )
        if "bboxes" not in sample.get("gt_instances", ()):
            raise ValueError(
                f"image {image} has no gt_instances.bboxes: add LoadAnnotations(with_bbox=True) "
                "to the test pipeline (an image without objects has bboxes of shape [0, 4])"
            )
        groups = [
            (DETECTION, cast(Detections, sample.pred_instances)),
            (TRUTH, cast(Detections, sample.gt_instances)),
        ]
        if "bboxes" in sample.get("ignored_instances", ()):
            groups.append((IGNORED, cast(Detections, sample.ignored_instances)))
        rows = [torch.zeros(1, COLUMNS, dtype=torch.float64, device=self.device)]
        for kind, instances in groups:
            self._check_labels(kind, int(image), instances.labels)
            rows.append(_table(kind, instances).to(self.device))
        block = torch.cat(rows)
        block[:, 1] = int(image)
        return block

    def _check_labels(self, kind: int, image: int, labels: Tensor) -> None:
        """Raise ValueError for labels without a class; ignored boxes may have negative ones."""
        lowest = labels.min().item() if kind != IGNORED and len(labels) else 0
        highest = labels.max().item() if len(labels) else 0
        if lowest < 0 or highest >= len(self.classes):
            raise ValueError(
                f"image {image} has labels from {lowest} to {highest}: allowed are 0 to "
                f"{len(self.classes) - 1} for {list(self.classes)} (and -1 for ignored boxes); "
                "use the same classes for the detector and the dataset"
            )


class Detections(Instances, Protocol):
    """What is used of mmengine's ``InstanceData``; ground truth has no scores."""

    scores: Tensor


@dataclass(frozen=True)
class Boxes:
    """Boxes of one image, xyxy in pixels: boxes [n, 4], labels [n] (int), scores [n]; float64."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray

    def of(self, label: int) -> np.ndarray:
        """Return the boxes [k, 4] of one class as float32, as mmdet needs them."""
        return self.boxes[self.labels == label].astype(np.float32)


@dataclass(frozen=True)
class Image:
    """All boxes of one image; `ignored` has a copy of each class-agnostic region per class."""

    detections: Boxes
    truths: Boxes
    ignored: Boxes


def coco_ap(images: Sequence[Image], num_classes: int) -> tuple[dict[str, float], list[float]]:
    """Return COCO's averages (keys of `COCO_AVERAGES`) and AP per class; nan without truths."""
    if not any(len(image.truths.labels) for image in images):
        return dict.fromkeys(COCO_AVERAGES, float("nan")), [float("nan")] * num_classes
    metric = MeanAveragePrecision(
        iou_type="bbox",
        # torchmetrics' own lists are float32: their 0.6 and 0.3 are larger than 6/10 and 3/10, so
        # boxes and recalls of exactly these values would be missed
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
        class_metrics=True,
        backend="faster_coco_eval",
        sync_on_compute=False,  # every rank has all images already
    )
    metric.warn_on_many_detections = False
    metric.update([_coco_detections(image) for image in images], [_coco_truths(i) for i in images])
    result = metric.compute()
    averages = {ours: _from_coco(result[theirs].item()) for ours, theirs in COCO_AVERAGES.items()}
    per_class = [float("nan")] * num_classes
    # only classes that occur are returned, and a single one without its dimension
    labels = result["classes"].reshape(-1).tolist()
    for label, ap in zip(labels, result["map_per_class"].reshape(-1).tolist(), strict=True):
        per_class[label] = _from_coco(ap)
    return averages, per_class


def voc_ap(images: Sequence[Image], num_classes: int) -> list[float]:
    """Return AP per class at IoU 0.5, area under the curve; nan for a class without truths.

    This is the computation of mmdet's `eval_map`, which cannot be called here because its pool of
    forked processes does not work with CUDA and DDP.
    """
    return [_voc_ap_of_class(images, label) for label in range(num_classes)]


def _voc_ap_of_class(images: Sequence[Image], label: int) -> float:
    num_truths = sum(int((image.truths.labels == label).sum()) for image in images)
    if num_truths == 0:
        return float("nan")
    scores, hits = [np.zeros(0, np.float32)], [np.zeros((2, 0), np.float32)]
    for image in images:
        of_label = image.detections.labels == label
        if of_label.any():
            scored = np.column_stack((image.detections.boxes, image.detections.scores))
            scored = scored[of_label].astype(np.float32)
            truths, ignored = image.truths.of(label), image.ignored.of(label)
            hits.append(np.vstack(tpfp_default(scored, truths, ignored, iou_thr=0.5)))
            scores.append(scored[:, 4])
    order = np.argsort(-np.concatenate(scores))  # as in eval_map, so ties have the same order
    true, false = np.cumsum(np.hstack(hits)[:, order], axis=1)
    precision = true / np.maximum(true + false, np.finfo(np.float32).eps)
    return float(average_precision(true / num_truths, precision, mode="area"))


def _table(kind: int, instances: Detections) -> Tensor:
    """Return the rows [n, 8] of instances of one kind, with image id 0."""
    boxes = get_box_tensor(instances.bboxes).detach().double()
    rows = boxes.new_zeros(len(boxes), COLUMNS)
    rows[:, 0] = kind
    rows[:, 2] = instances.labels
    if kind == DETECTION:
        rows[:, 3] = instances.scores.detach()
    rows[:, 4:] = boxes
    return rows


def _split(table: np.ndarray, num_classes: int) -> list[Image]:
    """Split a table [n, 8] into images, ordered by id; of repeated images the first counts."""
    blocks: dict[int, np.ndarray] = {}
    for block in np.split(table, np.flatnonzero(table[:, 0] == IMAGE))[1:]:
        blocks.setdefault(int(block[0, 1]), block)
    return [_image(blocks[image_id], num_classes) for image_id in sorted(blocks)]


def _image(block: np.ndarray, num_classes: int) -> Image:
    """Group the rows [n, 8] of one image by kind."""
    detections, truths, ignored = (block[block[:, 0] == kind] for kind in range(1, 4))
    agnostic = np.repeat(ignored[ignored[:, 2] < 0], num_classes, axis=0)
    agnostic[:, 2] = np.arange(len(agnostic)) % num_classes
    ignored = np.concatenate((ignored[ignored[:, 2] >= 0], agnostic))
    rows = (detections, truths, ignored)
    return Image(*(Boxes(row[:, 4:], row[:, 2].astype(int), row[:, 3]) for row in rows))


def _coco_detections(image: Image) -> dict[str, Tensor]:
    detections = image.detections
    return {
        "boxes": torch.from_numpy(detections.boxes),
        "scores": torch.from_numpy(detections.scores),
        "labels": torch.from_numpy(detections.labels),
    }


def _coco_truths(image: Image) -> dict[str, Tensor]:
    both = (image.truths, image.ignored)
    crowd = np.repeat([0, 1], [len(boxes.labels) for boxes in both])
    return {
        "boxes": torch.from_numpy(np.concatenate([boxes.boxes for boxes in both])),
        "labels": torch.from_numpy(np.concatenate([boxes.labels for boxes in both])),
        "iscrowd": torch.from_numpy(crowd),
    }


def _from_coco(value: float) -> float:
    """Convert -1, COCO's value if there is nothing to average, to nan."""
    return float("nan") if value < 0 else value


def _nan_mean(values: Sequence[float]) -> float:
    """Return the mean of the values that are not nan; nan if there are none."""
    present = [value for value in values if not np.isnan(value)]
    return float(np.mean(present)) if present else float("nan")
