"""DetectionMetrics agrees with pycocotools and mmdet, however its images arrive."""

import contextlib
import io
import math
from pathlib import Path
from typing import Any

from ldt.evaluation.metrics import (
    DetectionMetrics,  # before mmdet, which needs the operators of mmcv
)

# isort: split
import forked
import numpy as np
import pytest
import torch
from mmdet.evaluation import eval_map
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.multiprocessing import start_processes

CLASSES = ("car", "person", "tram", "cyclist")  # no tram in the random samples
SIZES = (12.0, 30.0, 60.0, 95.0, 150.0)


def random_boxes(generator: torch.Generator, n: int) -> Tensor:
    """Integer boxes [n, 4] of all of COCO's sizes: exact IoUs and exact ties do happen."""
    corner = torch.randint(0, 300, (n, 2), generator=generator).float()
    side = torch.tensor(SIZES)[torch.randint(0, len(SIZES), (n, 2), generator=generator)]
    return torch.cat((corner, corner + side), dim=1)


def random_labels(generator: torch.Generator, n: int) -> Tensor:
    return torch.tensor([0, 1, 3])[torch.randint(0, 3, (n,), generator=generator)]


def sample(image_id, detections, truths, ignored=None) -> Any:
    """Arguments: (boxes, labels, scores), (boxes, labels), (boxes, labels)."""
    result: Any = DetDataSample(metainfo={"img_id": image_id})
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


def computed(samples: list[Any]) -> dict[str, float]:
    metric = DetectionMetrics(CLASSES)
    metric.update(samples)
    return metric.compute()


def coco_reference(samples: list[Any]) -> dict[str, float]:
    """The same numbers by pycocotools, from annotations that are written out here."""
    truths, detections = [], []
    for s in samples:
        boxes = [(*box, label, 0) for box, label in rows(s.gt_instances)]
        for box, label in rows(s.get("ignored_instances")):
            boxes += [(*box, c, 1) for c in ([label] if label >= 0 else range(len(CLASSES)))]
        for x1, y1, x2, y2, label, crowd in boxes:
            area, box = (x2 - x1) * (y2 - y1), [x1, y1, x2 - x1, y2 - y1]
            truths.append(annotation(s.img_id, label, box) | {"area": area, "iscrowd": crowd})
        for (box, label), score in zip(
            rows(s.pred_instances), s.pred_instances.scores.tolist(), strict=True
        ):
            box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            detections.append(annotation(s.img_id, label, box) | {"score": score})
    for i, truth in enumerate(truths, start=1):
        truth["id"] = i
    with contextlib.redirect_stdout(io.StringIO()):
        coco: Any = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": s.img_id} for s in samples],
            "annotations": truths,
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    stats = [value if value >= 0 else math.nan for value in evaluation.stats[:6].tolist()]
    result: dict[str, float] = dict(zip(names, stats, strict=True))
    for i, name in enumerate(CLASSES):
        precision = evaluation.eval["precision"][:, :, i, 0, 2]
        result[f"AP/{name}"] = precision.mean() if (precision > -1).all() else math.nan
    return result


def rows(instances: Any) -> list[tuple[list[float], int]]:
    if instances is None:
        return []
    return list(zip(instances.bboxes.tolist(), instances.labels.tolist(), strict=True))


def annotation(image_id: int, label: int, box: list[float]) -> dict:
    return {"image_id": image_id, "category_id": label + 1, "bbox": box}


def voc_reference(samples: list[Any]) -> dict[str, float]:
    """The same numbers by mmdet's `eval_map`."""
    results, annotations = [], []
    for s in sorted(samples, key=lambda s: s.img_id):
        found = torch.cat((s.pred_instances.bboxes, s.pred_instances.scores[:, None]), 1).numpy()
        labels = s.pred_instances.labels.numpy()
        results.append([found[labels == i] for i in range(len(CLASSES))])
        ignored = [
            (box, c)
            for box, label in rows(s.get("ignored_instances"))
            for c in ([label] if label >= 0 else range(len(CLASSES)))
        ]
        annotations.append(
            {
                "bboxes": s.gt_instances.bboxes.numpy(),
                "labels": s.gt_instances.labels.numpy(),
                "bboxes_ignore": np.array([box for box, _ in ignored], np.float32).reshape(-1, 4),
                "labels_ignore": np.array([c for _, c in ignored], int),
            }
        )
    mean: Any
    classes: Any
    mean, classes = eval_map(results, annotations, iou_thr=0.5, nproc=1, logger="silent")
    per_class = {
        f"mAP/{name}": float(result["ap"]) if result["num_gts"] else math.nan
        for name, result in zip(CLASSES, classes, strict=True)
    }
    return {"mAP": mean} | per_class


def same(got: dict[str, float], expected: dict[str, float], tolerance: float = 1e-6) -> None:
    assert {key: got[key] for key in expected} == pytest.approx(
        expected, abs=tolerance, rel=0, nan_ok=True
    )


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_pycocotools(seed):
    samples = random_samples(seed)
    expected = coco_reference(samples)
    assert all(0 < value < 1 for key, value in expected.items() if key != "AP/tram")
    same(computed(samples), expected)


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_mmdet(seed):
    samples = random_samples(seed)
    expected = voc_reference(samples)
    assert all(0 < value < 1 for key, value in expected.items() if key != "mAP/tram")
    same(computed(samples), expected)


def test_class_without_truths_is_nan_and_the_others_keep_their_names():
    got = computed(random_samples(0))
    assert math.isnan(got["AP/tram"])
    assert math.isnan(got["mAP/tram"])
    assert not math.isnan(got["AP/cyclist"])


def test_detections_of_an_unannotated_class_change_nothing():
    samples = random_samples(0)
    expected = computed(samples)
    for s in samples:
        found = s.pred_instances
        false = InstanceData(
            bboxes=found.bboxes, labels=torch.full_like(found.labels, 2), scores=found.scores
        )
        s.pred_instances = InstanceData.cat([found, false])
    same(computed(samples), expected, 0)


def test_a_box_exactly_at_a_threshold_counts():
    box, label = torch.tensor([[0.0, 0, 100, 100]]), torch.tensor([0])
    found = torch.tensor([[0.0, 0, 60, 100]]), label, torch.ones(1)  # IoU 0.6: right at 3 of 10
    samples = [sample(0, found, (box, label))]
    assert computed(samples)["AP"] == pytest.approx(0.3)
    same(computed(samples), coco_reference(samples))


def test_order_of_images_does_not_matter():
    samples = random_samples(1)
    same(computed(samples[::-1]), computed(samples), 0)


def test_merging_two_halves_is_one():
    samples = random_samples(2)
    halves = DetectionMetrics(CLASSES), DetectionMetrics(CLASSES)
    halves[0].update(samples[:7])
    for s in samples[7:]:
        halves[1].update([s])
    halves[0].merge_state(halves[1])
    same(halves[0].compute(), computed(samples), 0)


def test_an_image_that_comes_twice_counts_once():
    samples = random_samples(3)
    same(computed([*samples, *samples[:5]]), computed(samples), 0)


def test_equal_boxes_of_one_image_all_count():
    box, label = torch.tensor([[0.0, 0, 50, 50]] * 2), torch.tensor([0, 0])
    got = computed([sample(0, (box[:1], label[:1], torch.ones(1)), (box, label))])
    assert got["mAP"] == pytest.approx(0.5)


def test_perfect_detector_gets_one():
    samples = random_samples(4)
    for s in samples:
        truths = s.gt_instances
        s.pred_instances = InstanceData(
            bboxes=truths.bboxes, labels=truths.labels, scores=torch.ones(len(truths.labels))
        )
        if "ignored_instances" in s:
            del s.ignored_instances  # a region over an object may swallow the detection of it
    got = computed(samples)
    perfect = {key: 1.0 for key in got if not key.endswith("/tram")}
    same(got, perfect | {"AP/tram": math.nan, "mAP/tram": math.nan})


@pytest.mark.parametrize("label", [0, -1])
def test_detection_in_an_ignored_region_is_no_false_positive(label):
    truth = torch.tensor([[0.0, 0, 50, 50]]), torch.tensor([0])
    region = torch.tensor([[100.0, 100, 200, 200]])
    found = torch.cat((region, truth[0])), torch.tensor([0, 0]), torch.tensor([0.9, 0.8])
    with_region = computed([sample(0, found, truth, (region, torch.tensor([label])))])
    without = computed([sample(0, found, truth)])
    other_class = computed([sample(0, found, truth, (region, torch.tensor([1])))])
    for key in ("AP", "AP50", "mAP"):
        assert with_region[key] == pytest.approx(1.0)
        assert without[key] == other_class[key] == pytest.approx(0.5, abs=0.01)


def test_nothing_to_measure_is_nan():
    empty = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    keys = computed(random_samples(0)).keys()
    one_image = computed([sample(0, (*empty, torch.zeros(0)), empty)])
    with pytest.warns(UserWarning, match="before the ``update``"):
        no_image = DetectionMetrics(CLASSES).compute()
    for got in (one_image, no_image):
        assert got.keys() == keys
        assert all(math.isnan(value) for value in got.values())


def test_no_detection_at_all_is_zero():
    samples = random_samples(0)
    for s in samples:
        s.pred_instances = s.pred_instances[:0]
    got = computed(samples)
    assert got["AP"] == got["mAP"] == got["AP/car"] == got["mAP/car"] == 0


def test_reset_forgets():
    metric = DetectionMetrics(CLASSES)
    metric.update(random_samples(0))
    metric.reset()
    metric.update(random_samples(1))
    same(metric.compute(), computed(random_samples(1)), 0)


def test_errors_say_what_to_do():
    boxes, good = torch.zeros(1, 4), torch.tensor([0])
    found = boxes, good, torch.ones(1)
    metric = DetectionMetrics(CLASSES)
    with pytest.raises(ValueError, match="same classes"):
        metric.update([sample(0, found, (boxes, torch.tensor([4])))])
    with pytest.raises(ValueError, match="from -1 to -1"):
        metric.update([sample(0, (boxes, torch.tensor([-1]), torch.ones(1)), (boxes, good))])
    with pytest.raises(ValueError, match="PackDetInputs"):
        metric.update([sample("a.png", found, (boxes, good))])
    unlabelled = sample(0, found, (boxes, good))
    unlabelled.gt_instances = InstanceData()
    with pytest.raises(ValueError, match="LoadAnnotations"):
        metric.update([unlabelled])
    with pytest.raises(ValueError, match="each name once"):
        DetectionMetrics(["car", "car"])


def compute_in_process(rank: int, folder: str, shares: tuple[tuple[int, int], ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(shares)
    )
    for turn, bounds in enumerate((shares, ((0, 20), (0, 0)))):  # the second: one saw no image
        metric = DetectionMetrics(CLASSES).to("cpu")
        if bounds[rank] != (0, 0):
            metric.update(random_samples(0)[slice(*bounds[rank])])
        torch.save(metric.compute(), f"{folder}/{turn}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_uneven_shares_equal_one(tmp_path: Path):
    shares = ((0, 13), (11, 20))  # two images are in both
    forked.start_server()
    given = (str(tmp_path), shares)
    start_processes(compute_in_process, given, nprocs=2, start_method="forkserver")
    expected = computed(random_samples(0))
    for turn in range(2):
        for rank in range(2):
            same(torch.load(tmp_path / f"{turn}-{rank}.pt"), expected, 0)
