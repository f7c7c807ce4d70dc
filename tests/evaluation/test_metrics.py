"""DetectionMetrics agrees with pycocotools and mmdet, however its images arrive."""

import math
import random
import warnings
from pathlib import Path
from typing import Any

from ldt.evaluation.metrics import (
    DetectionMetrics,  # before mmdet, which needs the operators of mmcv
)

# isort: split
import forked
import pytest
import torch
from detections import (
    CLASSES,
    coco_averages,
    coco_evaluation,
    overlap,
    random_samples,
    rows,
    same,
    sample,
)
from kitti_reference import CLASSES as KITTI_CLASSES
from kitti_reference import kitti_samples
from mmdet.evaluation import eval_map
from mmengine.structures import InstanceData
from real_data import COCO, needs
from torch.multiprocessing import start_processes

from ldt.data.coco import CocoDataModule


def computed(samples: list[Any], **options: int) -> dict[str, float]:
    metric = DetectionMetrics(CLASSES, **options)
    metric.update(samples)
    return metric.compute()


def coco_reference(samples: list[Any], max_detections: int = 100) -> dict[str, float]:
    """The same numbers by pycocotools, from annotations that are written out here."""
    truths, detections = [], []
    for s in samples:
        areas = s.get("areas", [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in s.gt_instances.bboxes])
        boxes = [
            (box, label, 0, float(area))
            for (box, label), area in zip(rows(s.gt_instances), areas, strict=True)
        ]
        for box, label in rows(s.get("ignored_instances")):
            of = [label] if label >= 0 else range(len(CLASSES))
            boxes += [(box, c, 1, 1.0) for c in of]
        truths += [
            annotation(s.img_id, label, box) | {"area": area, "iscrowd": crowd}
            for box, label, crowd, area in boxes
        ]
        detections += [
            annotation(s.img_id, label, box) | {"score": score}
            for (box, label), score in zip(
                rows(s.pred_instances), s.pred_instances.scores.tolist(), strict=True
            )
        ]
    content = {
        "info": {},
        "images": [{"id": s.img_id} for s in samples],
        "annotations": [truth | {"id": i} for i, truth in enumerate(truths, start=1)],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }
    evaluation = coco_evaluation(content, detections, max_detections)
    result = coco_averages(evaluation)
    for i, name in enumerate(CLASSES):
        precision = evaluation.eval["precision"][:, :, i, 0, -1]
        result[f"AP/{name}"] = precision.mean() if (precision > -1).all() else math.nan
    return result


def annotation(image_id: int, label: int, box: list[float]) -> dict:
    x1, y1, x2, y2 = box
    return {"image_id": image_id, "category_id": label + 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}


def voc_by_mmdet(samples: list[Any]) -> dict[str, float]:
    """The same numbers by mmdet's `eval_map`, of samples without ignored boxes."""
    results, annotations = [], []
    for s in sorted(samples, key=lambda s: s.img_id):
        found = torch.cat((s.pred_instances.bboxes, s.pred_instances.scores[:, None]), 1).numpy()
        labels = s.pred_instances.labels.numpy()
        results.append([found[labels == i] for i in range(len(CLASSES))])
        annotations.append(
            {"bboxes": s.gt_instances.bboxes.numpy(), "labels": s.gt_instances.labels.numpy()}
        )
    mean: Any
    classes: Any
    mean, classes = eval_map(results, annotations, iou_thr=0.5, nproc=1, logger="silent")
    per_class = {
        f"mAP/{name}": float(result["ap"]) if result["num_gts"] else math.nan
        for name, result in zip(CLASSES, classes, strict=True)
    }
    return {"mAP": mean} | per_class


def slow_voc(samples: list[Any], label: int) -> float:
    """AP at IoU 0.5 of one class, detection by detection; needs distinct scores."""
    found, missed = [], {}
    for s in samples:
        missed[s.img_id] = [box for box, c in rows(s.gt_instances) if c == label]
        scored = zip(rows(s.pred_instances), s.pred_instances.scores.tolist(), strict=True)
        found += [(score, s, box) for (box, c), score in scored if c == label]
    total, points, true, false = sum(map(len, missed.values())), [], 0, 0
    truths = {image: list(boxes) for image, boxes in missed.items()}
    for _, s, box in sorted(found, key=lambda each: -each[0]):
        best = max(truths[s.img_id], key=lambda truth: overlap(box, truth), default=None)
        regions = [b for b, c in rows(s.get("ignored_instances")) if c in (label, -1)]
        if best is not None and overlap(box, best) >= 0.5 and best in missed[s.img_id]:
            missed[s.img_id].remove(best)
            true += 1
        elif all(overlap(box, region, of_box_only=True) < 0.5 for region in regions):
            false += 1
        points.append((true / total, true / max(true + false, 1)))
    area, before = 0.0, 0.0
    for index, (recall, _) in enumerate(points):
        area += (recall - before) * max(precision for _, precision in points[index:])
        before = recall
    return area


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_pycocotools(seed):
    samples = random_samples(seed)
    expected = coco_reference(samples)
    assert all(0 < value < 1 for key, value in expected.items() if key != "AP/tram")
    same(computed(samples), expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_mmdet(seed):
    samples = random_samples(seed)
    for s in samples:
        if "ignored_instances" in s:
            del s.ignored_instances
    expected = voc_by_mmdet(samples)
    assert all(0 < value < 1 for key, value in expected.items() if key != "mAP/tram")
    same(computed(samples), expected)


@pytest.mark.parametrize("seed", range(5))
def test_map_agrees_with_a_slow_reference(seed):
    samples = random_samples(seed)
    generator = torch.Generator().manual_seed(seed)
    for s in samples:
        s.pred_instances.scores = torch.rand(len(s.pred_instances), generator=generator)
    expected = {f"mAP/{CLASSES[label]}": slow_voc(samples, label) for label in (0, 1, 3)}
    assert all(0 < value < 1 for value in expected.values())
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_neither_order_nor_batches_of_the_images_matter(seed):
    samples = [*random_samples(seed), *kitti_samples(seed)]
    expected = DetectionMetrics(KITTI_CLASSES)
    expected.update(samples)
    metric, generator = DetectionMetrics(KITTI_CLASSES), random.Random(seed)
    generator.shuffle(samples)
    while samples:
        size = generator.randint(0, 5)
        metric.update(samples[:size])
        samples = samples[size:]
    got = metric.compute()
    assert got["kitti_hard"] > 0
    same(got, expected.compute(), 0)


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


def test_a_region_is_matched_by_the_share_of_the_detection_within_it():
    truth, label = torch.tensor([[0.0, 0, 50, 50]]), torch.tensor([0])
    region = torch.tensor([[100.0, 100, 400, 400]]), torch.tensor([-1])  # IoU is at most 0.01
    for left, ignored in ((150.0, True), (85, True), (84, False), (60, False)):  # 100 - 30/2 = 85
        boxes = torch.cat((torch.tensor([[left, 150, left + 30, 180]]), truth))
        found = boxes, torch.tensor([0, 0]), torch.tensor([0.9, 0.8])
        got = computed([sample(0, found, (truth, label), region)])
        assert got["mAP"] == pytest.approx(1.0 if ignored else 0.5)
        assert got["AP50"] == pytest.approx(1.0 if ignored else 0.5, abs=0.01)


def test_an_object_within_a_region_is_found_there_and_a_second_box_on_it_is_ignored():
    truth, label = torch.tensor([[110.0, 110, 160, 160]]), torch.tensor([0])
    region = torch.tensor([[100.0, 100, 200, 200]]), torch.tensor([-1])
    found = truth.repeat(2, 1), torch.tensor([0, 0]), torch.tensor([0.9, 0.8])
    got = computed([sample(0, found, (truth, label), region)])
    assert got["AP"] == got["mAP"] == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(3))
def test_sizes_are_those_of_the_annotated_areas(seed):
    samples, generator = random_samples(seed), torch.Generator().manual_seed(seed)
    for s in samples[2:]:  # two images have no areas
        boxes = s.gt_instances.bboxes
        shares = torch.rand(len(boxes), generator=generator)  # of the box that the mask fills
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) * shares
        s.set_metainfo({"areas": areas.tolist()})
    expected = coco_reference(samples)
    same(computed(samples), expected)
    for s in samples[2:]:
        s.set_metainfo({"areas": [0.0] * len(s.areas)})
    assert computed(samples)["AP_small"] != pytest.approx(expected["AP_small"], abs=1e-3)


@pytest.mark.slow
@needs(COCO)
def test_real_annotations_agree_with_pycocotools():
    """All of the file's annotations count as they stand in it, their areas too."""
    data = CocoDataModule(root=str(COCO), scale=(64, 64), val_batch_size=1)
    generator, samples, found = torch.Generator().manual_seed(0), [], []
    for info in (data.dataset("val").get_data_info(i) for i in range(len(data.dataset("val")))):
        everything = [(each["bbox"], each["bbox_label"]) for each in info["instances"]]
        kept = [index for index, each in enumerate(info["instances"]) if not each["ignore_flag"]]
        boxes = torch.tensor([box for box, _ in everything]).reshape(-1, 4)
        labels = torch.tensor([label for _, label in everything]).long()
        moved = boxes + torch.randn(boxes.shape, generator=generator) * (boxes[:, 2:3] * 0.06)
        scores = torch.rand(len(boxes), generator=generator)
        ignored = [index for index in range(len(boxes)) if index not in kept]
        samples.append(
            sample(
                info["img_id"],
                (moved, labels, scores),
                (boxes[kept], labels[kept]),
                (boxes[ignored], labels[ignored]),
                areas=info["areas"],
            )
        )
        ids = data.dataset("val").cat_ids  # type: ignore[attr-defined]
        for (x1, y1, x2, y2), label, score in zip(
            moved.tolist(), labels.tolist(), scores.tolist(), strict=True
        ):
            box = [x1, y1, x2 - x1, y2 - y1]
            own = {"image_id": info["img_id"], "category_id": ids[label]}
            found.append(own | {"bbox": box, "score": score})
    metric = DetectionMetrics(data.classes)
    metric.update(samples)
    evaluation = coco_evaluation(COCO / "annotations/instances_val2017.json", found)
    same(metric.compute(), coco_averages(evaluation))


def crowd(count: int) -> Any:
    """An image with `count` objects, all of them found."""
    corner = torch.cartesian_prod(torch.arange(15), torch.arange(10))[:count] * 20.0
    boxes, labels = torch.cat((corner, corner + 16), 1), torch.zeros(count, dtype=torch.long)
    return sample(0, (boxes, labels, torch.linspace(0.5, 0.9, count)), (boxes, labels))


def test_as_many_detections_count_as_are_asked_for():
    metric = DetectionMetrics(CLASSES)
    metric.update([crowd(150)])
    with pytest.warns(UserWarning, match=r"150 objects.*type dataset\.max_detections=150"):
        assert metric.compute()["AP"] == pytest.approx(2 / 3, abs=0.01)
    metric.reset()
    metric.update([crowd(150)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metric.compute()["AP"] < 0.7  # it was said already
        assert computed([crowd(150)], max_detections=150)["AP"] == pytest.approx(1.0)
        assert computed([crowd(100)])["AP"] == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:an image has")
@pytest.mark.parametrize("most", [1, 3, 15, 300])
def test_any_number_of_detections_agrees_with_pycocotools(most):
    samples = [*random_samples(0), crowd(150)]
    same(computed(samples, max_detections=most), coco_reference(samples, most))


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
    with pytest.raises(ValueError, match=r"dataset\.max_detections=0; allowed.*at least 1"):
        DetectionMetrics(["car"], max_detections=0)
    with pytest.raises(ValueError, match="image 0 has 2 areas for 1 gt_instances"):
        metric.update([sample(0, found, (boxes, good), areas=[1.0, 2.0])])


def mixed_samples() -> list[Any]:
    """Thirty samples, of which every second one is of KITTI."""
    pairs = zip(random_samples(0, 15), kitti_samples(0, 15), strict=True)
    return [each for pair in pairs for each in pair]


def compute_in_process(rank: int, folder: str, shares: tuple[tuple[int, int], ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(shares)
    )
    for turn, bounds in enumerate((shares, ((0, 30), (0, 0)))):  # the second: one saw no image
        metric = DetectionMetrics(KITTI_CLASSES).to("cpu")
        if bounds[rank] != (0, 0):
            metric.update(mixed_samples()[slice(*bounds[rank])])
        torch.save(metric.compute(), f"{folder}/{turn}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_uneven_shares_equal_one(tmp_path: Path):
    shares = ((0, 13), (11, 30))  # two images are in both
    forked.start_server()
    given = (str(tmp_path), shares)
    start_processes(compute_in_process, given, nprocs=2, start_method="forkserver")
    metric = DetectionMetrics(KITTI_CLASSES)
    metric.update(mixed_samples())
    expected = metric.compute()
    assert expected["kitti_hard"] > 0
    for turn in range(2):
        for rank in range(2):
            same(torch.load(tmp_path / f"{turn}-{rank}.pt"), expected, 0)
