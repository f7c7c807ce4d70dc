"""Compare the detections of an exported file with mmdet's."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ldt.detectors.adapter import Detector
from ldt.detectors.forward import evaluating, one_image
from ldt.objects import corners
from ldt.runtimes.detection_graph import RawGraph
from ldt.runtimes.sessions import Session

BOX, SCORE = 0.1, 1e-3  # pixels and score that a file may differ by
TIES = 0.01  # share of boxes that others of equal score may stand for, or none


class Found(NamedTuple):
    """The detections of an image: boxes [n, 4], scores [n] and labels [n], best first."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


@dataclass
class Differences:
    """The largest differences over all images.

    Attributes:
        images, boxes: how many were compared.
        box: in pixels of the network's input.
        score: of boxes, or of raw maps in relation to their largest value.
        ties: boxes in whose place there is another one of equal score.
        missing: boxes that only one of the two has.
    """

    images: int = 0
    boxes: int = 0
    box: float = 0.0
    score: float = 0.0
    ties: int = 0
    missing: int = 0

    @property
    def small(self) -> bool:
        """Whether the file computes the same."""
        few = TIES * self.boxes
        swapped = self.ties <= max(1, few) and self.missing <= few
        return self.box <= BOX and self.score <= SCORE and swapped

    def __str__(self) -> str:
        told = f"{self.images} images: largest difference of a score {self.score:.1e}"
        if not self.boxes:
            return f"{told}, no box"
        ties = f", {self.ties} of equal score swapped" if self.ties else ""
        ties += f", {self.missing} missing" if self.missing else ""
        return f"{told}, of a box {self.box:.1e} px, {self.boxes} boxes{ties}"

    def add(self, expected: Found, found: Found, floor: float = 0.0) -> None:
        """Add an image: every box of one with that of the other which is nearest to it.

        Args:
            expected: mmdet's detections.
            found: those of the file.
            floor: a box of this score may or may not be there.
        """
        self.images += 1
        self.boxes += len(expected.scores)
        for label in np.unique(np.concatenate([expected.labels, found.labels])):
            mine, theirs = (_of_label(each, label) for each in (expected, found))
            moved = np.abs(mine.boxes[:, None] - theirs.boxes[None]).max(2, initial=0)
            rescored = np.abs(mine.scores[:, None] - theirs.scores[None])
            rows, columns = linear_sum_assignment(moved / BOX + rescored / SCORE)
            for row, column in zip(rows, columns, strict=True):
                self.score = max(self.score, float(rescored[row, column]))
                if moved[row, column] > BOX and rescored[row, column] <= SCORE:
                    self.ties += 1
                else:
                    self.box = max(self.box, float(moved[row, column]))
            for each, paired in ((mine, rows), (theirs, columns)):
                alone = np.delete(each.scores, paired)
                self.missing += int((alone > floor + SCORE).sum())

    def add_maps(self, expected: list[np.ndarray], found: list[np.ndarray]) -> None:
        """Add the raw maps of an image."""
        self.images += 1
        for mine, theirs in zip(expected, found, strict=True):
            largest = max(1.0, float(np.abs(mine).max()))
            self.score = max(self.score, float(np.abs(mine - theirs).max()) / largest)


def _of_label(found: Found, label: int) -> Found:
    own = found.labels == label
    return Found(found.boxes[own], found.scores[own], found.labels[own])


def compare(detector: Detector, session: Session, images: list[Tensor]) -> Differences:
    """Compare a file with the detector that it was exported from.

    Args:
        detector: on the CPU.
        session: the file.
        images: each [1, 3, H, W], of the file's size.
    """
    differences, about = Differences(), session.about
    with evaluating(detector.model), torch.no_grad():
        for image in images:
            outputs = session(image.numpy())
            if about.outputs == "raw":
                maps = RawGraph(detector, about.shape)(image)
                differences.add_maps([each.numpy() for each in maps], outputs)
            else:
                most = about.max_detections
                expected = detected(detector, image, most)
                full = len(expected.scores) == most  # then another one may be the last
                floor = float(expected.scores[-1]) if full else about.threshold or 0.0
                differences.add(expected, of_outputs(outputs), floor)
    return differences


def of_outputs(outputs: list[np.ndarray]) -> Found:
    """Return the detections among the outputs of a graph."""
    boxes, scores, labels = (output[0] for output in outputs)
    there = scores > 0
    return Found(boxes[there], scores[there], labels[there])


def detected(detector: Detector, image: Tensor, most: int) -> Found:
    """Return mmdet's own detections in an image [1, 3, H, W], in pixels of it."""
    size = (int(image.shape[2]), int(image.shape[3]))
    (sample,) = detector.predict(one_image(image[0], size))
    found: Any = sample.pred_instances
    order = found.scores.argsort(descending=True)[:most]
    chosen = (corners(found)[order], found.scores[order], found.labels[order])
    return Found(*(each.numpy() for each in chosen))
