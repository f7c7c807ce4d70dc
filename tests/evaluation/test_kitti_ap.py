"""KITTI's AP is that of a slow reference, and follows the rules of the development kit."""

import math

import ldt.evaluation.metrics  # before mmdet, which needs the operators of mmcv

# isort: split
import kitti_reference
import pytest
import torch
from detections import random_samples, same, sample
from kitti_reference import CLASSES, kitti_samples
from real_data import KITTI, needs

from ldt.data.kitti import KittiDataModule, KittiObject
from ldt.data.roadscenes import RoadScenesDataModule
from ldt.report.terminal import KITTI as SHOWN

BOX = (100.0, 100.0, 150.0, 160.0)


def computed(samples, classes=CLASSES):
    metric = ldt.evaluation.metrics.DetectionMetrics(classes)
    metric.update(samples)
    return {key: value for key, value in metric.compute().items() if key.startswith("kitti")}


def item(name="Car", box=BOX, truncation=0.0, occlusion=0):
    return KittiObject(name, box, box, truncation, occlusion)


def frame(image, objects, found, classes=CLASSES):
    """Arguments: objects, and detections as (box, class, score)."""
    boxes = torch.tensor([box for box, _, _ in found]).reshape(-1, 4)
    labels = torch.tensor([classes.index(name) for _, name, _ in found]).long()
    none = torch.zeros(0, 4), torch.zeros(0).long()
    scores = torch.tensor([score for *_, score in found]).reshape(-1)
    return sample(image, (boxes, labels, scores), none, kitti=objects)


def many(objects, found, count=41):
    """The same image so often that 40 recalls can be reached, with a Cyclist that is found."""
    cyclist = (300.0, 100.0, 350.0, 160.0)
    objects, found = [*objects, item("Cyclist", cyclist)], [*found, (cyclist, "Cyclist", 0.9)]
    return [frame(i, objects, found) for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_the_slow_reference(seed):
    samples = kitti_samples(seed, 100)
    expected = kitti_reference.kitti_ap(samples)
    assert set(SHOWN) < expected.keys()
    assert all(0.02 < expected[key] < 1 for key in SHOWN)
    got = computed(samples)
    assert list(got) == [*SHOWN, *(key for key in got if "/" in key)]
    assert got.keys() == expected.keys()
    same(got, expected)


@pytest.mark.parametrize("count", [1, 5, 40, 41, 100])
def test_a_perfect_detector_gets_what_the_number_of_objects_allows(count):
    got = computed(many([item()], [(BOX, "Car", 0.9)], count))
    assert got["kitti_easy"] == pytest.approx(min(count - 1, 40) / 40)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "counts_at"),
    [
        ({}, ("easy", "moderate", "hard")),
        ({"box": (100.0, 100.0, 150.0, 140.0)}, ("moderate", "hard")),  # higher than 40, not 40
        ({"box": (100.0, 100.0, 150.0, 125.0)}, ()),
        ({"occlusion": 1}, ("moderate", "hard")),
        ({"occlusion": 2}, ("hard",)),
        ({"occlusion": 3}, ()),
        ({"truncation": 0.15}, ("easy", "moderate", "hard")),
        ({"truncation": 0.2}, ("moderate", "hard")),
        ({"truncation": 0.5}, ("hard",)),
        ({"truncation": 0.6}, ()),
        ({"name": "Van"}, ()),
    ],
)
def test_an_object_beyond_a_limit_is_ignored_whether_found_or_not(change, counts_at):
    other = (200.0, 100.0, 250.0, 160.0)  # a car that counts and is found
    objects = [item(), item(**change | {"name": change.get("name", "Car")})]
    objects[0] = item(box=other)
    found = [(other, "Car", 0.8)]
    without, with_it = many(objects, found), many(objects, [*found, (objects[1].box, "Car", 0.9)])
    missed, both = computed(without), computed(with_it)
    for level in ("easy", "moderate", "hard"):
        assert both[f"kitti_{level}/Car"] == pytest.approx(1)
        expected = 0.5 if level in counts_at else 1
        assert missed[f"kitti_{level}/Car"] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("name", "kind"), [("Van", "Car"), ("Person_sitting", "Pedestrian")])
@pytest.mark.parametrize("classes", [CLASSES, ("Car", "Van", "Pedestrian", "Person_sitting")])
def test_neighbours_are_ignored_under_any_grouping(name, kind, classes):
    own, beside = (200.0, 100.0, 250.0, 160.0), item(name)
    found = [(own, kind, 0.8), (BOX, kind, 0.9)]
    if name in classes:
        found.append((BOX, name, 0.95))  # of a class that the benchmark does not have
    samples = [frame(i, [item(kind, own), beside], found, classes) for i in range(41)]
    assert computed(samples, classes)[f"kitti_easy/{kind}"] == pytest.approx(1)
    truck = [frame(i, [item(kind, own), item("Truck")], found, classes) for i in range(41)]
    assert computed(truck, classes)[f"kitti_easy/{kind}"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("name", "share"), [("Car", 0.7), ("Pedestrian", 0.5), ("Cyclist", 0.5)])
def test_a_match_must_exceed_the_overlap_of_its_class(name, share):
    box = (0.0, 0.0, 100.0, 100.0)
    for width, true in ((100 * share + 1, True), (100 * share, False)):
        found = [((0.0, 0.0, width, 100.0), name, 0.9)]
        got = computed([frame(i, [item(name, box)], found) for i in range(41)])
        assert got[f"kitti_easy/{name}"] == (1 if true else 0)


@pytest.mark.parametrize(("name", "share"), [("Car", 0.7), ("Pedestrian", 0.5)])
def test_a_detection_in_a_dontcare_region_is_matched_by_its_own_area(name, share):
    region = item("DontCare", (400.0, 0.0, 1000.0, 300.0), -1, -1)
    for left, ignored in ((600.0, True), (401 - 50 * (1 - share), True), (370.0, False)):
        found = [(BOX, name, 0.8), ((left, 100.0, left + 50, 160.0), name, 0.9)]
        got = computed(many([item(name), region], found))
        assert got[f"kitti_easy/{name}"] == pytest.approx(1 if ignored else 0.5, abs=0.02)


def test_a_false_detection_below_the_minimum_height_is_ignored():
    for height, expected in ((40.0, (0.5, 0.5)), (39.0, (1, 0.5)), (24.0, (1, 1))):
        found = [(BOX, "Car", 0.8), ((500.0, 100.0, 550.0, 100 + height), "Car", 0.9)]
        got = computed(many([item()], found))
        for level, value in zip(("easy", "moderate"), expected, strict=True):
            assert got[f"kitti_{level}/Car"] == pytest.approx(value, abs=0.02)


def test_a_small_detection_of_any_class_takes_an_object_if_its_score_is_the_highest():
    """The development kit looks at the height of a detection before its class."""
    tall, small = (100.0, 100.0, 150.0, 142.0), (100.0, 100.0, 150.0, 139.0)
    for kind in ("Car", "Pedestrian"):
        found = [(tall, "Car", 0.8), (small, kind, 0.9)]
        got = computed(many([item(box=tall)], found))
        assert got["kitti_easy/Car"] == 0
    below = computed(many([item(box=tall)], [(tall, "Car", 0.8), (small, "Pedestrian", 0.7)]))
    assert below["kitti_easy/Car"] == 1


def test_the_order_of_two_detectors_may_differ_from_that_of_map():
    """What KITTI ignores is an error in mAP: cars too far away to count."""
    far = (400.0, 100.0, 420.0, 115.0)
    truths = torch.tensor([BOX, far]), torch.tensor([1, 1])
    ways = {}
    for name, boxes in (("near", [BOX, (600.0, 0.0, 620.0, 15.0)]), ("both", [BOX, far])):
        found = torch.tensor(boxes), torch.tensor([1, 1]), torch.tensor([0.8, 0.9])
        samples = [sample(i, found, truths, kitti=[item(), item(box=far)]) for i in range(41)]
        metric = ldt.evaluation.metrics.DetectionMetrics(CLASSES)
        metric.update(samples)
        ways[name] = metric.compute()
    assert ways["near"]["kitti_easy"] == ways["both"]["kitti_easy"] == pytest.approx(1)
    assert ways["near"]["mAP"] < ways["both"]["mAP"] - 0.4


def test_no_object_that_counts_is_nan_and_no_kitti_has_no_key():
    got = computed([frame(0, [item("Van")], [(BOX, "Car", 0.9)])])
    assert set(SHOWN) < got.keys()
    assert all(math.isnan(value) for value in got.values())
    assert computed(random_samples(0)) == {}
    assert computed([frame(0, [item()], [], ("dog", "cat"))], ("dog", "cat")) == {}


def test_an_image_without_objects_or_detections_changes_nothing_or_adds_errors():
    samples = many([item()], [(BOX, "Car", 0.9)])
    expected = computed(samples)
    same(computed([*samples, frame(99, [], [])]), expected, 0)
    false = [frame(100 + i, [], [(BOX, "Car", 0.95)]) for i in range(41)]
    assert computed([*samples, *false])["kitti_easy/Car"] == pytest.approx(0.5)


@needs(KITTI)
@pytest.mark.parametrize("grouping", ["merged", "strict"])
def test_real_labels_reach_the_metric_unchanged_through_the_pipeline(grouping):
    data = KittiDataModule(root=str(KITTI), scale=(64, 32), grouping=grouping, val_batch_size=6)
    samples = []
    for batch in data.val_dataloader():
        samples += batch["data_samples"]
        if len(samples) >= 12:
            break
    generator = torch.Generator().manual_seed(0)
    for each in samples:
        boxes = torch.tensor([o.labelled for o in each.kitti if o.name != "DontCare"])
        shift = torch.rand(boxes.shape, generator=generator) * 8 - 4
        labels = torch.randint(0, 3, (len(boxes),), generator=generator) * (shift[:, 0] > 2)
        each.pred_instances = type(each.gt_instances)(
            bboxes=boxes + shift, labels=labels, scores=torch.rand(len(boxes), generator=generator)
        )
    expected = kitti_reference.kitti_ap(samples, data.classes)
    assert expected["kitti_hard/Car"] > 0.1
    same(computed(samples, data.classes), expected)
    label = (KITTI / "training/label_2" / f"{data.split_ids()['val'][0]}.txt").read_text()
    written = [line.split() for line in label.splitlines()]
    assert [o.name for o in samples[0].kitti] == [line[0] for line in written]
    for each, line in zip(samples[0].kitti, written, strict=True):
        assert [each.truncation, each.occlusion] == [float(line[1]), float(line[2])]
        assert list(each.labelled) == [float(value) for value in line[4:8]]


def test_generated_scenes_have_no_kitti_numbers(tmp_path):
    data = RoadScenesDataModule(cache=str(tmp_path), train=1, val=1, scale=(64, 32))
    [batch] = data.val_dataloader()
    assert "kitti" not in batch["data_samples"][0]


def test_objects_of_ones_own_types_are_absent():
    car, found = item(), [(BOX, "Car", 0.9)]
    with_bus = many([car, item("bus", (0, 0, 50, 60))], found)
    assert computed(with_bus) == pytest.approx(computed(many([car], found)), nan_ok=True)
