"""Place the labels of boxes so that they overlap as little as possible."""

from collections.abc import Sequence

import numpy as np


def place_tags(
    corners: np.ndarray, widths: Sequence[float], height: float, size: tuple[float, float]
) -> np.ndarray:
    """Place a tag at each box: above it, else below or inside, where there is space.

    Tags are placed in the order of the boxes, so pass the most important ones first. If there is no
    free position, the one with the smallest overlap is used.

    Args:
        corners: [n, 4] boxes (x1, y1, x2, y2).
        widths: n widths of the tags, in the unit of the boxes.
        height: height of all tags.
        size: (height, width) of the image; tags are inside if they fit.

    Returns:
        [n, 4] rectangles of the tags (x1, y1, x2, y2).
    """
    placed = np.zeros((0, 4))
    for box, width in zip(corners, widths, strict=True):
        positions = _positions(box, width, height, size)
        best = int(np.argmin([_overlap(position, placed) for position in positions]))
        placed = np.vstack([placed, positions[best]])
    return placed


def _positions(
    box: np.ndarray, width: float, height: float, size: tuple[float, float]
) -> list[np.ndarray]:
    """Return rectangles around a box, shifted into the image, in order of preference."""
    x1, y1, x2, y2 = (float(value) for value in box)
    left, right = x1, x2 - width
    starts = [(left, y1 - height), (right, y1 - height), (left, y2), (right, y2)]
    starts += [(left, y1), (right, y1), (left, y2 - height), (right, y2 - height)]
    starts += [(x2, y1), (x1 - width, y1)]
    fitted = [
        (max(0.0, min(x, size[1] - width)), max(0.0, min(y, size[0] - height))) for x, y in starts
    ]
    return [np.array([x, y, x + width, y + height]) for x, y in fitted]


def _overlap(tag: np.ndarray, others: np.ndarray) -> float:
    """Return the area of overlap of a rectangle [4] with others [k, 4]."""
    low, high = np.maximum(tag[:2], others[:, :2]), np.minimum(tag[2:], others[:, 2:])
    return float(np.clip(high - low, 0, None).prod(axis=1).sum())
