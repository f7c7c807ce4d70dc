"""The command `ldt predict`: run a pruned detector, or an exported file, on arbitrary images.

Writes ``pictures/`` with drawn boxes, ``predictions.json`` in COCO's results format, and
``images.json`` with the image and category ids (a COCO annotation file without annotations).
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.dataset import Compose, pseudo_collate

from ldt.data.image_files import MAX_PIXELS, SUFFIXES
from ldt.data.pipelines import build_transforms, limited, test_steps
from ldt.detectors.checkpoints import detector_of, read, resize_steps
from ldt.objects import corners
from ldt.runs.files import PICTURES, check_target, write_json, writing
from ldt.runs.refusal import refusing
from ldt.runtimes.file_detector import FileDetector
from ldt.runtimes.sessions import SUFFIXES as SUFFIXES_OF_FILES

PREDICTIONS, IMAGES = "predictions.json", "images.json"
MOST_TOLD = 5  # images that cannot be read


def find_images(sources: str | Path | Sequence[str | Path]) -> list[Path]:
    """Collect image files from files and folders; folders are sorted by name, not recursive.

    Raises:
        FileNotFoundError: a path does not exist, or a folder has no images.
    """
    found: list[Path] = []
    for source in map(Path, [sources] if isinstance(sources, (str, Path)) else sources):
        if not source.exists():
            raise FileNotFoundError(f"no image or folder at {str(source)!r}")
        inside = sorted(source.iterdir()) if source.is_dir() else []
        images = [file for file in inside if file.suffix.lower() in SUFFIXES]
        if source.is_dir() and not images:
            raise FileNotFoundError(
                f"no image in the folder {str(source)!r}; looked for: {', '.join(SUFFIXES)}"
            )
        found += images or [source]
    return found


class Predictor:
    """A detector loaded from a checkpoint or an exported file, with its own preprocessing.

    Args:
        checkpoint: ``round-<t>.ckpt`` or ``last.ckpt`` of a run, or an exported ``.onnx`` or
            ``.xml`` file.
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

    @torch.no_grad()
    def __call__(self, path: Path, number: int = 0) -> tuple[np.ndarray, DetDataSample]:
        """Return an image's pixels [h, w, 3] (uint8, RGB) and detections in pixel coordinates.

        Raises:
            ValueError: the file is not an image, is damaged, too large, or too thin to be resized.
        """
        loaded = self._read({"img_path": str(path), "img_id": number})
        pixels = loaded["img"][..., ::-1].copy()
        try:
            batch = pseudo_collate([self._prepare(loaded)])
        except cv2.error as error:
            height, width = pixels.shape[:2]
            raise ValueError(
                f"cannot prepare the image {path} of {width}x{height} pixels for the detector: "
                f"{error.err}"
            ) from error
        return pixels, self.detector.test_step(batch)[0].cpu()


def predict(
    checkpoint: str | Path,
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    threshold: float = 0.3,
    device: str | torch.device = "cpu",
    max_pixels: int = MAX_PIXELS,
    trust: bool = False,
) -> None:
    """Detect objects in images, draw them and save the results.

    ``predictions.json`` is a list of ``{image_id, category_id, bbox: [x, y, width, height],
    score}`` with all predicted boxes, in pixels of the original images; ``images.json`` maps the
    ids to files and categories.

    Args:
        checkpoint: see :class:`Predictor`.
        sources: see :func:`find_images`.
        out: output folder; existing files of the same names are overwritten.
        threshold: minimum score of drawn boxes.
        device: device of the detector.
        max_pixels: of an image; larger ones are not decoded.
        trust: see :func:`ldt.load_pruned`.

    Raises:
        FileNotFoundError, ValueError, ImportError: see :class:`Predictor` and :func:`find_images`.
        ValueError: ``threshold`` is not in [0, 1]; or, once the results of the other images are
            written, files that are not images, damaged, too large or too thin.
    """
    with refusing():
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold}; allowed: a score from 0 to 1, e.g. 0.3")
        paths, out = find_images(sources), Path(out)
        for file in (PREDICTIONS, IMAGES, f"{PICTURES}/0001.jpg"):
            check_target(out / file)
        predictor = Predictor(checkpoint, device, max_pixels, trust)
    out.mkdir(parents=True, exist_ok=True)
    draw, images, boxes, bad = _painter(predictor.classes, threshold), [], [], []
    for number, path in enumerate(paths, 1):
        try:
            pixels, sample = predictor(path, number)
        except (ValueError, OSError) as error:
            bad.append(str(error))
            continue
        draw(pixels, sample, out / PICTURES / f"{number:04d}-{path.stem[:50]}.jpg")
        height, width = pixels.shape[:2]
        images.append({"id": number, "file_name": str(path), "width": width, "height": height})
        boxes += _results(number, sample)
    if images:
        _write(out, predictor.classes, images, boxes)
    if bad:
        rest = f"; the results of the other {len(images)} are in {out}" if images else ""
        more = "; ..." if bad[MOST_TOLD:] else ""
        raise ValueError(
            f"{len(bad)} of {len(paths)} images are left out{rest}: "
            f"{'; '.join(bad[:MOST_TOLD])}{more}"
        )


def _write(out: Path, classes: Sequence[str], images: list[dict], boxes: list[dict]) -> None:
    """Write the results of all images, and which image each id is."""
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    write_json(out / PREDICTIONS, boxes)
    about = {"images": images, "annotations": [], "categories": categories}
    write_json(out / IMAGES, about)


def _results(number: int, sample: Any) -> list[dict[str, Any]]:
    """Convert detections to COCO's results format; category ids are labels plus 1."""
    found = sample.pred_instances
    ends = corners(found)
    boxes = torch.cat([ends[:, :2], ends[:, 2:] - ends[:, :2]], 1).tolist()
    rows = zip(found.labels.tolist(), boxes, found.scores.tolist(), strict=True)
    return [
        {"image_id": number, "category_id": label + 1, "bbox": box, "score": score}
        for label, box, score in rows
    ]


def _painter(classes: tuple[str, ...], threshold: float) -> Any:
    """Return a function that draws detections above a score and saves the picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warns that no visualisation backend is set
        visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = {"classes": classes, "palette": "random"}

    def draw(pixels: np.ndarray, sample: DetDataSample, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with writing(file) as draft:
            options = {"draw_gt": False, "pred_score_thr": threshold, "out_file": str(draft)}
            visualizer.add_datasample("image", pixels, sample, **options)

    return draw
