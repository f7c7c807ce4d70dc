"""Samples with detections and ground truth for the tests of the metrics."""

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

CLASSES = ("car", "person", "tram", "cyclist")  # no tram in the random samples
SIZES = (12.0, 30.0, 60.0, 95.0, 150.0)
NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")  # in pycocotools' order


def random_boxes(generator: torch.Generator, n: int) -> Tensor:
    """Integer boxes [n, 4] of all of COCO's sizes: exact IoUs and exact ties do happen."""
    corner = torch.randint(0, 300, (n, 2), generator=generator).float()
    side = torch.tensor(SIZES)[torch.randint(0, len(SIZES), (n, 2), generator=generator)]
    return torch.cat((corner, corner + side), dim=1)


def random_labels(generator: torch.Generator, n: int) -> Tensor:
    return torch.tensor([0, 1, 3])[torch.randint(0, 3, (n,), generator=generator)]


def sample(image_id, detections, truths, ignored=None, **metainfo) -> Any:
    """Arguments: (boxes, labels, scores), (boxes, labels), (boxes, labels), areas and kitti."""
    result: Any = DetDataSample(metainfo={"img_id": image_id, **metainfo})
    boxes, labels, scores = detections
    result.pred_instances = InstanceData(bboxes=boxes, labels=labels, scores=scores)
    result.gt_instances = InstanceData(bboxes=truths[0], labels=truths[1])
    if ignored is not None:
        result.ignored_instances = InstanceData(bboxes=ignored[0], labels=ignored[1])
    return result


def random_sample(generator: torch.Generator, image_id: int, n_truths: int) -> Any:
    truths = random_boxes(generator, n_truths), random_labels(generator, n_truths)
    near = truths[0] + torch.randint(-4, 5, truths[0].shape, generator=generator)
    boxes = torch.cat((truths[0], near, near + 1, random_boxes(generator, 3)))
    labels = torch.cat((truths[1], truths[1], truths[1], random_labels(generator, 3)))
    keep = torch.rand(len(boxes), generator=generator) < 0.6
    scores = torch.randint(1, 20, (len(boxes),), generator=generator) / 20  # many ties
    ignored = torch.cat((random_boxes(generator, 2), near[:1])), torch.tensor([0, 1, -1])
    ignored = ignored[0], ignored[1][: len(ignored[0])]
    return sample(image_id, (boxes[keep], labels[keep], scores[keep]), truths, ignored)


def random_samples(seed: int, n: int = 20) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.randperm(500, generator=generator)[:n]).tolist()
    counts = torch.randint(0, 7, (n,), generator=generator).tolist()
    samples = [random_sample(generator, i, count) for i, count in zip(ids, counts, strict=True)]
    samples[0].pred_instances = samples[0].pred_instances[:0]  # an image without detections
    del samples[1].ignored_instances
    return samples


def rows(instances: Any) -> list[tuple[list[float], int]]:
    if instances is None:
        return []
    return list(zip(instances.bboxes.tolist(), instances.labels.tolist(), strict=True))


def coco_evaluation(truth: dict | Path, found: list[dict], max_detections: int = 100) -> Any:
    """Evaluate detections in COCO's results format by pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco: Any = COCO(str(truth)) if isinstance(truth, Path) else COCO()
        if isinstance(truth, dict):
            coco.dataset = truth
            coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def coco_averages(evaluation: Any) -> dict[str, float]:
    """COCO's averages as pycocotools defines them, of a precision [T, R, K, A, M]."""
    every = evaluation.eval["precision"][..., -1]
    of_size = {name: every[..., size] for size, name in enumerate(("", *NAMES[3:]))}
    parts = {
        "AP": of_size[""],
        "AP50": of_size[""][0],
        "AP75": of_size[""][5],
        **{name: of_size[name] for name in NAMES[3:]},
    }
    known = {name: part[part > -1] for name, part in parts.items()}
    return {name: float(part.mean()) if part.size else math.nan for name, part in known.items()}


def overlap(box: list[float], other: list[float], of_box_only: bool = False) -> float:
    """Intersection over union, or over the area of `box`."""
    wide = min(box[2], other[2]) - max(box[0], other[0])
    high = min(box[3], other[3]) - max(box[1], other[1])
    common = max(wide, 0.0) * max(high, 0.0)
    area, its = ((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
    return common / (area if of_box_only else area + its - common)


def same(got: dict[str, float], expected: dict[str, float], tolerance: float = 1e-6) -> None:
    assert {key: got[key] for key in expected} == pytest.approx(
        expected, abs=tolerance, rel=0, nan_ok=True
    )
