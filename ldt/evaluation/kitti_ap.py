"""KITTI's official AP of 2-D boxes with 40 recall positions, by the rules of its development kit.

Rules (Geiger et al., CVPR 2012; https://www.cvlibs.net/datasets/kitti/eval_object.php):

- An object counts at a difficulty if it is higher than a minimum and not occluded or truncated too
  much. Others of its class, and those of the neighbouring class, are ignored: they may be detected
  or not. Objects of further types are absent.
- Detections below the minimum height are ignored, whatever their class: one that is matched keeps
  its object from being missed.
- A detection that is left over is false, unless most of it lies in a DontCare region.
- Precision is taken at the scores at which the recall passes the nearest to 0, 1/40, ... 1, then
  made monotone. AP is the mean over all positions but the first. Therefore a class with n < 41
  objects has an AP of (n - 1)/40 at most.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from mmdet.structures.bbox import bbox_overlaps

from ldt.data.kitti_labels import TYPES
from ldt.evaluation.detection_rows import Image, KittiObjects


class Difficulty(NamedTuple):
    """Limits of the objects that count."""

    height: float
    occlusion: int
    truncation: float


class Rule(NamedTuple):
    """Overlap that a match of a class must exceed, and the class that is ignored beside it."""

    overlap: float
    neighbour: str | None = None


DIFFICULTIES = {
    "easy": Difficulty(40, 0, 0.15),
    "moderate": Difficulty(25, 1, 0.3),
    "hard": Difficulty(25, 2, 0.5),
}
RULES = {
    "Car": Rule(0.7, "Van"),
    "Pedestrian": Rule(0.5, "Person_sitting"),
    "Cyclist": Rule(0.5),
}
POSITIONS = 41
ABSENT, IGNORED, COUNTED = range(3)


class Frame(NamedTuple):
    """One image.

    Attributes:
        labels, scores, heights: [D] of the detections.
        objects: the labelled objects, G of them.
        overlaps: [D, G] intersection over union.
        inside: [D] largest share of a detection that lies in one DontCare region.
    """

    labels: np.ndarray
    scores: np.ndarray
    heights: np.ndarray
    objects: KittiObjects
    overlaps: np.ndarray
    inside: np.ndarray


class Pairs(NamedTuple):
    """Detections and objects of one image that have a role at one difficulty of one class.

    Attributes:
        scores, inside: [D] as in `Frame`.
        detections: [D] whether a detection counts; the others are ignored.
        objects: [G] whether an object counts; the others are ignored.
        overlaps: [D, G] intersection over union; 0 where it does not suffice.
    """

    scores: np.ndarray
    inside: np.ndarray
    detections: np.ndarray
    objects: np.ndarray
    overlaps: np.ndarray


def kitti_ap(images: Sequence[Image], classes: Sequence[str]) -> dict[str, float]:
    """Return `kitti_<difficulty>/<class>` of KITTI's classes among `classes`, and their means.

    Classes without objects that count are nan. There is no key at all if no image has KITTI's
    annotations, or none of the classes is one of KITTI's benchmark.
    """
    frames = [_frame(image, image.kitti) for image in images if image.kitti is not None]
    evaluated = [name for name in classes if name in RULES]
    if not frames or not evaluated:
        return {}
    means, per_class = {}, {}
    for level, difficulty in DIFFICULTIES.items():
        values = [_ap(frames, classes.index(name), name, difficulty) for name in evaluated]
        means[f"kitti_{level}"] = mean_of_known(values)
        keys = (f"kitti_{level}/{name}" for name in evaluated)
        per_class |= dict(zip(keys, values, strict=True))
    return means | per_class


def mean_of_known(values: Sequence[float]) -> float:
    """Return the mean of the values that are not nan; nan if there are none."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _frame(image: Image, objects: KittiObjects) -> Frame:
    found = image.detections
    boxes, labelled = torch.from_numpy(found.boxes), torch.from_numpy(objects.boxes)
    regions = labelled[torch.from_numpy(objects.types) == TYPES.index("DontCare")]
    inside = bbox_overlaps(boxes, regions, mode="iof").numpy()
    return Frame(
        found.labels,
        found.scores,
        np.abs(found.boxes[:, 3] - found.boxes[:, 1]),
        objects,
        bbox_overlaps(boxes, labelled).numpy(),
        inside.max(axis=1, initial=0),
    )


def _ap(frames: Sequence[Frame], label: int, name: str, difficulty: Difficulty) -> float:
    """Return the AP of one class at one difficulty; nan if no object counts."""
    rule = RULES[name]
    pairs = [_pairs(frame, label, name, difficulty) for frame in frames]
    count = sum(int(each.objects.sum()) for each in pairs)
    if count == 0:
        return float("nan")
    pairs = [each for each in pairs if len(each.scores)]
    hits = [_hit_scores(each) for each in pairs]
    thresholds = _thresholds(np.sort(np.concatenate((np.zeros(0), *hits)))[::-1], count)
    true, false = np.zeros(len(thresholds)), np.zeros(len(thresholds))
    for each in pairs:
        in_image = _count(each, thresholds, rule.overlap)
        true, false = true + in_image[0], false + in_image[1]
    precision = np.zeros(POSITIONS)
    precision[: len(thresholds)] = true / np.maximum(true + false, 1)
    return float(np.maximum.accumulate(precision[::-1])[::-1][1:].mean())


def _pairs(frame: Frame, label: int, name: str, difficulty: Difficulty) -> Pairs:
    """Select what has a role for a class at a difficulty."""
    rule, objects = RULES[name], frame.objects
    small = frame.heights < difficulty.height
    chosen = small | (frame.labels == label)
    too_hard = (
        (objects.occlusions > difficulty.occlusion)
        | (objects.truncations > difficulty.truncation)
        | (objects.boxes[:, 3] - objects.boxes[:, 1] <= difficulty.height)
    )
    roles = np.where(too_hard, IGNORED, COUNTED)
    roles[objects.types != TYPES.index(name)] = ABSENT
    if rule.neighbour is not None:
        roles[objects.types == TYPES.index(rule.neighbour)] = IGNORED
    overlaps = frame.overlaps[np.ix_(chosen, roles != ABSENT)]
    return Pairs(
        frame.scores[chosen],
        frame.inside[chosen],
        ~small[chosen],
        roles[roles != ABSENT] == COUNTED,
        np.where(overlaps > rule.overlap, overlaps, 0.0),
    )


def _hit_scores(pairs: Pairs) -> np.ndarray:
    """Return the scores of true detections if every object takes the highest score in reach."""
    free = np.ones((1, len(pairs.scores)), bool)
    ranks = np.repeat(pairs.scores[:, None], len(pairs.objects), axis=1)
    hit = _match(pairs, free, ranks)[0]
    true = pairs.objects & (hit >= 0) & pairs.detections[hit]
    return pairs.scores[hit[true]]


def _thresholds(scores: np.ndarray, count: int) -> list[float]:
    """Return the scores, of the descending `scores`, nearest to the wanted recalls of `count`."""
    thresholds, wanted = [], 0.0
    for index, score in enumerate(scores):
        here, following = (index + 1) / count, (index + 2) / count
        if index + 1 < len(scores) and following - wanted < wanted - here:
            continue
        thresholds.append(float(score))
        wanted += 1 / (POSITIONS - 1)
    return thresholds


def _count(
    pairs: Pairs, thresholds: Sequence[float], overlap: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the true and the false detections [T] from each of T scores on.

    Every object takes the detection that overlaps it most, an ignored one only if there is no
    other.
    """
    free = pairs.scores >= np.asarray(thresholds)[:, None]
    ranks = np.where(pairs.detections[:, None], 1 + pairs.overlaps, 1.0)
    hit = _match(pairs, free, ranks)
    true = pairs.objects & (hit >= 0) & pairs.detections[hit]
    false = free & pairs.detections & ~(pairs.inside > overlap)
    return true.sum(axis=1), false.sum(axis=1)


def _match(pairs: Pairs, free: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Assign to the objects, one after another, the free detection of the highest rank in reach.

    Args:
        pairs: detections and objects.
        free: [T, D] detections that are available, in T independent settings; changed in place.
        ranks: [D, G]; of equal ones the first detection is taken.

    Returns:
        [T, G], the index of each object's detection, or -1.
    """
    hit = np.full((len(free), len(pairs.objects)), -1)
    for index, overlaps in enumerate(pairs.overlaps.T):
        near = np.flatnonzero(overlaps)
        if not len(near):
            continue
        available = free[:, near]
        best = near[np.where(available, ranks[near, index], -np.inf).argmax(axis=1)]
        found = available.any(axis=1)
        hit[found, index] = best[found]
        free[found, best[found]] = False
    return hit
