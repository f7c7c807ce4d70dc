"""Grad-CAM (Selvaraju et al., ICCV 2017) of a detector's detections, on its neck's output."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import BaseDetector
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from ldt.detectors.forward import as_maps, eval_with_gradients, find_neck

RawItem = dict[str, Any]  # an item of mmdet's data sets: "inputs" and "data_samples"
NeckOutput = Tensor | list[Tensor] | tuple[Tensor, ...]
SCORE = 0.3  # detections above it are explained; if there are none, the best one
TOLERANCE = 1e-3  # between a detection's score and that of its cell


def heatmap(
    detector: BaseDetector, item: RawItem, neck: str = "auto", score: float = SCORE
) -> tuple[np.ndarray, np.ndarray]:
    """Compute which positions of the neck's feature maps contribute to an image's detections.

    The explained scalar is the sum of the detections' class scores before the sigmoid, at the cells
    of the head's raw maps that the detections come from. Every scale of the neck is a layer of
    Grad-CAM; pytorch-grad-cam scales their maps to [0, 1] and averages them.

    Args:
        detector: a detector with a dense head (``bbox_head``) whose first output are class scores.
        item: an image of a data set, with its data sample.
        neck: name of the module whose output is used.
        score: detections above it are explained; if there are none, the best one.

    Returns:
        The heat map [h, w] in [0, 1] of the network's (padded) input, zero if there is no
        detection, and the explained boxes [k, 4] in pixels of the original image.

    Raises:
        ValueError: the detector has another kind of head.
        ImportError: pytorch-grad-cam is not installed.
    """
    grad_cam = _import_grad_cam()
    data = detector.data_preprocessor(
        {"inputs": [item["inputs"]], "data_samples": [item["data_samples"]]}, False
    )
    head = _ClassScores(detector, data["data_samples"])
    with torch.no_grad():
        detections = detector(**data, mode="predict")[0].pred_instances
        detections = detections[detections.scores.argsort(descending=True)]
        detections = detections[: max(int((detections.scores > score).sum()), 1)]
        cells = head.cells(data["inputs"], detections.labels, detections.scores)
    corners = detections.bboxes.numpy(force=True).copy()
    if not len(cells):
        return np.zeros(data["inputs"].shape[2:], np.float32), corners
    labels = detections.labels
    with eval_with_gradients(detector), _identities_after_neck(detector, neck) as identities:
        head(data["inputs"])  # creates the identities, one per scale
        with grad_cam(head, list(identities)) as cam:
            target = [lambda logits: logits[cells, labels].sum()]
            return cam(data["inputs"], target)[0], corners


def _import_grad_cam() -> type:
    try:
        from pytorch_grad_cam import GradCAM
    except ImportError as error:
        raise ImportError(
            "attention maps need pytorch-grad-cam; run pip install 'ldt[figures]'"
        ) from error
    return GradCAM


class _ClassScores(nn.Module):
    """Class scores of the cells of all scales before the sigmoid: images -> [N, cells, G]."""

    def __init__(self, detector: BaseDetector, samples: Sequence[DetDataSample]) -> None:
        super().__init__()
        self.detector, self.samples = detector, samples
        if not hasattr(detector, "bbox_head") or hasattr(detector, "roi_head"):
            raise ValueError(
                f"{type(detector).__name__} has no dense head (bbox_head); attention maps are "
                "available for single-stage detectors only"
            )
        self.head = cast(BaseDenseHead, detector.bbox_head)

    def forward(self, images: Tensor) -> Tensor:
        return self._flatten(self.detector(images, self.samples, mode="tensor")[0])

    def cells(self, images: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
        """Return the cells that detections come from, by equality of their class scores.

        Scores are sigmoids (softmax if the head has a background class), multiplied by the sigmoid
        of the head's third map if that has one value per box (objectness, centerness).
        """
        output = self.detector(images, self.samples, mode="tensor")
        logits = self._flatten(output[0])[0]
        softmax = not getattr(self.head, "use_sigmoid_cls", True)
        cell_scores = logits.softmax(-1) if softmax else logits.sigmoid()
        if len(output) > 2 and sum(m[0].numel() for m in output[2]) == len(logits):
            cell_scores = cell_scores * self._flatten(output[2], 1)[0].sigmoid()
        distance, cells = (cell_scores[:, labels] - scores).abs().min(0)
        if (distance > TOLERANCE).any():
            raise ValueError(
                f"the scores of {type(self.detector).__name__}'s detections are not those of its "
                "class maps; attention maps need a head whose first output are class scores"
            )
        return cells

    def _flatten(self, maps: Sequence[Tensor], width: int | None = None) -> Tensor:
        """Reshape and concatenate maps [N, A G, h, w] of all scales to [N, cells, G]."""
        width = width or int(getattr(self.head, "cls_out_channels"))  # noqa: B009
        return torch.cat([m.permute(0, 2, 3, 1).reshape(len(m), -1, width) for m in maps], 1)


@contextmanager
def _identities_after_neck(detector: nn.Module, name: str) -> Iterator[nn.ModuleList]:
    """Pass each of the neck's maps through an identity module, which the first forward creates.

    Grad-CAM needs a module per map. The maps are copied, so that their gradient is that of the head
    only, without that of further maps which the neck computes from them.
    """
    identities = nn.ModuleList()

    def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: NeckOutput) -> NeckOutput:
        maps = as_maps(output)
        if not len(identities):
            identities.extend(nn.Identity() for _ in maps)
        passed = [identity(m.clone()) for identity, m in zip(identities, maps, strict=True)]
        return passed[0] if isinstance(output, Tensor) else type(output)(passed)

    handle = find_neck(detector, name).register_forward_hook(hook)
    try:
        yield identities
    finally:
        handle.remove()
