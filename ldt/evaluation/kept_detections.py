"""Detections and ground truth of a validation on the disk, small, to compute statistics from later.

Coordinates are rounded to 1/128 pixel and scores to 1/65535, which moves AP by less than 0.001.
"""

from pathlib import Path

import numpy as np

from ldt.data.kitti_labels import TYPES
from ldt.evaluation.detection_rows import (
    AREA,
    BOX,
    COLUMNS,
    DETECTION,
    IGNORED,
    IMAGE,
    IMAGE_ID,
    KIND,
    KITTI,
    LABEL,
    SCORE,
    TRUNCATION,
    TRUTH,
    Image,
    images_of,
)
from ldt.runs import arrays, files

STEPS = 128  # of a pixel
SCORES = 65535
REST = slice(TRUNCATION, COLUMNS)
MOST_CLASSES = 10_000  # every ignored region is kept once per class
ARRAYS = {  # as they are written
    "classes": ("U", 1),
    "kind": ("u", 1),
    "image": ("i", 1),
    "label": ("i", 1),
    "score": ("u", 1),
    "box": ("i", 2),
    "area": ("f", 1),
    "rest": ("f", 2),
}
LARGEST = 2**30  # bytes; 40 000 images with 100 detections each take 80 MB


def save(path: Path, table: np.ndarray, classes: tuple[str, ...]) -> None:
    """Write the table of a validation.

    Args:
        path: the file, ``detections-<round>.npz``.
        table: [n, COLUMNS], see :mod:`ldt.evaluation.detection_rows`.
        classes: names in label order.
    """
    coded = {
        "classes": np.array(classes),
        "kind": table[:, KIND].astype(np.uint8),
        "image": np.diff(table[:, IMAGE_ID].astype(np.int64), prepend=0),  # mostly zeros
        "label": table[:, LABEL].astype(np.int16),
        "score": np.rint(table[:, SCORE] * SCORES).astype(np.uint16),
        # an untrained detector's boxes may be as large as floats are
        "box": np.rint(np.clip(table[:, BOX] * STEPS, -LARGEST, LARGEST)).astype(np.int32),
        "area": table[:, AREA].astype(np.float32),
        "rest": table[:, REST].astype(np.float32),
    }
    with files.writing(path) as draft, draft.open("wb") as file:
        np.savez_compressed(file, **coded)


def load(path: Path) -> tuple[list[Image], tuple[str, ...]]:
    """Return the images of a validation in the order of their ids, and the classes.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedError: it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; runs keep detections with report.detections=true")
    found = arrays.read(path, ARRAYS, LARGEST)
    with files.reading(path):
        classes = tuple(map(str, found["classes"]))
        if len(classes) > MOST_CLASSES:
            raise ValueError(f"{len(classes)} classes")
        table = np.zeros((len(found["kind"]), COLUMNS))
        for columns, values in (
            (KIND, found["kind"]),
            (LABEL, found["label"]),
            (IMAGE_ID, np.cumsum(found["image"])),
            (SCORE, found["score"] / SCORES),
            (BOX, found["box"] / STEPS),
            (AREA, found["area"]),
            (REST, found["rest"]),
        ):
            if values.shape != table[:, columns].shape:  # numpy would repeat a single row
                raise ValueError("arrays of different lengths")
            table[:, columns] = values
        _check_values(table, len(classes))
        return images_of(table, len(classes)), classes


def _check_values(table: np.ndarray, classes: int) -> None:
    """Raise ValueError for numbers that no validation has."""
    if not np.isfinite(table).all():
        raise ValueError("a box, score or area is not finite")
    kinds, labels = table[:, KIND], table[:, LABEL]
    if not np.isin(kinds, (IMAGE, DETECTION, TRUTH, IGNORED, KITTI)).all():
        raise ValueError(f"rows of an unknown kind: {kinds.max():.0f}")
    least = np.where(kinds == IGNORED, -1, 0)  # an ignored region may be of all classes
    limit = np.select([kinds == IMAGE, kinds == KITTI], [2, len(TYPES)], classes)
    if (wrong := (labels < least) | (labels >= limit)).any():
        raise ValueError(f"the label {labels[wrong][0]:.0f} of {classes} classes")
