"""Pictures and videos with drawn detections."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer

from ldt.runs.files import writing

CODEC = "mp4v"  # which OpenCV can write everywhere


class Painter:
    """Draw detections above a score.

    Args:
        classes: class names in label order.
        threshold: minimum score of drawn boxes.
    """

    def __init__(self, classes: Sequence[str], threshold: float) -> None:
        self.threshold = threshold
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warns that no visualisation backend is set
            self._visualizer = DetLocalVisualizer()
        self._visualizer.dataset_meta = {"classes": tuple(classes), "palette": "random"}

    def draw(self, pixels: np.ndarray, sample: DetDataSample) -> np.ndarray:
        """Return an image [h, w, 3] (uint8, RGB) with the boxes of its detections."""
        options: dict[str, Any] = {"draw_gt": False, "pred_score_thr": self.threshold}
        self._visualizer.add_datasample("image", pixels, sample, **options)
        return self._visualizer.get_image()


def write_picture(pixels: np.ndarray, file: Path) -> None:
    """Write an image [h, w, 3] (uint8, RGB); create the folder if it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with writing(file) as draft:
        cv2.imwrite(str(draft), pixels[..., ::-1])


@contextmanager
def writing_video(file: Path, rate: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that adds a frame [h, w, 3] (uint8, RGB); all are of equal size.

    The file is there when the block ends.

    Args:
        file: ends in ``.mp4``.
        rate: frames per second.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    writers: list[cv2.VideoWriter] = []
    with writing(file) as draft:

        def add(pixels: np.ndarray) -> None:
            if not writers:
                code, size = cv2.VideoWriter.fourcc(*CODEC), pixels.shape[1::-1]
                writers.append(cv2.VideoWriter(str(draft), cv2.CAP_FFMPEG, code, rate, size))
            writers[0].write(np.ascontiguousarray(pixels[..., ::-1]))

        try:
            yield add
        finally:
            for writer in writers:
                writer.release()
