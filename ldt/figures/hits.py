"""Match detections with ground-truth objects."""

import numpy as np
import torch
from torchvision.ops import box_iou

IOU = 0.5


def hits(
    truth: np.ndarray, truth_labels: np.ndarray, found: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Return a bool array [n] of the objects that are matched by a detection of their class.

    Detections are matched in the given order, so pass those with high scores first. Each is matched
    with the unmatched object of its class that has the largest IoU, if this is at least 0.5.

    Args:
        truth: [n, 4] corners of the objects.
        truth_labels: [n].
        found: [k, 4] corners of the detections.
        labels: [k] labels of the detections.
    """
    matched = np.zeros(len(truth), dtype=bool)
    detections, objects = torch.as_tensor(found).double(), torch.as_tensor(truth).double()
    overlaps = box_iou(detections, objects).nan_to_num().numpy()  # nan: both boxes are empty
    overlaps[labels[:, None] != truth_labels[None]] = 0
    for row in overlaps:
        row = np.where(matched, 0, row)
        if len(row) and row.max() >= IOU:
            matched[row.argmax()] = True
    return matched
