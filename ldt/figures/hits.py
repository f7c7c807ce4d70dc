"""Which annotated objects were found."""

import numpy as np
import torch
from torchvision.ops import box_iou

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
    one, other = torch.as_tensor(found).double(), torch.as_tensor(truth).double()
    overlaps = box_iou(one, other).nan_to_num().numpy()  # nan: both are empty
    overlaps[labels[:, None] != truth_labels[None]] = 0
    for row in overlaps:
        row = np.where(taken, 0, row)
        if len(row) and row.max() >= IOU:
            taken[row.argmax()] = True
    return taken
