"""Which classes a detector confuses."""

from collections.abc import Sequence

import numpy as np
import torch
from torchvision.ops import box_iou

from ldt.evaluation.detection_rows import Image
from ldt.evaluation.metrics import VOC_IOU, within_ignored

SCORE = 0.3  # detections below count as not found


def confusion_matrix(
    images: Sequence[Image], num_classes: int, score: float = SCORE, iou: float = VOC_IOU
) -> np.ndarray:
    """Count objects by their class and the class that they are detected as.

    Pairs of an object and a detection are matched by decreasing IoU, whatever their classes, each
    object and each detection once. Detections that match no object count as background, unless they
    lie in an ignored region.

    Args:
        images: detections and ground truth.
        num_classes: number of classes.
        score: least score of a detection that counts.
        iou: least IoU of a match.

    Returns:
        [num_classes + 1, num_classes + 1], a row per true class, a column per detected class; the
        last row has detections of the background, the last column missed objects.
    """
    counts = np.zeros((num_classes + 1, num_classes + 1), int)
    for image in images:
        found = image.detections.scores >= score
        boxes, labels = image.detections.boxes[found], image.detections.labels[found]
        truths = image.truths
        overlaps = box_iou(torch.from_numpy(boxes), torch.from_numpy(truths.boxes)).numpy()
        pairs = _matches(overlaps, iou)
        for detection, truth in pairs:
            counts[truths.labels[truth], labels[detection]] += 1
        missed = np.delete(truths.labels, [truth for _, truth in pairs])
        counts[:-1, -1] += np.bincount(missed, minlength=num_classes)
        spare = np.ones(len(boxes), bool)
        spare[[detection for detection, _ in pairs]] = False
        for label in range(num_classes):
            of_label = boxes[spare & (labels == label)]
            ignored = image.ignored.boxes[image.ignored.labels == label]
            counts[num_classes, label] += int((~within_ignored(of_label, ignored)).sum())
    return counts


def _matches(overlaps: np.ndarray, least: float) -> list[tuple[int, int]]:
    """Return pairs (row, column) of decreasing overlap, each row and column once."""
    rows, columns = np.nonzero(overlaps >= least)
    order = np.argsort(-overlaps[rows, columns], kind="stable")
    pairs: list[tuple[int, int]] = []
    used: tuple[set[int], set[int]] = (set(), set())
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if row not in used[0] and column not in used[1]:
            pairs.append((row, column))
            used[0].add(row)
            used[1].add(column)
    return pairs
