"""Laws of COCO's annotation files."""

import contextlib
import io
import json
import re
import shlex

import cv2
import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from mmdet.datasets import CocoDataset
from real_data import COCO, needs

from ldt.data.coco import CLASSES, CocoDataModule, check_classes

NAMES = ("cat", "dog", "bird")


def box(image, category, corner=(4, 5), crowd=0):
    fields = {"image_id": image, "category_id": category, "iscrowd": crowd, "area": 80.0}
    return {**fields, "bbox": [*corner, 10, 8], "segmentation": [[0, 0, 1, 1, 2, 2]]}


def content():
    """Three images: a cat and a dog; nothing; a bird and a crowd of dogs."""
    names = [f"{index:03d}.png" for index in (1, 2, 3)]
    size = {"width": 60, "height": 40}
    annotations = [box(11, 5), box(11, 7), box(13, 9), box(13, 7, (20, 20), crowd=1)]
    return {
        "images": [
            {"id": index, "file_name": n, **size}
            for index, n in zip((11, 12, 13), names, strict=True)
        ],
        "annotations": [{"id": index, **item} for index, item in enumerate(annotations)],
        "categories": [{"id": i, "name": n} for i, n in zip((5, 7, 9), NAMES, strict=True)],
    }


def write_coco(root, annotations):
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        file = root / f"annotations/instances_{split}2017.json"
        file.write_text(annotations if isinstance(annotations, str) else json.dumps(annotations))
        (root / f"{split}2017").mkdir()
        for index in (1, 2, 3):
            pixels = np.zeros((40, 60, 3), np.uint8)
            assert cv2.imwrite(str(root / f"{split}2017/{index:03d}.png"), pixels)
    return root


def module(folder, **options):
    return CocoDataModule(**{"root": str(folder), "scale": (60, 40), "classes": NAMES, **options})


def samples(loader):
    return [sample for batch in loader for sample in batch["data_samples"]]


@pytest.mark.slow
def test_crowds_are_ignored_and_empty_images_are_kept(tmp_path):
    data = module(write_coco(tmp_path, content()), augment="none")
    for loader in (data.val_dataloader(), data.probe_dataloader("train", 2)):
        pair, nothing, bird = samples(loader)
        assert pair.gt_instances.labels.tolist() == [0, 1]
        assert len(pair.ignored_instances) == 0
        assert (len(nothing.gt_instances), len(nothing.ignored_instances)) == (0, 0)
        assert bird.gt_instances.labels.tolist() == [2]
        assert bird.ignored_instances.labels.tolist() == [1]
        assert bird.ignored_instances.bboxes.tensor.tolist() == [[20, 20, 30, 28]]
    assert sorted(sample.img_id for sample in samples(data.train_dataloader())) == [11, 12, 13]
    assert data.split_ids() == {"train": [11, 12, 13], "val": [11, 12, 13]}


@pytest.mark.slow
def test_validation_knows_the_annotated_area_of_every_object(tmp_path):
    annotated = content()
    for area, annotation in enumerate(annotated["annotations"], start=1):
        annotation["area"] = area  # the last one is the crowd
    unmeasured = {"id": 99, **box(11, 5, (5, 5))}
    annotated["annotations"][1:1] = [unmeasured | {"area": area} for area in (0, -1, None)]
    annotated["annotations"].insert(1, {k: v for k, v in unmeasured.items() if k != "area"})
    data = module(write_coco(tmp_path, annotated), augment="mosaic")
    of_boxes = [10 * 8] * 4
    assert [s.areas for s in samples(data.val_dataloader())] == [[1, *of_boxes, 2], [], [3]]
    assert all("areas" not in sample for sample in samples(data.train_dataloader()))


LEFT_OUT = {  # an annotation, and what is told of it
    "boxes outside of their image": {"bbox": [60, 5, 10, 8]},
    "boxes narrower or lower than a pixel": {"bbox": [4, 5, 10, -8]},
    "boxes with less than a pixel inside": {"bbox": [59.5, 5, 10, 8]},
    "annotations marked `ignore`": {"ignore": 1},
    "annotations of categories that are not in the file": {"category_id": 0},
    "annotations of classes that are not in dataset.classes": {"category_id": 9},
    "annotations of images that are not in the file": {"image_id": 99},
}


@pytest.mark.parametrize("reason", LEFT_OUT)
def test_annotations_that_are_left_out_are_counted_with_an_example(tmp_path, caplog, reason):
    broken = content()
    broken["annotations"] = [box(11, 5), *({"id": 70, **box(11, 5), **LEFT_OUT[reason]},) * 2]
    data = module(write_coco(tmp_path, broken), classes=("cat", "dog"))
    assert data.object_counts("val") == [1, 0]
    ((told, entry),) = data.told("val").entries.items()
    assert told.startswith(reason)
    assert told.endswith("left out")
    assert (entry.count, "annotation 70 of" in entry.example) == (2, True)
    assert (f"{told}: 2 (the first: annotation 70 of" in caplog.text) != entry.expected


def test_all_that_is_left_is_what_mmdet_keeps_and_every_box_has_a_pixel_in_its_image(tmp_path):
    annotated, rng = content(), np.random.default_rng(0)
    boxes = np.round(rng.uniform([-20, -20, -2, -2], [70, 50, 30, 30], (300, 4)), 1).tolist()
    annotated["annotations"] = [
        {"id": i, **box(11, rng.choice([4, 5, 7]).item()), "bbox": b} for i, b in enumerate(boxes)
    ]
    data = module(write_coco(tmp_path, annotated))
    found = data.dataset("train").get_data_info(0)["instances"]
    assert len(found) + sum(e.count for e in data.told("train").entries.values()) == 300
    assert 50 < len(found) < 200
    for instance in found:
        x1, y1, x2, y2 = instance["bbox"]
        assert min(x2, 60) - max(x1, 0) >= 1
        assert min(y2, 40) - max(y1, 0) >= 1


def test_relative_boxes_are_refused(tmp_path):
    relative = content()
    for annotation in relative["annotations"]:
        annotation["bbox"] = [0.1, 0.2, 0.5, 0.25]
    with pytest.raises(ValueError, match=r"train2017\.json: all boxes are within 0 and 1"):
        module(write_coco(tmp_path, relative)).setup()


def test_boxes_that_look_like_corners_are_told(tmp_path):
    for name, widest in (("corners", 55), ("sizes", 30)):
        annotated = content()
        annotated["annotations"] = [
            {**box(11, 5), "bbox": [10 + i, 5, widest - i, 30]} for i in range(10)
        ]
        data = module(write_coco(tmp_path / name, annotated))
        told = "\n".join(data.told("train").lines())
        assert ("as if written as x1, y1, x2, y2" in told) == (name == "corners")


def test_categories_of_one_name_are_one_class(tmp_path, caplog):
    twice = content()
    twice["categories"].append({"id": 8, "name": "dog"})
    twice["annotations"].append({"id": 80, **box(12, 8)})
    data = module(write_coco(tmp_path, twice))
    assert data.object_counts("train") == [1, 2, 1]
    assert "merged to one class each: 1 (the first: 'dog': [7, 8])" in caplog.text
    twice["categories"][-1] = {"id": 7, "name": "hound"}
    with pytest.raises(ValueError, match="category id 7 has two names: 'dog', 'hound'"):
        module(write_coco(tmp_path / "other", twice)).setup()
    with pytest.raises(ValueError, match=r"dataset\.classes has 'cat' twice"):
        module(tmp_path, classes=("cat", "dog", "cat"))


def test_sizes_that_are_not_those_of_the_images_are_refused(tmp_path):
    stale = content()
    for image in stale["images"][1:]:
        image |= {"width": 120, "height": 80}
    with pytest.raises(ValueError, match=r"2 of 3 images.*002\.png has 60x40 .* are 120x80"):
        module(write_coco(tmp_path / "stale", stale)).setup()
    rounded = content()
    rounded["images"][1]["width"] = 61
    data = module(write_coco(tmp_path / "rounded", rounded))
    assert {data.dataset("val").get_data_info(i)["width"] for i in range(3)} == {60}
    assert data.told("val").lines()


def test_an_object_that_is_annotated_twice_is_told_and_stays(tmp_path):
    twice = content()
    twice["annotations"] += [dict(twice["annotations"][0]), box(12, 5), box(11, 9)]
    data = module(write_coco(tmp_path, twice))
    assert data.object_counts("train") == [3, 1, 2]
    (line,) = data.told("train").lines()
    assert line.startswith("objects annotated again with an equal box: 1 (the first: annotation 0 ")


def test_an_image_under_two_ids_is_told(tmp_path):
    twice = content()
    twice["images"].append({**twice["images"][0], "id": 14})
    data = module(write_coco(tmp_path, twice))
    assert data.told("train").lines() == [
        "images listed again under another id: 1 (the first: 001.png)"
    ]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_may_be_in_any_unicode_encoding(tmp_path, encoding):
    write_coco(tmp_path, content())
    file = tmp_path / "annotations/instances_train2017.json"
    file.write_text(file.read_text(encoding="utf-8"), encoding=encoding)
    data = module(tmp_path)
    assert data.split_ids()["train"] == data.split_ids()["val"]
    found = data.fingerprint()
    assert found["train"]["ids"] == found["val"]["ids"]


@pytest.mark.parametrize("classes", [("dog", "cat"), ("cat", "dog"), ("bird",)])
def test_labels_follow_the_order_of_the_classes(tmp_path, classes):
    data = module(write_coco(tmp_path, content()), classes=classes)
    wanted = [["cat", "dog"], [], ["bird"]]
    for sample, names in zip(samples(data.val_dataloader()), wanted, strict=True):
        read = [data.classes[label] for label in sample.gt_instances.labels]
        assert read == [name for name in names if name in classes]


def test_the_default_is_cocos_80_classes():
    for none in ((), None):
        assert CocoDataModule(classes=none).classes == CLASSES
    assert len(CLASSES) == 80


def test_names_of_classes_are_told_as_they_are_typed(tmp_path):
    with pytest.raises(ValueError, match="no class") as told:
        check_classes(["x"], ["große Katze", 'a "b"', "c"], tmp_path)
    typed = re.search(r"type for example (.*)\)$", str(told.value))
    assert typed
    (given,) = shlex.split(typed[1])
    override = OverridesParser.create().parse_override(given)
    assert override.value() == ["große Katze", 'a "b"']


def test_an_unknown_class_is_named_with_those_available(tmp_path):
    write_coco(tmp_path, content())
    with pytest.raises(ValueError, match="no class 'horse'; available: cat, dog, bird"):
        module(tmp_path, classes=("cat", "horse")).setup()


def test_missing_images_are_counted_and_the_first_is_named(tmp_path):
    write_coco(tmp_path, content())
    for name in ("002.png", "003.png"):
        (tmp_path / "val2017" / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 3 images .*val2017/002\.png"):
        module(tmp_path).setup("validate")


def without(group, key):
    broken = content()
    del broken[group][0][key]
    return broken


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("{", "is not a JSON file"),
        ("[]", "not in COCO's format: expected a list under 'images'"),
        ({**content(), "categories": {}}, "expected a list under 'categories'"),
        ({**content(), "images": []}, "lists no image"),
        (without("images", "width"), "no 'width'"),
        (without("annotations", "bbox"), "no 'bbox'"),
        (json.dumps(content()).replace("80.0", "NaN", 1), "'area' is 'nan'; expected a number"),
        (json.dumps(content()).replace("[4, 5,", "[4, Infinity,"), "expected four numbers"),
        (json.dumps(content()).replace('"id": 11', '"id": "11"'), "expected a whole number"),
        (without("annotations", "image_id"), "no 'image_id'"),
    ],
)
def test_a_bad_annotation_file_is_named(tmp_path, broken, said):
    write_coco(tmp_path, broken)
    with pytest.raises(ValueError, match=rf"instances_train2017\.json.*{said}"):
        module(tmp_path).setup()


def test_missing_files_are_named_with_the_option(tmp_path):
    with pytest.raises(ValueError, match=r"dataset\.root=/path/to/coco"):
        module(tmp_path, root=None).setup()
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.*dataset\.root="):
        module(tmp_path / "nowhere").setup()
    with pytest.raises(FileNotFoundError, match=r"no annotation file .*dataset\.train_ann="):
        module(tmp_path).setup()


def test_absolute_paths_need_no_root(tmp_path):
    write_coco(tmp_path, content())
    paths = {
        f"{split}_{kind}": str(tmp_path / path.format(split))
        for split in ("train", "val")
        for kind, path in (("ann", "annotations/instances_{}2017.json"), ("img", "{}2017"))
    }
    data = module(tmp_path, root=None, **paths)
    assert len(samples(data.val_dataloader())) == 3


@pytest.mark.slow
@needs(COCO)
def test_real_coco_reads_as_mmdet_reads_it():
    ours = CocoDataModule(root=str(COCO)).dataset("val")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        theirs = CocoDataset(
            ann_file=str(COCO / "annotations/instances_val2017.json"),
            data_prefix={"img": str(COCO / "val2017")},
            test_mode=True,
        )
    assert len(ours) == len(theirs)
    for index in range(len(ours)):
        wanted = theirs.get_data_info(index)
        for instance in wanted["instances"]:
            instance.pop("mask", None)
        found = ours.get_data_info(index)
        assert all(area > 0 for area in found.pop("areas"))
        assert found == wanted
