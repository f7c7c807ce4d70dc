"""An exported file in the place of mmdet's detector."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

from ldt.detectors.adapter import RawBatch
from ldt.runtimes.sessions import Session, open_session


class FileDetector:
    """Detect objects with an exported file.

    Args:
        session: the file, or an open one.
        threads: of a run; None: as the runtime chooses.

    Attributes:
        session: the open file.
        dataset_meta: has the ``classes``.

    Raises:
        ValueError: it computes raw maps only; see also :func:`ldt.runtimes.sessions.open_session`.
    """

    def __init__(self, session: Session | str | Path, threads: int | None = None) -> None:
        opened = open_session(session, threads) if isinstance(session, str | Path) else session
        if opened.about.outputs != "detections":
            raise ValueError(
                f"{str(session)!r} computes raw maps, no detections: export it without --raw"
            )
        self.session: Session = opened
        self.dataset_meta = {"classes": tuple(opened.about.classes)}

    def test_step(self, batch: RawBatch) -> list[DetDataSample]:
        """Return samples with ``pred_instances`` in pixels of the original images.

        Args:
            batch: ``inputs`` [3, h, w], loaded and resized as the metadata say, and
                ``data_samples``.
        """
        pairs = zip(batch["inputs"], batch["data_samples"], strict=True)
        return [self._detect(image, sample) for image, sample in pairs]

    def _detect(self, image: Tensor, sample: Any) -> DetDataSample:
        about = self.session.about
        canvas, shrunk = to_canvas(image, about.shape, about.pad_value)
        boxes, scores, labels = (
            torch.as_tensor(output[0]) for output in self.session(canvas.numpy())
        )
        there = scores > 0
        boxes = boxes[there] / (boxes.new_tensor(sample.scale_factor) * shrunk).repeat(2)
        if tuple(image.shape[1:]) != about.shape:  # mmdet's boxes end where the image does
            height, width = sample.ori_shape[:2]
            boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height] * 2))
        found = InstanceData(bboxes=boxes, scores=scores[there], labels=labels[there].long())
        sample.pred_instances = found
        return sample


def to_canvas(
    image: Tensor, size: tuple[int, int], pad_value: Sequence[float]
) -> tuple[Tensor, float]:
    """Pad an image to the size of a graph, and shrink it before if it does not fit.

    Args:
        image: [3, h, w], pixel values.
        size: (height, width).
        pad_value: of the three channels.

    Returns:
        [1, 3, H, W], float, and the factor by which it was shrunk, at most 1.
    """
    height, width = image.shape[1:]
    content, shrunk = image[None].float(), min(1.0, size[0] / height, size[1] / width)
    if shrunk < 1:
        smaller = (max(1, int(height * shrunk)), max(1, int(width * shrunk)))
        content = F.interpolate(content, smaller, mode="bilinear", antialias=True)
    canvas = content.new_tensor(pad_value).view(1, 3, 1, 1).repeat(1, 1, *size)
    canvas[:, :, : content.shape[2], : content.shape[3]] = content
    return canvas, shrunk
