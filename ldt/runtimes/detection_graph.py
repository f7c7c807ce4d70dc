"""A detector as one graph: an image of fixed size goes in, detections or raw maps come out.

Normalisation, channel order and padding of mmdet's preprocessor are part of the graph.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldt.detectors.adapter import Detector
from ldt.detectors.fixed_shapes import fixed_shapes
from ldt.detectors.forward import evaluating, one_image
from ldt.objects import corners

OPSET = 17
INPUT, OUTPUTS = "image", ("boxes", "scores", "labels")
MOST = 300  # detections of an image, where the detector has no limit
CANDIDATES = 1000  # boxes of an image that suppress one another


class RawGraph(nn.Module):
    """Compute the raw output maps of one image.

    Args:
        detector: the detector, which the graph shares.
        size: (height, width) of the image.
    """

    def __init__(self, detector: Detector, size: tuple[int, int]) -> None:
        super().__init__()
        self.detector, self.size = detector, (int(size[0]), int(size[1]))
        self.model = detector.model  # a part of this module, so that its layers keep their names

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the raw maps of an image [1, 3, H, W]: float, pixel values as mmdet loads them."""
        with fixed_shapes(MOST, CANDIDATES):
            inputs = self.detector.network_input(one_image(image[0], self.size))
            return tuple(self.detector.raw_maps(inputs))

    def output_names(self, outputs: tuple[Tensor, ...]) -> list[str]:
        """Return a name for each output."""
        return [f"map_{index}" for index in range(len(outputs))]


class DetectionGraph(RawGraph):
    """Compute the detections of one image, the same as mmdet's.

    Args:
        detector: the detector, which the graph shares.
        size: (height, width) of the image.
        most: number K of detections, which the detector's own limit may lower.
        candidates: see :func:`ldt.detectors.fixed_shapes.fixed_shapes`.
    """

    def __init__(
        self,
        detector: Detector,
        size: tuple[int, int],
        most: int = MOST,
        candidates: int | None = CANDIDATES,
    ) -> None:
        super().__init__(detector, size)
        self.most, self.candidates = most, candidates
        self._regions = _regions(detector.model)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Detect objects, best first; what is no detection has score 0, label -1 and no box.

        Args:
            image: [1, 3, H, W], float, pixel values as mmdet loads them.

        Returns:
            boxes [1, K, 4] as (x1, y1, x2, y2) in pixels, scores [1, K], labels [1, K].
        """
        check_exportable(self.model)
        candidates = self.candidates and max(self.candidates, 2 * self._regions)
        with fixed_shapes(max(self.most, self._regions), candidates):
            (sample,) = self.detector.predict(one_image(image[0], self.size))
            found: Any = sample.pred_instances
            if "masks" in found or "bboxes" not in found:
                raise ValueError("it detects masks; only boxes can be exported")
            count = min(int(found.scores.shape[0]), self.most)
            scores, order = found.scores.topk(count)
            boxes, labels = corners(found)[order], found.labels[order]
            there = scores > 0
            boxes = torch.where(there[:, None], boxes, 0)
            labels = torch.where(there, labels, -1)
            lacking = self.most - count
            boxes = F.pad(boxes, (0, 0, 0, lacking))
            scores, labels = F.pad(scores, (0, lacking)), F.pad(labels, (0, lacking), value=-1)
            rows = (1, self.most)  # as numbers, so that a file's outputs have fixed shapes
            return boxes.view(*rows, 4), scores.view(rows), labels.view(rows)

    def output_names(self, outputs: tuple[Tensor, ...]) -> list[str]:
        """Return a name for each output."""
        return list(OUTPUTS)


def to_onnx(
    detector: Detector,
    path: str | Path,
    size: tuple[int, int],
    raw: bool = True,
    most: int = MOST,
) -> Path:
    """Write a detector as an ONNX file for images of a fixed size, one at a time.

    The file's input ``image`` is [1, 3, H, W], float32, pixel values from 0 to 255 in the channel
    order in which mmdet loads images (BGR); nodes are named after the detector's modules
    (``/model/backbone/.../Conv``). The detector is as before afterwards, also after an error.

    Args:
        detector: pruned or not, in any mode; it is exported as in eval mode.
        path: of the file.
        size: (height, width) of the image.
        raw: outputs are the raw maps of the head, ``map_0``, ``map_1``...; otherwise those of
            :class:`DetectionGraph`.
        most: number of detections.

    Returns:
        The path.
    """
    graph = RawGraph(detector, size) if raw else DetectionGraph(detector, size, most)
    image = detector.example().new_zeros(1, 3, *size)
    with evaluating(detector.model), torch.no_grad(), _quiet():
        names = graph.output_names(graph.eval()(image))
        torch.onnx.export(
            graph,
            (image,),
            str(path),
            input_names=[INPUT],
            output_names=names,
            opset_version=OPSET,
            dynamo=False,
        )
    return Path(path)


def check_exportable(model: nn.Module) -> None:
    """Check that a detector's detections can be computed by a graph.

    Raises:
        ValueError: in one line, why not.
    """
    parts = dict(model.named_children())
    if {"mask_head", "panoptic_head"} & parts.keys() or getattr(model, "with_mask", False):
        raise ValueError("it detects masks; a graph has boxes only")
    if getattr(parts.get("bbox_head"), "with_score_voting", False):
        raise ValueError("its boxes are averaged over their neighbours, class by class")


def _regions(model: nn.Module) -> int:
    """Return the number of regions that a second stage looks at; 0 without one."""
    config = getattr(model, "test_cfg", None) or {}
    return (config.get("rpn") or {}).get("max_per_img", 0) if hasattr(model, "roi_head") else 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what tracing says of sizes, which are fixed here, and of its age."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        warnings.filterwarnings("ignore", message=".*legacy TorchScript-based ONNX export")
        warnings.filterwarnings("ignore", message=".*Constant folding")
        yield
