"""Grad-CAM (Selvaraju et al., ICCV 2017) of a detector's own detections, on its neck's output."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldt.detectors.forward import as_maps, eval_with_gradients, find_neck

SCORE = 0.3  # detections above it are explained; the best one where there is none
SAME = 1e-3  # a detection's score and that of the cell that it comes from


def heat(
    detector: Any, item: dict[str, Any], neck: str = "auto", score: float = SCORE
) -> tuple[np.ndarray, np.ndarray]:
    """Where the neck's features make the detections of an image.

    What is explained is the sum of the detections' class scores before the sigmoid, each taken
    from the cell of the head's raw maps that the detection comes from. Every scale of the neck is
    a layer of Grad-CAM, whose maps pytorch-grad-cam scales to [0, 1] and averages.

    Args:
        detector: with a dense head (``bbox_head``) whose first output are class scores.
        item: an image of a data set, with its data sample.
        neck: name of the tapped module.
        score: detections above it are explained; if there are none, the best one.

    Returns:
        [h, w] in [0, 1], over the network's (padded) input, zero without any detection; and the
        explained boxes [k, 4] in pixels of the original image.

    Raises:
        ValueError: the head is of another kind.
        ImportError: pytorch-grad-cam is not installed.
    """
    grad_cam = _library()
    data = detector.data_preprocessor(
        {"inputs": [item["inputs"]], "data_samples": [item["data_samples"]]}, False
    )
    head = _Scores(detector, data["data_samples"])
    with torch.no_grad():
        found = detector(**data, mode="predict")[0].pred_instances
        found = found[found.scores.argsort(descending=True)]
        found = found[: max(int((found.scores > score).sum()), 1)]
        cells = head.cells(data["inputs"], found.labels, found.scores)
    corners = found.bboxes.numpy(force=True).copy()
    if not len(cells):
        return np.zeros(data["inputs"].shape[2:], np.float32), corners
    labels = found.labels
    with eval_with_gradients(detector), _tapped(detector, neck) as taps:
        head(data["inputs"])  # makes the taps, one for each scale
        with grad_cam(head, list(taps)) as cam:
            target = [lambda logits: logits[cells, labels].sum()]
            return cam(data["inputs"], target)[0], corners


def _library() -> Any:
    try:
        from pytorch_grad_cam import GradCAM
    except ImportError as error:
        raise ImportError(
            "attention maps need pytorch-grad-cam: pip install 'ldt[figures]'"
        ) from error
    return GradCAM


class _Scores(nn.Module):
    """Class scores of every cell of every scale, before the sigmoid: images -> [N, cells, G]."""

    def __init__(self, detector: Any, samples: Any) -> None:
        super().__init__()
        self.detector, self.samples = detector, samples
        if not hasattr(detector, "bbox_head") or hasattr(detector, "roi_head"):
            raise ValueError(
                f"{type(detector).__name__} has no dense head (bbox_head); attention is drawn of "
                "single-stage detectors"
            )

    def forward(self, images: Tensor) -> Tensor:
        return self._flat(self.detector(images, self.samples, mode="tensor")[0])

    def cells(self, images: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
        """The cells that detections come from: where their class has just their score.

        Scores are sigmoids (softmax, where the head has a class for the background), times the
        sigmoid of the head's third map where that has one value a box (objectness, centerness).
        """
        output = self.detector(images, self.samples, mode="tensor")
        logits = self._flat(output[0])[0]
        soft = not getattr(self.detector.bbox_head, "use_sigmoid_cls", True)
        every = logits.softmax(-1) if soft else logits.sigmoid()
        if len(output) > 2 and sum(m[0].numel() for m in output[2]) == len(logits):
            every = every * self._flat(output[2], 1)[0].sigmoid()
        distance, cells = (every[:, labels] - scores).abs().min(0)
        if (distance > SAME).any():
            raise ValueError(
                f"the scores of {type(self.detector).__name__}'s detections are not those of its "
                "class maps; attention is drawn of heads whose first output are class scores"
            )
        return cells

    def _flat(self, maps: Any, width: int | None = None) -> Tensor:
        """Maps [N, A G, h, w] of all scales as [N, cells, G]."""
        width = width or self.detector.bbox_head.cls_out_channels
        return torch.cat([m.permute(0, 2, 3, 1).reshape(len(m), -1, width) for m in maps], 1)


@contextmanager
def _tapped(detector: nn.Module, name: str) -> Iterator[nn.ModuleList]:
    """Within it, each of the neck's maps goes through an identity of its own, made at first.

    What passes is a copy, so that its gradient is the head's alone, without that of further maps
    which the neck makes of it.
    """
    taps = nn.ModuleList()

    def through(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        maps = as_maps(output)
        if not len(taps):
            taps.extend(nn.Identity() for _ in maps)
        passed = [tap(m.clone()) for tap, m in zip(taps, maps, strict=True)]
        return passed[0] if isinstance(output, Tensor) else type(output)(passed)

    hook = find_neck(detector, name).register_forward_hook(through)
    try:
        yield taps
    finally:
        hook.remove()
