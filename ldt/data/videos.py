"""Videos as frames, whoever made the files."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from ldt.data.image_files import check_pixels

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")
# a playlist with the name of a video would open further files, or addresses
FFMPEG = {
    "OPENCV_FFMPEG_CAPTURE_OPTIONS": "protocol_whitelist;file|"
    "format_whitelist;mov,matroska,avi,mpeg,mpegts,mpegvideo",
    "OPENCV_FFMPEG_LOGLEVEL": "-8",  # what is wrong is said in one line below
}
RATE = 25.0  # frames per second where a file does not say


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its name."""
    return path.suffix.lower() in SUFFIXES


class Video:
    """The frames of a video file.

    Args:
        path: of the file.
        every: of so many frames the first is taken.
        max_pixels: of a frame; larger ones are not decoded.

    Attributes:
        rate: frames that are taken, per second of the video.

    Raises:
        ValueError: it is no video, is damaged, or has too large frames.
    """

    def __init__(self, path: Path, every: int, max_pixels: int) -> None:
        self.path, self.every = path, every
        with _quiet_ffmpeg():
            self._capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        if not self._capture.isOpened():
            raise self._unreadable()
        wide, high, rate = (
            self._capture.get(key)
            for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FPS)
        )
        check_pixels(path, (int(wide), int(high)), max_pixels)
        self.rate = (rate if 0 < rate < 1000 else RATE) / every

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of a frame, from 0, and its pixels [h, w, 3] (uint8, BGR).

        Raises:
            ValueError: there is not a single one.
        """
        number = 0
        while self._capture.grab():
            if number % self.every == 0:
                there, pixels = self._capture.retrieve()
                if not there:
                    break
                yield number, pixels
            number += 1
        self._capture.release()
        if not number:
            raise self._unreadable()

    def _unreadable(self) -> ValueError:
        return ValueError(f"cannot read the video {self.path}: damaged or not a video; restore it")


@contextlib.contextmanager
def _quiet_ffmpeg() -> Iterator[None]:
    before = {key: os.environ.get(key) for key in FFMPEG}
    level = cv2.utils.logging.getLogLevel()
    os.environ.update(FFMPEG)
    cv2.utils.logging.setLogLevel(0)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
