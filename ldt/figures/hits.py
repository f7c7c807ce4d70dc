"""Which annotated objects were found."""

import numpy as np

IOU = 0.5


def hits(
    truth: np.ndarray, truth_labels: np.ndarray, found: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Bool [n], True for the objects that a detection of their class covers.

    Detections are served in order, so give the surest first; each takes the object of its class
    that it overlaps most, if their intersection over union is 0.5 or more and nobody took it.

    Args:
        truth: [n, 4] corners of the objects.
        truth_labels: [n].
        found: [k, 4] corners of the detections.
        labels: [k].
    """
    taken = np.zeros(len(truth), dtype=bool)
    overlaps = _overlaps(found, truth)
    overlaps[labels[:, None] != truth_labels[None]] = 0
    for row in overlaps:
        row = np.where(taken, 0, row)
        if len(row) and row.max() >= IOU:
            taken[row.argmax()] = True
    return taken


def _overlaps(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [k, 4] and [n, 4]: [k, n]."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = (high - low).clip(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(-1) for boxes in (one, other)]
    union = areas[0][:, None] + areas[1][None] - shared
    return shared / np.maximum(union, 1e-9)
