"""Places for the labels of boxes, so that they hide each other as little as can be."""

from collections.abc import Sequence

import numpy as np


def place_tags(
    corners: np.ndarray, widths: Sequence[float], height: float, size: tuple[int, int]
) -> np.ndarray:
    """Lay a tag at each box: above it, else below, else inside, wherever there is room.

    Boxes are served in order, so give the most important ones first. Where every place is taken,
    the one with the least overlap is used.

    Args:
        corners: [n, 4] boxes (x1, y1, x2, y2).
        widths: n widths of the tags, in the unit of the boxes.
        height: of every tag.
        size: (height, width) of the image; tags stay inside if they fit at all.

    Returns:
        [n, 4] rectangles of the tags (x1, y1, x2, y2).
    """
    placed = np.zeros((0, 4))
    for box, width in zip(corners, widths, strict=True):
        options = _options(box, width, height, size)
        free = int(np.argmin([_overlap(option, placed) for option in options]))
        placed = np.vstack([placed, options[free]])
    return placed


def _options(
    box: np.ndarray, width: float, height: float, size: tuple[int, int]
) -> list[np.ndarray]:
    """Rectangles around a box, moved into the image, the preferred one first."""
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
    """Area that a rectangle [4] shares with others [k, 4]."""
    low, high = np.maximum(tag[:2], others[:, :2]), np.minimum(tag[2:], others[:, 2:])
    return float(np.clip(high - low, 0, None).prod(axis=1).sum())
