"""Detections and ground truth of a validation on the disk, small, to compute statistics from later.

Coordinates are rounded to 1/128 pixel and scores to 1/65535, which moves AP by less than 0.001.
"""

from pathlib import Path

import numpy as np

from ldt.evaluation.detection_rows import (
    AREA,
    BOX,
    COLUMNS,
    IMAGE_ID,
    KIND,
    LABEL,
    SCORE,
    TRUNCATION,
    Image,
    images_of,
)
from ldt.runs import files

STEPS = 128  # of a pixel
SCORES = 65535
REST = slice(TRUNCATION, COLUMNS)
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
    with files.reading(path):
        files.check_archive(path, LARGEST)
        with np.load(path) as arrays:
            table = np.zeros((len(arrays["kind"]), COLUMNS))
            table[:, KIND], table[:, LABEL] = arrays["kind"], arrays["label"]
            table[:, IMAGE_ID] = np.cumsum(arrays["image"])
            table[:, SCORE] = arrays["score"] / SCORES
            table[:, BOX] = arrays["box"] / STEPS
            table[:, AREA], table[:, REST] = arrays["area"], arrays["rest"]
            classes = tuple(map(str, arrays["classes"]))
    return images_of(table, len(classes)), classes
