"""The command `ldt predict`: run a pruned detector, or an exported file, on images and videos.

Writes ``pictures/`` with drawn boxes, ``predictions.json`` in COCO's results format, and
``images.json`` with the image and category ids (a COCO annotation file without annotations).
"""

import glob
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import cv2
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.dataset import Compose, pseudo_collate

from ldt import progress
from ldt.config.values import Count, check_value
from ldt.data import videos
from ldt.data.image_files import MAX_PIXELS, SUFFIXES
from ldt.data.pipelines import build_transforms, limited, test_steps
from ldt.data.videos import Video, is_video
from ldt.deployment.drawing import Painter, write_picture, writing_video
from ldt.detectors.checkpoints import detector_of, read, resize_steps
from ldt.objects import corners
from ldt.runs.files import PICTURES, check_target, write_json
from ldt.runs.refusal import refusing
from ldt.runtimes.file_detector import FileDetector
from ldt.runtimes.sessions import SUFFIXES as SUFFIXES_OF_FILES

PREDICTIONS, IMAGES = "predictions.json", "images.json"
MOST_TOLD = 5  # images that cannot be read
MOST_CLASSES = 10  # whose counts are told
Frames = Literal["video", "pictures"]


def find_images(
    sources: str | Path | Sequence[str | Path], suffixes: Sequence[str] = SUFFIXES
) -> list[Path]:
    """Collect image files from files, patterns and folders, which are not searched recursively.

    Args:
        sources: what a pattern such as ``photos/*.jpg`` or a folder holds is sorted by name.
        suffixes: of the files that are taken from folders and patterns.

    Raises:
        FileNotFoundError: a path does not exist, or a folder or pattern has no images.
        ValueError: a path is a pipe or a device, which may never end.
    """
    found: list[Path] = []
    for source in map(Path, [sources] if isinstance(sources, (str, Path)) else sources):
        if source.exists() and not source.is_dir():
            if not source.is_file():
                raise ValueError(f"{source} is a pipe or a device, not an image")
            found.append(source)
            continue
        inside = source.iterdir() if source.is_dir() else map(Path, glob.glob(str(source)))
        images = [file for file in inside if file.suffix.lower() in suffixes and file.is_file()]
        if not images:
            where = "in the folder" if source.is_dir() else "or folder at"
            told = f"no image {where} {str(source)!r}; looked for: {', '.join(suffixes)}"
            raise FileNotFoundError(told)
        found += sorted(images)
    return found


class Predictor:
    """A detector loaded from a checkpoint or an exported file, with its own preprocessing.

    Args:
        checkpoint: see :func:`ldt.load_pruned`; or an exported ``.onnx`` or ``.xml`` file.
        device: device of the detector; exported files run on the CPU.
        max_pixels: of an image; larger ones are not decoded.
        trust: see :func:`ldt.load_pruned`.

    Attributes:
        classes: class names in label order.

    Raises:
        FileNotFoundError, ValueError, ImportError: see :func:`ldt.load_pruned` and
            :func:`ldt.runtimes.sessions.open_session`.
        ValueError: the checkpoint was written by an earlier version of ldt, without preprocessing.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        device: str | torch.device = "cpu",
        max_pixels: int = MAX_PIXELS,
        trust: bool = False,
    ) -> None:
        self.detector: Any
        if Path(checkpoint).suffix in SUFFIXES_OF_FILES:
            self.detector = FileDetector(checkpoint)
            resize = self.detector.session.about.resize
        else:
            content = read(checkpoint, trust)
            resize = resize_steps(content, checkpoint)
            self.detector = detector_of(content, device)
        load, *rest = build_transforms(limited(test_steps(resize), max_pixels))
        self._read, self._prepare = load, Compose(rest)
        self.classes: tuple[str, ...] = self.detector.dataset_meta["classes"]

    def __call__(self, path: Path | str, number: int = 0) -> tuple[np.ndarray, DetDataSample]:
        """Return an image's pixels [h, w, 3] (uint8, RGB) and detections in pixel coordinates.

        Raises:
            ValueError: the file is not an image, is damaged, too large, or too thin to be resized.
        """
        return self._detect(self._read({"img_path": str(path), "img_id": number}))

    def of_frame(self, path: Path, pixels: np.ndarray) -> tuple[np.ndarray, DetDataSample]:
        """Return the same as for an image of a frame [h, w, 3] (uint8, BGR) of a video."""
        shape = pixels.shape[:2]
        about = {"img_path": str(path), "img_id": 0, "img_shape": shape, "ori_shape": shape}
        return self._detect({"img": pixels, **about})

    @torch.no_grad()
    def _detect(self, loaded: dict[str, Any]) -> tuple[np.ndarray, DetDataSample]:
        pixels = loaded["img"][..., ::-1].copy()
        try:
            batch = pseudo_collate([self._prepare(loaded)])
        except cv2.error as error:
            height, width = pixels.shape[:2]
            raise ValueError(
                f"cannot prepare the image {loaded['img_path']} of {width}x{height} pixels for the "
                f"detector: {error.err}"
            ) from error
        return pixels, self.detector.test_step(batch)[0].cpu()


@dataclass
class Predictions:
    """What has been detected so far.

    Attributes:
        classes: class names in label order.
        threshold: minimum score of what is counted.
        images: of ``images.json``.
        boxes: of ``predictions.json``.
        counts: boxes above the threshold, by class.
        seconds: that reading an image and detecting took.
    """

    classes: Sequence[str]
    threshold: float
    images: list[dict[str, Any]] = field(default_factory=list)
    boxes: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    def add(self, number: int, shape: Sequence[int], sample: Any, about: dict[str, Any]) -> None:
        """Add the detections of an image."""
        self.images.append({"id": number, **about, "width": shape[1], "height": shape[0]})
        found = sample.pred_instances
        ends = corners(found)
        boxes = torch.cat([ends[:, :2], ends[:, 2:] - ends[:, :2]], 1).tolist()
        for label, box, score in zip(
            found.labels.tolist(), boxes, found.scores.tolist(), strict=True
        ):
            name: str = self.classes[int(label)]
            of = {"image_id": number, "category_id": label + 1, "category_name": name}
            self.boxes.append({**of, "bbox": box, "score": score})
            self.counts[name] += score > self.threshold

    def write(self, out: Path) -> None:
        """Write the results of all images, and which image each id is."""
        categories = [{"id": i, "name": name} for i, name in enumerate(self.classes, 1)]
        write_json(out / PREDICTIONS, self.boxes)
        about = {"images": self.images, "annotations": [], "categories": categories}
        write_json(out / IMAGES, about)

    def told(self) -> list[str]:
        """Return lines: the time of an image, and what was detected or what to do about it."""
        count = len(self.images)
        line = f"{count} image{'s' * (count != 1)}, {median(self.seconds):.3f} s each (median)"
        total = self.counts.total()
        if total:
            known = [(name, n) for name, n in self.counts.most_common() if n]
            listed = ", ".join(f"{name} {n}" for name, n in known[:MOST_CLASSES])
            more = f", and {len(known) - MOST_CLASSES} more classes" if known[MOST_CLASSES:] else ""
            return [line, f"{total} boxes above threshold={self.threshold:g}: {listed}{more}"]
        if not self.boxes:
            return [line, "not a single box, whatever its score"]
        best = max(self.boxes, key=lambda box: box["score"])
        (image,) = (each for each in self.images if each["id"] == best["image_id"])
        return [
            line,
            f"nothing above threshold={self.threshold:g}: the best score is {best['score']:.3g} "
            f"({best['category_name']} in {image['file_name']}); "
            f"type threshold={0.95 * best['score']:.2g}",
        ]


def predict(
    checkpoint: str | Path,
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    threshold: float = 0.3,
    device: str | torch.device = "cpu",
    max_pixels: int = MAX_PIXELS,
    trust: bool = False,
    every: int = 1,
    frames: Frames = "video",
    tell: Callable[[str], object] = print,
) -> None:
    """Detect objects in images and videos, draw them and save the results.

    ``predictions.json`` is a list of ``{image_id, category_id, category_name, bbox: [x, y, width,
    height], score}`` with all predicted boxes, in pixels of the original images; ``images.json``
    maps the ids to files and categories. A frame of a video is an image, whose ``frame`` is its
    number from 0.

    Args:
        checkpoint: see :class:`Predictor`.
        sources: images, videos, folders of them, or patterns; see :func:`find_images`.
        out: output folder; existing files of the same names are overwritten.
        threshold: minimum score of drawn boxes.
        device: device of the detector.
        max_pixels: of an image; larger ones are not decoded.
        trust: see :func:`ldt.load_pruned`.
        every: of so many frames of a video the first is taken.
        frames: whether those of a video become a ``video`` again, or ``pictures``.
        tell: is called with each line of what was detected.

    Raises:
        FileNotFoundError, ValueError, ImportError: see :class:`Predictor` and :func:`find_images`.
        ValueError: ``threshold`` is not in [0, 1], ``every`` below 1; or, once the results of the
            other images are written, files that are not images, damaged, too large or too thin.
    """
    with refusing():
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold}; allowed: a score from 0 to 1, e.g. 0.3")
        check_value("every", every, Count, 5)
        check_value("frames", frames, Frames, "video")
        paths, out = find_images(sources, (*SUFFIXES, *videos.SUFFIXES)), Path(out)
        for file in (PREDICTIONS, IMAGES, f"{PICTURES}/0001.jpg"):
            check_target(out / file)
        predictor = Predictor(checkpoint, device, max_pixels, trust)
    out.mkdir(parents=True, exist_ok=True)
    found = Predictions(predictor.classes, threshold)

    def video_of(path: Path) -> Video | None:
        return Video(path, every, max_pixels) if is_video(path) else None

    bad = _detect_in(paths, predictor, found, out / PICTURES, video_of, frames)
    if found.images:
        found.write(out)
        for line in found.told():
            tell(line)
    if bad:
        rest = f"; the results of the other {len(found.images)} images are in {out}"
        more = "; ..." if bad[MOST_TOLD:] else ""
        raise ValueError(
            f"{len(bad)} of {len(paths)} files are left out{rest * bool(found.images)}: "
            f"{'; '.join(bad[:MOST_TOLD])}{more}"
        )


def _detect_in(
    paths: Sequence[Path],
    predictor: Predictor,
    found: Predictions,
    pictures: Path,
    video_of: Callable[[Path], Video | None],
    frames: Frames,
) -> list[str]:
    """Detect in every file, add to what was found, and return why some are left out."""
    bad, number, painter = [], 0, Painter(found.classes, found.threshold)
    with progress.running("detecting"):
        for path in paths:
            first = number + 1
            progress.status(f"detecting in {path.name}, {len(found.images)} images so far")
            try:
                video, stem = video_of(path), pictures / path.stem[:50]
                with _saving(stem, first, None if frames == "pictures" else video) as save:
                    shots = _shots(predictor, path, video)
                    for about, pixels, sample in _timed(shots, found.seconds):
                        number += 1
                        save(number, painter.draw(pixels, sample))
                        found.add(number, pixels.shape, sample, about)
            except (ValueError, OSError) as error:
                bad.append(str(error))
                number = max(number, first)
    return bad


Shot = tuple[dict[str, Any], np.ndarray, DetDataSample]


def _shots(predictor: Predictor, path: Path, video: Video | None) -> Iterator[Shot]:
    """Yield what `images.json` says, the pixels and the detections of a file's image or images."""
    if video is None:
        yield {"file_name": str(path)}, *predictor(path)
        return
    for frame, pixels in video:
        yield {"file_name": str(path), "frame": frame}, *predictor.of_frame(path, pixels)


def _timed(shots: Iterator[Shot], seconds: list[float]) -> Iterator[Shot]:
    """Yield the same, and note how long each has taken."""
    while True:
        started = time.perf_counter()
        shot = next(shots, None)
        if shot is None:
            return
        seconds.append(time.perf_counter() - started)
        yield shot


@contextmanager
def _saving(stem: Path, first: int, video: Video | None) -> Iterator[Callable[..., None]]:
    """Yield a function that saves an image by its number: as a picture, or in a video."""
    if video is None:
        yield lambda number, pixels: write_picture(
            pixels, stem.with_name(f"{number:04d}-{stem.name}.jpg")
        )
    else:
        with writing_video(stem.with_name(f"{first:04d}-{stem.name}.mp4"), video.rate) as add:
            yield lambda _, pixels: add(pixels)
