"""COCO's AP of many resamplings of the same images, from detections that are matched once.

A detection is matched within its image only, so resampling images changes the weights of
detections and objects and nothing else: AP is computed for all resamplings at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from mmdet.structures.bbox import bbox_overlaps

from ldt.evaluation.detection_rows import Boxes, Image
from ldt.evaluation.metrics import IOUS, MAX_DETECTIONS, RECALLS

TINY = np.spacing(1.0)
BLOCK = 64  # resamplings at once, for memory


class ClassMatches(NamedTuple):
    """Detections of one class in the order of their scores, the highest first.

    Attributes:
        images: index of the image of each detection, [n].
        true: whether it matches an object, per IoU threshold, [10, n].
        false: whether it is a false positive; neither is ignored, [10, n].
        objects: number of objects in each image, [images].
    """

    images: np.ndarray
    true: np.ndarray
    false: np.ndarray
    objects: np.ndarray


@dataclass(frozen=True)
class Matches:
    """All detections of a validation, matched with the ground truth.

    Attributes:
        count: number of images.
        classes: one entry per class that has objects.
    """

    count: int
    classes: list[ClassMatches]


def match(
    images: Sequence[Image], num_classes: int, max_detections: int = MAX_DETECTIONS
) -> Matches:
    """Match detections with objects as COCO does, for objects of all sizes."""
    found = [_match_class(images, label, max_detections) for label in range(num_classes)]
    return Matches(len(images), [each for each in found if each.objects.any()])


def _match_class(images: Sequence[Image], label: int, most: int) -> ClassMatches:
    places, scores, hits = [], [], []
    objects = np.zeros(len(images))
    for place, image in enumerate(images):
        truths = _of(image.truths, label)
        objects[place] = len(truths)
        own = image.detections.labels == label
        if not own.any():
            continue
        order = np.argsort(-image.detections.scores[own], kind="stable")[:most]
        boxes = image.detections.boxes[own][order]
        hits.append(_match_image(boxes, truths, _of(image.ignored, label)))
        scores.append(image.detections.scores[own][order])
        places.append(np.full(len(order), place))
    if not hits:
        none = np.zeros((len(IOUS), 0), bool)
        return ClassMatches(np.zeros(0, int), none, none, objects)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    true, false = np.concatenate(hits, axis=2)[..., order]
    return ClassMatches(np.concatenate(places)[order], true, false, objects)


def _of(boxes: Boxes, label: int) -> np.ndarray:
    return boxes.boxes[boxes.labels == label]


def _match_image(boxes: np.ndarray, truths: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Return which detections [n, 4], best first, are true and which false: [2, 10, n]."""
    overlaps = _overlaps(boxes, truths, "iou")
    inside = _overlaps(boxes, ignored, "iof").max(axis=1, initial=0.0)
    thresholds = np.minimum(IOUS, 1 - 1e-10)
    true = np.zeros((len(IOUS), len(boxes)), bool)
    if len(truths):
        free = np.ones((len(IOUS), len(truths)), bool)
        rows = np.arange(len(IOUS))
        for number, own in enumerate(overlaps):
            allowed = np.where(free & (own >= thresholds[:, None]), own, -1.0)
            best = len(truths) - 1 - allowed[:, ::-1].argmax(axis=1)  # the last of equal ones
            hit = allowed[rows, best] >= 0
            true[:, number] = hit
            free[rows[hit], best[hit]] = False
    return np.stack([true, ~true & (inside < thresholds[:, None])])


def _overlaps(boxes: np.ndarray, others: np.ndarray, mode: str) -> np.ndarray:
    if not len(others):
        return np.zeros((len(boxes), 0))
    return bbox_overlaps(torch.from_numpy(boxes), torch.from_numpy(others), mode=mode).numpy()


def average_precision(matches: Matches, weights: np.ndarray | None = None) -> np.ndarray:
    """Return COCO's AP for each weighting of the images, nan where no object has weight: [B].

    Args:
        matches: of a validation.
        weights: how often each image occurs, [B, images]; None: once, B = 1.
    """
    if weights is None:
        weights = np.ones((1, matches.count))
    blocks = [weights[start : start + BLOCK] for start in range(0, len(weights), BLOCK)]
    return np.concatenate([_of_block(matches, block.astype(np.float32)) for block in blocks])


def _of_block(matches: Matches, weights: np.ndarray) -> np.ndarray:
    total, known = np.zeros(len(weights)), np.zeros(len(weights))
    for each in matches.classes:
        objects = weights @ each.objects.astype(np.float32)
        there = objects > 0
        total += np.where(there, _ap_of_class(each, weights, objects), 0.0)
        known += there
    with np.errstate(invalid="ignore"):
        return total / known


def _ap_of_class(matches: ClassMatches, weights: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Return AP per weighting; ``objects`` is the number of objects in each, [B]."""
    if not len(matches.images):
        return np.zeros(len(weights))
    own, total = weights[:, matches.images], np.zeros(len(weights))
    reached = _needed(np.maximum(objects, 1).astype(np.float64)[:, None])
    for true, false in zip(matches.true, matches.false, strict=True):
        used = true | false
        hits, both = np.cumsum(own[:, used] * true[used], 1), np.cumsum(own[:, used], 1)
        if not hits.shape[1]:
            continue
        precision = hits / (both + TINY)
        curve = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # one search for all rows: each is shifted above the one before
        above = np.arange(len(hits))[:, None] * (float(hits.max()) + objects.max() + 2)
        places = np.searchsorted((hits + above).ravel(), (reached + above).ravel())
        places = places.reshape(reached.shape) - np.arange(len(hits))[:, None] * hits.shape[1]
        inside = places < hits.shape[1]
        found = np.take_along_axis(curve, np.minimum(places, hits.shape[1] - 1), axis=1)
        total += np.where(inside, found, 0.0).sum(axis=1)
    return total / (len(IOUS) * len(RECALLS))


def _needed(objects: np.ndarray) -> np.ndarray:
    """Return how many objects [B, 1] must be found for each recall, by COCO's comparison."""
    counts = np.ceil(RECALLS * objects - 1e-6)
    return counts + (counts / objects < RECALLS)  # where rounding makes an exact share miss
