"""Detection accuracy: COCO AP, VOC-style mAP and KITTI's AP of the same detections."""

from collections.abc import Sequence

import numpy as np
import torch
from mmdet.evaluation.functional.mean_ap import average_precision, tpfp_default
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.utilities import rank_zero_warn

from ldt.config.values import Count, check_value
from ldt.evaluation.detection_rows import COLUMNS, Image, images_of, rows_of
from ldt.evaluation.kitti_ap import kitti_ap, mean_of_known

MAX_DETECTIONS = 100  # COCO's
VOC_IOU = 0.5
# In float64: torchmetrics' own lists are float32, whose 0.6 and 0.3 are larger than 6/10 and
# 3/10, so boxes and recalls of exactly these values would be missed.
IOUS, RECALLS = np.linspace(0.5, 0.95, 10), np.linspace(0.0, 1.0, 101)

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
    """COCO AP, VOC-style mAP and KITTI's AP of a detector, in total and per class.

    `compute` returns one float per key, in [0, 1], or nan if there is no ground truth (no image, no
    object of that size or class):

    - `AP` (IoU 0.50:0.95), `AP50`, `AP75`, `AP_small`, `AP_medium`, `AP_large`, `AP/<class>`:
      COCO's averages, from the best `max_detections` detections per image and class. Sizes are
      annotated areas (those of COCO's masks), or box areas where a sample has none, split at 32^2
      and 96^2 pixels.
    - `mAP`, `mAP/<class>`: area under the precision-recall curve at IoU 0.5, as computed by mmdet's
      `eval_map` (Pascal VOC since 2010), from all detections.
    - `kitti_easy`, `kitti_moderate`, `kitti_hard`, `kitti_<difficulty>/<class>`: KITTI's official
      AP (see `ldt.evaluation.kitti_ap`), if the annotations are KITTI's, of those of its three
      classes that are among `classes`.

    In AP and mAP, a detection that matches no object is not false if enough of its own area lies in
    an ignored box, as for COCO's crowds and KITTI's DontCare. A box with a class label is ignored
    for this class, one with a negative label for all classes.

    Results do not depend on the number of ranks or the sampler's padding: the tables of all ranks
    are concatenated, each image id counts once, and images are evaluated in the order of their ids.

    Attributes:
        measured: the table of all images that `compute` has seen last, [n, COLUMNS].

    Args:
        classes: class names; label i is `classes[i]`.
        max_detections: number of detections per image and class that count for COCO's averages.

    Raises:
        ValueError: there is no class, a name is repeated, or `max_detections` is not positive.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    table: list[Tensor]

    def __init__(self, classes: Sequence[str], max_detections: int = MAX_DETECTIONS) -> None:
        super().__init__()
        if not classes or len(set(classes)) != len(classes):
            raise ValueError(
                f"classes={list(classes)}: give at least one class, each name once, for example "
                "DetectionMetrics(['Car', 'Pedestrian', 'Cyclist'])"
            )
        check_value("dataset.max_detections", max_detections, Count, MAX_DETECTIONS)
        self.classes, self.max_detections = tuple(classes), max_detections
        self._warned = False
        self.measured = np.zeros((0, COLUMNS))
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
                `ignored_instances` (bboxes [k, 4], labels [k]), `areas` [m] of the ground truth
                and `kitti`, the `KittiObject`s of a label. All boxes are (x1, y1, x2, y2) in pixels
                of the original image.

        Raises:
            ValueError: an image has no integer id, no annotation, or an unknown label.
        """
        self.table.extend(rows_of(sample, self.classes).to(self.device) for sample in data_samples)

    def compute(self) -> dict[str, float]:
        """Return the metrics by name; see the class for the keys."""
        table = torch.cat(self.table) if isinstance(self.table, list) else self.table
        self.measured = table.cpu().numpy()
        images = images_of(self.measured, len(self.classes))
        self._warn_of_crowded(images)
        averages, coco = coco_ap(images, len(self.classes), self.max_detections)
        voc = voc_ap(images, len(self.classes))
        averages["mAP"] = mean_of_known(voc)
        averages |= {f"AP/{name}": ap for name, ap in zip(self.classes, coco, strict=True)}
        averages |= {f"mAP/{name}": ap for name, ap in zip(self.classes, voc, strict=True)}
        return averages | kitti_ap(images, self.classes)

    def _warn_of_crowded(self, images: Sequence[Image]) -> None:
        """Warn, once, of images with more objects than detections that count."""
        most = max((len(image.truths.labels) for image in images), default=0)
        if most > self.max_detections and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"an image has {most} objects, but at most {self.max_detections} detections count "
                f"for AP, the others are missed; type dataset.max_detections={most} to count more"
            )


def coco_ap(
    images: Sequence[Image], num_classes: int, max_detections: int = MAX_DETECTIONS
) -> tuple[dict[str, float], list[float]]:
    """Return COCO's averages (keys of `COCO_AVERAGES`) and AP per class; nan without truths."""
    if not any(len(image.truths.labels) for image in images):
        return dict.fromkeys(COCO_AVERAGES, float("nan")), [float("nan")] * num_classes
    result = _coco_result(images, max_detections)
    averages = {ours: _from_coco(result[theirs].item()) for ours, theirs in COCO_AVERAGES.items()}
    per_class = [float("nan")] * num_classes
    # only classes that occur are returned, and a single one without its dimension
    labels = result["classes"].reshape(-1).tolist()
    for label, ap in zip(labels, result["map_per_class"].reshape(-1).tolist(), strict=True):
        per_class[label] = _from_coco(ap)
    return averages, per_class


def precision_curves(
    images: Sequence[Image], num_classes: int, max_detections: int = MAX_DETECTIONS
) -> np.ndarray:
    """Return COCO's precision by IoU, recall and class; nan for a class without truths.

    Its mean over the IoUs of `IOUS` and the recalls of `RECALLS` is AP; at the first IoU, AP50.
    """
    curves = np.full((len(IOUS), len(RECALLS), num_classes), np.nan)
    if not any(len(image.truths.labels) for image in images):
        return curves
    result = _coco_result(images, max_detections, curves=True)
    found = result["precision"][..., 0, -1].numpy()  # of areas all, of numbers of detections most
    curves[..., result["classes"].reshape(-1).tolist()] = np.where(found < 0, np.nan, found)
    return curves


def _coco_result(
    images: Sequence[Image], max_detections: int, curves: bool = False
) -> dict[str, Tensor]:
    """Return torchmetrics' result; with ``curves`` also precision and recall."""
    metric = MeanAveragePrecision(
        iou_type="bbox",
        iou_thresholds=IOUS.tolist(),
        rec_thresholds=RECALLS.tolist(),
        max_detection_thresholds=[1, min(10, max_detections), max_detections],  # all in use: last
        class_metrics=True,
        extended_summary=curves,
        backend="faster_coco_eval",
        sync_on_compute=False,  # every rank has all images already
    )
    metric.warn_on_many_detections = False
    metric.update([_coco_detections(image) for image in images], [_coco_truths(i) for i in images])
    return metric.compute()


def voc_ap(images: Sequence[Image], num_classes: int) -> list[float]:
    """Return AP per class at IoU 0.5, area under the curve; nan for a class without truths.

    This is the computation of mmdet's `eval_map`, which cannot be called here because its pool of
    forked processes does not work with CUDA and DDP, but for ignored boxes: `eval_map` matches them
    by IoU, so that detections within a large one are false.
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
            scored = np.column_stack((image.detections.boxes, image.detections.scores))[of_label]
            truths, ignored = (
                boxes.boxes[boxes.labels == label] for boxes in (image.truths, image.ignored)
            )
            hits.append(_true_and_false(scored, truths, ignored))
            scores.append(scored[:, 4].astype(np.float32))
    order = np.argsort(-np.concatenate(scores))  # as in eval_map, so ties have the same order
    true, false = np.cumsum(np.hstack(hits)[:, order], axis=1)
    precision = true / np.maximum(true + false, np.finfo(np.float32).eps)
    return float(average_precision(true / num_truths, precision, mode="area"))


def _true_and_false(scored: np.ndarray, truths: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Return which detections [n, 5] of an image are true and which are false, [2, n]."""
    none = np.zeros((0, 4), np.float32)
    true, false = tpfp_default(
        scored.astype(np.float32), truths.astype(np.float32), none, iou_thr=VOC_IOU
    )
    false[0, within_ignored(scored[:, :4], ignored)] = 0
    return np.vstack((true, false))


def within_ignored(boxes: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Return of which boxes [n, 4] half of the own area or more lies in an ignored box [m, 4]."""
    inside = bbox_overlaps(torch.from_numpy(boxes), torch.from_numpy(ignored), mode="iof").numpy()
    return inside.max(axis=1, initial=0) >= VOC_IOU


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
        # where it is 0, torchmetrics takes the box area
        "area": torch.from_numpy(np.concatenate([boxes.areas for boxes in both])),
    }


def _from_coco(value: float) -> float:
    """Convert -1, COCO's value if there is nothing to average, to nan."""
    return float("nan") if value < 0 else value
