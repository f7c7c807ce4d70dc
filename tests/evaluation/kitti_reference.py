"""KITTI's AP, box by box, as its development kit computes it; and samples to compute it of."""

import random
from typing import Any

import torch
from detections import overlap, sample

from ldt.data.kitti import KittiObject

CLASSES = ("Cyclist", "Car", "Tram", "Pedestrian")  # not all of the benchmark, nor in its order
TYPES = (
    "Car",
    "Car",
    "Van",
    "Truck",
    "Pedestrian",
    "Pedestrian",
    "Person_sitting",
    "Cyclist",
    "Cyclist",
)
HEIGHTS = (20, 25, 26, 40, 41, 60, 90)
MIN_HEIGHT = {"easy": 40, "moderate": 25, "hard": 25}
MAX_OCCLUSION = {"easy": 0, "moderate": 1, "hard": 2}
MAX_TRUNCATION = {"easy": 0.15, "moderate": 0.3, "hard": 0.5}
MIN_OVERLAP = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
NEIGHBOUR = {"Car": "Van", "Pedestrian": "Person_sitting", "Cyclist": None}


def role_of_object(item, name, level):
    """'counts', 'ignored' or None, of an object."""
    height = item.labelled[3] - item.labelled[1]
    hard = (
        item.occlusion > MAX_OCCLUSION[level]
        or item.truncation > MAX_TRUNCATION[level]
        or height <= MIN_HEIGHT[level]
    )
    if item.name == name:
        return "ignored" if hard else "counts"
    return "ignored" if item.name == NEIGHBOUR[name] else None


def role_of_detection(found, name, level):
    """'counts', 'ignored' or None, of a (box, name, score); the height comes before the class."""
    box, kind, _ = found
    if int(abs(box[3] - box[1])) < MIN_HEIGHT[level]:
        return "ignored"
    return "counts" if kind == name else None


def statistics(objects, detections, name, level, threshold) -> tuple[list[float], int]:
    """(scores of true detections, number of false ones) of one image.

    Without a threshold an object takes the detection with the highest score, with one the
    detection that overlaps it most.
    """
    used, true = set(), []
    roles = [role_of_detection(found, name, level) for found in detections]
    active = [threshold is None or score >= threshold for *_, score in detections]
    for item in objects:
        role = role_of_object(item, name, level)
        if role is None:
            continue
        chosen, highest, most, took_ignored = None, None, 0.0, False
        for index, (box, _, score) in enumerate(detections):
            if roles[index] is None or index in used or not active[index]:
                continue
            share = overlap(box, item.labelled)
            if share <= MIN_OVERLAP[name]:
                continue
            if threshold is None:
                if highest is None or score > highest:
                    chosen, highest = index, score
            elif roles[index] == "counts" and (share > most or took_ignored):
                chosen, most, took_ignored = index, share, False
            elif chosen is None and roles[index] == "ignored":
                chosen, took_ignored = index, True
        if chosen is not None:
            used.add(chosen)
            if role == roles[chosen] == "counts":
                true.append(detections[chosen][2])
    left = [i for i, role in enumerate(roles) if role == "counts" and active[i] and i not in used]
    regions = [item.labelled for item in objects if item.name == "DontCare"]
    false = [
        index
        for index in left
        if not any(overlap(detections[index][0], r, True) > MIN_OVERLAP[name] for r in regions)
    ]
    return true, len(false)


def thresholds_of(scores, count):
    """The scores at which the recall comes nearest to the next of 41 positions."""
    scores, chosen, recall = sorted(scores, reverse=True), [], 0.0
    for i, score in enumerate(scores):
        last = i == len(scores) - 1
        left = (i + 1) / count
        right = left if last else (i + 2) / count
        if right - recall < recall - left and not last:
            continue
        chosen.append(score)
        recall += 1 / 40
    return chosen


def average_precision(frames, name, level):
    """AP40 of a class, from frames of (objects, detections); None if no object counts."""
    every = [item for objects, _ in frames for item in objects]
    count = sum(role_of_object(item, name, level) == "counts" for item in every)
    if count == 0:
        return None

    def results(threshold):
        return [statistics(image, found, name, level, threshold) for image, found in frames]

    precision = [0.0] * 41
    scores = [score for true, _ in results(None) for score in true]
    for position, threshold in enumerate(thresholds_of(scores, count)):
        true = sum(len(true) for true, _ in results(threshold))
        false = sum(false for _, false in results(threshold))
        precision[position] = true / (true + false) if true + false else 0.0
    return sum(max(precision[position:]) for position in range(1, 41)) / 40


def kitti_ap(samples: list[Any], classes=CLASSES) -> dict[str, float]:
    """The keys of our metric, computed slowly."""
    frames = []
    for s in samples:
        found = s.pred_instances
        names = [classes[label] for label in found.labels.tolist()]
        found = zip(found.bboxes.tolist(), names, found.scores.tolist(), strict=True)
        frames.append((s.kitti, list(found)))
    result = {}
    for level in MIN_HEIGHT:
        known = {
            name: average_precision(frames, name, level) for name in classes if name in MIN_OVERLAP
        }
        values = [value for value in known.values() if value is not None]
        result[f"kitti_{level}"] = sum(values) / len(values) if values else float("nan")
        for name, value in known.items():
            result[f"kitti_{level}/{name}"] = float("nan") if value is None else value
    return result


def random_object(draw: random.Random) -> KittiObject:
    """An object at an integer place, of a height around the limits."""
    x, y, height = draw.randint(0, 900), draw.randint(0, 250), draw.choice(HEIGHTS)
    box = (float(x), float(y), float(x + draw.choice((20, 40, 80))), float(y + height))
    name = draw.choice(TYPES)
    truncation = draw.choice((0.0, 0.0, 0.0, 0.15, 0.2, 0.4, 0.6))
    return KittiObject(name, box, box, truncation, draw.choice((0, 0, 0, 1, 2, 3)))


def kitti_samples(seed: int, n: int = 25) -> list[Any]:
    """Images with objects, DontCare regions, and detections near, small, false and double."""
    draw, samples = random.Random(seed), []
    for image in range(n):
        objects = [random_object(draw) for _ in range(draw.randint(0, 9))]
        for _ in range(draw.randint(0, 2)):
            x, y = draw.randint(0, 800), draw.randint(0, 200)
            box = (float(x), float(y), x + 200.0, y + 150.0)
            objects.append(KittiObject("DontCare", box, box, -1.0, -1))
        boxes, labels = [], []
        for item in objects + [random_object(draw) for _ in range(2)]:
            for _ in range(draw.choice((0, 1, 1, 1, 2))):
                shift = draw.choice((0, 0, 0, 1, 2, 4))
                boxes.append([side + shift * draw.choice((-1, 1)) for side in item.labelled])
                own = {"Van": "Car", "Truck": "Tram", "Person_sitting": "Pedestrian"}
                name = own.get(item.name, item.name)
                wrong = name not in CLASSES or draw.random() < 0.15
                labels.append(draw.randrange(4) if wrong else CLASSES.index(name))
        scores = torch.tensor([draw.randint(1, 50) / 50 for _ in boxes])  # with ties
        found = torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels).long(), scores
        truths = [item for item in objects if item.name in CLASSES]
        truth = torch.tensor([item.box for item in truths]).reshape(-1, 4)
        classes = torch.tensor([CLASSES.index(item.name) for item in truths]).long()
        samples.append(sample(1000 + image, found, (truth, classes), kitti=objects))
    return samples
