"""Detects objects in one's own images with a detector of a run; the command `ldt predict`.

Writes ``pictures/`` with boxes, ``predictions.json`` in COCO's results format, and ``images.json``,
which tells the ids in it (a COCO annotation file without annotations).
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import TRANSFORMS
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.dataset import Compose, pseudo_collate

from ldt.data.datamodule import test_steps
from ldt.detectors.checkpoints import detector_of, read, resize_steps
from ldt.objects import corners
from ldt.runs.files import write_json

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def find_images(sources: Sequence[str | Path]) -> list[Path]:
    """The images among files and folders, in order; a folder's by name, without its subfolders.

    Raises:
        FileNotFoundError: there is no such path, or no image in a folder.
    """
    found: list[Path] = []
    for source in map(Path, sources):
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
    """A checkpoint's detector with the preprocessing that it was trained with.

    Args:
        checkpoint: ``round-<t>.ckpt`` or ``last.ckpt`` of a run.
        device: where to compute.

    Attributes:
        classes: names in label order.

    Raises:
        FileNotFoundError, ValueError, ImportError: as :func:`ldt.load_pruned`.
        ValueError: an earlier version of ldt wrote the checkpoint, without the preprocessing.
    """

    def __init__(self, checkpoint: str | Path, device: str | torch.device = "cpu") -> None:
        content = read(checkpoint)
        steps = test_steps(resize_steps(content, checkpoint))
        self.detector: Any = detector_of(content, device)
        self.classes: tuple[str, ...] = self.detector.dataset_meta["classes"]
        load, *rest = [TRANSFORMS.build(step) for step in steps]
        self._read, self._prepare = load, Compose(rest)

    @torch.no_grad()
    def __call__(self, path: Path, number: int = 0) -> tuple[np.ndarray, DetDataSample]:
        """An image's pixels [h, w, 3] (uint8, RGB), and its detections in them.

        Raises:
            ValueError: the file is no image, or damaged.
        """
        loaded = self._read({"img_path": str(path), "img_id": number})
        pixels = loaded["img"][..., ::-1].copy()
        batch = pseudo_collate([self._prepare(loaded)])
        return pixels, self.detector.test_step(batch)[0].cpu()


def predict(
    checkpoint: str | Path,
    sources: Sequence[str | Path],
    out: str | Path,
    threshold: float = 0.3,
    device: str | torch.device = "cpu",
) -> None:
    """Detect objects in images, draw them and write them down.

    ``predictions.json`` is a list of ``{image_id, category_id, bbox: [x, y, width, height],
    score}`` with every box that the detector gives, in pixels of the original images;
    ``images.json`` has the files and categories of these ids.

    Args:
        checkpoint: as for :class:`Predictor`.
        sources: as for :func:`find_images`.
        out: a folder; files of the same names in it are replaced.
        threshold: boxes with a higher score are drawn.
        device: where to compute.

    Raises:
        FileNotFoundError, ValueError, ImportError: as :class:`Predictor` and :func:`find_images`.
        ValueError: ``threshold`` is no score, or a file is no image or damaged.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold}: a score from 0 to 1, for example 0.3")
    paths, out = find_images(sources), Path(out)
    predictor = Predictor(checkpoint, device)
    out.mkdir(parents=True, exist_ok=True)
    draw = _painter(predictor.classes, threshold)
    images, boxes = [], []
    for number, path in enumerate(paths, 1):
        pixels, sample = predictor(path, number)
        draw(pixels, sample, out / "pictures" / f"{number:04d}-{path.stem}.jpg")
        height, width = pixels.shape[:2]
        images.append({"id": number, "file_name": str(path), "width": width, "height": height})
        boxes += _results(number, sample)
    categories = [{"id": i, "name": name} for i, name in enumerate(predictor.classes, 1)]
    write_json(out / "predictions.json", boxes)
    about = {"images": images, "annotations": [], "categories": categories}
    write_json(out / "images.json", about)


def _results(number: int, sample: Any) -> list[dict[str, Any]]:
    """An image's detections in COCO's results format; a category's id is its label plus 1."""
    found = sample.pred_instances
    ends = corners(found)
    boxes = torch.cat([ends[:, :2], ends[:, 2:] - ends[:, :2]], 1).tolist()
    rows = zip(found.labels.tolist(), boxes, found.scores.tolist(), strict=True)
    return [
        {"image_id": number, "category_id": label + 1, "bbox": box, "score": score}
        for label, box, score in rows
    ]


def _painter(classes: tuple[str, ...], threshold: float) -> Any:
    """A function that draws detections above a score on pixels, into a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no backend but our files
        visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = {"classes": classes, "palette": "random"}

    def draw(pixels: np.ndarray, sample: DetDataSample, file: Path) -> None:
        options = {"draw_gt": False, "pred_score_thr": threshold, "out_file": str(file)}
        visualizer.add_datasample("image", pixels, sample, **options)

    return draw
