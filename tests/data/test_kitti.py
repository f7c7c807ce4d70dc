"""Laws of KITTI's labels, splits and files."""

import shutil
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmdet.registry import DATASETS
from PIL import Image
from real_data import KITTI, needs

from ldt.data.kitti import (
    CLASSES,
    TYPES,
    KittiDataModule,
    KittiDataset,
    group,
    image_ids,
    parse_label,
    read_image_sets,
    split,
)
from ldt.data.pipelines import ReadImage
from ldt.data.roadscenes import RoadScenesDataModule

WIDTH, HEIGHT = 60, 40


def line(name="Car", box="5 6 25 26"):
    return f"{name} 0.00 0 -1.57 {box} 1.5 1.6 3.7 1.0 1.5 20.0 -1.5"


def write_kitti(root, labels, suffixes=(".png", ".jpg")):
    """Write one image for each label text; ids are 000000, 000001, ..."""
    images, texts = root / "training/image_2", root / "training/label_2"
    images.mkdir(parents=True)
    texts.mkdir()
    for index, label in enumerate(labels):
        pixels = np.full((HEIGHT, WIDTH, 3), index, np.uint8)
        suffix = suffixes[index % len(suffixes)]
        assert cv2.imwrite(str(images / f"{index:06d}{suffix}"), pixels)
        (texts / f"{index:06d}.txt").write_text(label)
    return root


@pytest.fixture
def root(tmp_path):
    return write_kitti(tmp_path / "kitti", [line(), "", line("Misc"), line("Pedestrian")])


# Labels


def test_a_label_reads_alike_from_file_and_text(tmp_path):
    text = line() + "\n\n" + line("DontCare", "1.5 2.5 3.5 4.5") + "\n"
    (tmp_path / "a.txt").write_text(text)
    objects = parse_label(text, WIDTH, HEIGHT)
    assert objects == parse_label(tmp_path / "a.txt", WIDTH, HEIGHT)
    assert [(item.name, item.box) for item in objects] == [
        ("Car", (5, 6, 25, 26)),
        ("DontCare", (1.5, 2.5, 3.5, 4.5)),
    ]


def test_a_box_across_the_border_is_clipped():
    [item] = parse_label(line(box="-3 -0.5 60.9 41"), WIDTH, HEIGHT)
    assert item.box == (0, 0, WIDTH, HEIGHT)
    assert item.labelled == (-3, -0.5, 60.9, 41)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("Car 0.00 0", "found 3 columns, expected KITTI's 15"),
        (line() + " 0.9 7", "found 17 columns"),
        (line(box="5,5 6 25 26"), "expected numbers.*'5,5'"),
        (line(box="5 six 25 26"), "expected numbers.*'six'"),
        (line(box="25 6 25 26"), "box .* is empty or wholly outside"),
        (line(box="5 26 25 6"), "box .* is empty or wholly outside"),
        (line(box="61 6 70 26"), "box .* wholly outside the image of 60x40"),
        (line(box="5 -9 25 -1"), "box .* wholly outside"),
        (line(box="5 6 nan 26"), "box .* is empty"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, bad, said):
    file = tmp_path / "000007.txt"
    file.write_text(f"{line()}\n\n{bad}\n")
    with pytest.raises(ValueError, match=said) as error:
        parse_label(file, WIDTH, HEIGHT)
    assert f"{file}, line 3" in str(error.value)


@pytest.mark.parametrize(
    ("grouping", "groups"),
    [
        (
            "merged",
            {
                "Car": {"Car", "Van", "Truck", "Tram"},
                "Pedestrian": {"Pedestrian", "Person_sitting"},
                "Cyclist": {"Cyclist"},
            },
        ),
        ("strict", {"Car": {"Car"}, "Pedestrian": {"Pedestrian"}, "Cyclist": {"Cyclist"}}),
    ],
)
def test_every_type_goes_to_its_class_or_is_ignored(grouping, groups):
    objects = [parse_label(line(name), WIDTH, HEIGHT)[0] for name in TYPES]
    for name, instance in zip(TYPES, group(objects, grouping, CLASSES), strict=True):
        wanted = next((c for c, members in groups.items() if name in members), None)
        label = instance["bbox_label"]
        assert (CLASSES[label] if label >= 0 else None) == wanted
        assert instance["ignore_flag"] == (wanted is None)


def test_labels_follow_the_order_of_the_classes_and_others_are_ignored():
    objects = parse_label("\n".join(map(line, CLASSES)), WIDTH, HEIGHT)
    labels = [i["bbox_label"] for i in group(objects, "merged", ("Cyclist", "Car"))]
    assert labels == [1, -1, 0]


# Splits


@pytest.mark.parametrize("count", [3, 10, 7481])
def test_a_split_is_disjoint_complete_and_of_the_wanted_size(count):
    ids = [f"{index:06d}" for index in range(count)]
    train, val = split(ids, 0.75, seed=3)
    assert sorted(train + val) == ids
    assert not set(train) & set(val)
    assert len(train) == round(0.75 * count)


def test_a_split_depends_on_the_seed_alone():
    ids = [f"{index:06d}" for index in range(50)]
    assert split(ids, seed=1) == split(ids[::-1], seed=1)
    assert split(ids, seed=1) != split(ids, seed=2)
    # Written down once: it must be the same for every Python, platform and release.
    assert split(ids[:10])[1] == ["000001", "000004"]


@pytest.mark.parametrize(
    ("ids", "fraction"), [(["a"], 0.5), (["a", "b"], 1.0), (["a", "b"], 0.1), (["a", "a"], 0.5)]
)
def test_an_impossible_split_is_refused(ids, fraction):
    with pytest.raises(ValueError, match=r"at least one each|occurs twice"):
        split(ids, fraction)


def write_sets(root, train, val):
    (root / "ImageSets").mkdir()
    (root / "ImageSets/train.txt").write_text(train)
    (root / "ImageSets/val.txt").write_text(val)


def test_image_sets_win(root, caplog):
    caplog.set_level("INFO")
    write_sets(root, "000003\n000000\n", "000001\n")
    data = KittiDataModule(root=str(root))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.split_ids() == {"train": ["000003", "000000"], "val": ["000001"]}
    assert f"the split is read from {root}/ImageSets" in caplog.text
    assert len(data.dataset("train")) == 2
    with pytest.warns(UserWarning, match="train_fraction is not used"):
        KittiDataModule(root=str(root), train_fraction=0.5).split_ids()


def test_one_image_set_alone_does_not_count(root):
    write_sets(root, "000003\n", "000001\n")
    (root / "ImageSets/val.txt").unlink()
    assert read_image_sets(root) is None


@pytest.mark.parametrize(("val", "said"), [("000000\n", "000000, ..."), ("\n", "is empty")])
def test_bad_image_sets_are_refused(root, val, said):
    write_sets(root, "000000\n000001\n", val)
    with pytest.raises(ValueError, match=said):
        read_image_sets(root)


def test_an_image_twice_in_a_list_is_refused(root):
    write_sets(root, "000000 000003 000000\n", "000001\n")
    with pytest.raises(ValueError, match=r"train\.txt lists 1 images more than once: 000000"):
        read_image_sets(root)


def test_byte_order_marks_line_ends_tabs_and_scores_change_nothing(root):
    plain = parse_label(root / "training/label_2/000000.txt", WIDTH, HEIGHT)
    ends = ("\r\n\r\n \r\n", " 0.97\n", " \t\n")
    for text in (*(line() + end for end in ends), line().replace(" ", "\t")):
        file = root / "training/label_2/000000.txt"
        file.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert parse_label(file, WIDTH, HEIGHT) == plain
    write_sets(root, "\ufeff000000\r\n000003\r\n", "\ufeff000001")
    assert read_image_sets(root) == (["000000", "000003"], ["000001"])


# Files


def test_images_are_found_whatever_the_spelling_of_their_suffix(tmp_path):
    suffixes = (".png", ".PNG", ".jpg", ".JPG", ".jpeg", ".bmp", ".webp", ".Tiff")
    root = write_kitti(tmp_path, [line()] * 8, suffixes)
    (root / "training/image_2/._000000.png").write_bytes(b"of macOS")
    data = KittiDataModule(root=str(root), train_fraction=0.5)
    assert [len(data.dataset(split)) for split in ("train", "val")] == [4, 4]
    assert data.unread().lines() == []


def test_what_is_in_no_split_is_counted(root):
    images, labels = root / "training/image_2", root / "training/label_2"
    shutil.copy(images / "000000.png", images / "000000.jpg")
    (images / "more").mkdir()
    (images / "notes.md").touch()
    (labels / "000009.txt").write_text(line())
    write_sets(root, "000000\n", "000001\n")
    found = KittiDataModule(root=str(root)).unread().entries
    assert {what: (entry.count, Path(entry.example).name) for what, entry in found.items()} == {
        "entries that are not images, not read": (2, "more"),
        "images not read, since another has their id": (1, "000000.jpg"),
        "images in neither list of ImageSets": (2, "000002.png"),
        "labels without an image, not read": (1, "000009.txt"),
    }
    (root / "ImageSets/val.txt").unlink()
    assert "lists of a split, not used without the other one" in (
        KittiDataModule(root=str(root)).unread().entries
    )


def test_own_classes_are_those_of_the_configuration(tmp_path, caplog):
    labels = [line("bus") + "\n" + line("tram"), line("bus"), line("Tram"), line("bus")]
    data = KittiDataModule(root=str(write_kitti(tmp_path, labels)), classes=("bus", "Car"))
    counts = [data.object_counts(split) for split in ("train", "val")]
    assert np.sum(counts, 0).tolist() == [3, 1]
    assert "objects of the type tram, which become ignored regions: 1" in caplog.text


def test_objects_of_less_than_a_pixel_and_relative_boxes_are_told(tmp_path, caplog):
    thin = [line(box="5 6 5.5 26") + "\n" + line("DontCare", "5 6 5.5 26"), line()]
    data = KittiDataset(write_kitti(tmp_path / "thin", thin), ["000000", "000001"])
    kept = [[i["ignore_flag"] for i in data.get_data_info(n)["instances"]] for n in (0, 1)]
    assert kept == [[1], [0]]
    assert "narrower or lower than a pixel, left out: 1 (the first: Car (5.0, 6.0" in caplog.text
    relative = write_kitti(tmp_path / "relative", [line(box="0.1 0.2 0.3 0.9"), ""])
    with pytest.raises(ValueError, match=r"all boxes in .*label_2 are within 0 and 1"):
        KittiDataset(relative, ["000000", "000001"])


def test_boxes_are_held_against_the_image_as_it_is_decoded(tmp_path):
    root = write_kitti(tmp_path, [line(box="5 6 25 55"), line()], (".jpg",))
    file = root / "training/image_2/000000.jpg"
    turned = Image.Exif()
    turned[0x0112] = 6
    with Image.open(file) as image:
        image.save(file, exif=turned)
    data = KittiDataModule(root=str(root), train_fraction=0.5, scale=(HEIGHT, WIDTH))
    (info,) = [
        info
        for split in ("train", "val")
        for info in [data.dataset(split).get_data_info(0)]
        if info["img_path"] == str(file)
    ]
    assert (info["height"], info["width"]) == ReadImage()(dict(info))["img"].shape[:2] == (60, 40)
    assert info["instances"][0]["bbox"] == [5, 6, 25, 55]


def test_the_data_set_is_built_from_mmdets_registry(root):
    config = {"type": "KittiDataset", "root": str(root), "ids": image_ids(root)}
    dataset = DATASETS.build(config)
    assert [dataset.get_data_info(i)["img_id"] for i in range(len(dataset))] == [0, 1, 2, 3]
    assert [len(dataset.get_data_info(i)["instances"]) for i in range(4)] == [1, 0, 1, 1]
    info = dataset.get_data_info(0)
    assert (info["width"], info["height"]) == (WIDTH, HEIGHT)
    assert Path(info["img_path"]).stem == "000000"


def test_a_missing_root_is_named_with_the_layout_and_the_option(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*image_2.*dataset\.root="):
        KittiDataModule(root=str(tmp_path / "nowhere")).setup()
    with pytest.raises(ValueError, match=r"dataset\.root=/path/to/kitti"):
        KittiDataModule().setup()
    with pytest.raises(FileNotFoundError, match=r"no folder .*image_2; expected in"):
        KittiDataModule(root=str(tmp_path)).setup()


def test_a_missing_label_is_named_with_its_image(root):
    (root / "training/label_2/000001.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"label_2/000001\.txt.*image_2/000001\.jpg"):
        KittiDataset(root, image_ids(root))


def test_a_missing_image_is_named(root):
    with pytest.raises(FileNotFoundError, match="image_2/000009"):
        KittiDataset(root, ["000000", "000009"])


def test_an_image_without_a_header_is_named(root):
    (root / "training/image_2/000001.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"cannot read the image .*000001\.jpg"):
        KittiDataset(root, image_ids(root))


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"not an image", b""])
def test_an_image_that_cannot_be_decoded_is_named_when_it_is_read(root, content):
    data = KittiDataModule(root=str(root), split_seed=1, scale=(64, 64))
    data.setup()
    for name in data.split_ids()["train"]:
        next((root / "training/image_2").glob(f"{name}.*")).write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read the image .*training/image_2/"):
        next(iter(data.train_dataloader()))


def test_unknown_groupings_and_classes_are_refused():
    with pytest.raises(ValueError, match=r"dataset.grouping='loose'; allowed: merged, strict"):
        KittiDataModule(grouping="loose")
    with pytest.raises(
        ValueError, match=r"no class 'Van' with dataset\.grouping=merged; allowed: Car, Ped.*, Misc"
    ):
        KittiDataModule(classes=("Car", "Van"))
    with pytest.raises(ValueError, match="no class 'DontCare'"):
        KittiDataModule(classes=("DontCare",))
    assert KittiDataModule(classes=("Van",), grouping="strict").classes == ("Van",)


@pytest.mark.slow
@needs(KITTI)
def test_real_kitti_keeps_every_object():
    ids = image_ids(KITTI)
    files = [(KITTI / f"training/label_2/{name}.txt").read_text() for name in ids]
    lines = [text.split() for text in "".join(files).splitlines() if text.strip()]
    dataset = KittiDataset(KITTI, ids, grouping="strict")
    instances = [
        item for i in range(len(dataset)) for item in dataset.get_data_info(i)["instances"]
    ]
    assert len(instances) == len(lines)
    for label, name in enumerate(CLASSES):
        wanted = sum(columns[0] == name for columns in lines)
        assert sum(item["bbox_label"] == label for item in instances) == wanted
    read = np.array([item["bbox"] for item in instances])
    written = np.array([columns[4:8] for columns in lines], float)
    assert np.abs(read - written).max() < 2  # clipping takes a pixel or so


# Road scenes


@pytest.mark.slow
def test_road_scenes_are_written_once_and_read_like_kitti(tmp_path, monkeypatch):
    monkeypatch.setenv("LDT_CACHE", str(tmp_path))
    data = RoadScenesDataModule(train=3, val=2, height=64, width=128, scale=(128, 64))
    data.prepare_data()
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")}
    data.setup("fit")
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")} == written
    assert {name: len(ids) for name, ids in data.split_ids().items()} == {"train": 3, "val": 2}
    assert data.classes == CLASSES
    assert next(iter(data.val_dataloader()))["inputs"][0].shape == (3, 64, 128)


def test_road_scenes_of_other_options_live_elsewhere(tmp_path):
    options = {"train": 1, "val": 1, "height": 64, "width": 128, "cache": str(tmp_path)}
    folders = {RoadScenesDataModule(**options, scene_seed=seed).folder() for seed in (0, 1)}
    assert len(folders) == 2


def test_road_scenes_refuse_a_root_and_bad_options(tmp_path):
    with pytest.raises(ValueError, match=r"type dataset\.cache="):
        RoadScenesDataModule(root=str(tmp_path))
    with pytest.raises(ValueError, match="train"):
        RoadScenesDataModule(train=0)


def test_both_image_formats_of_one_id_count_once(root):
    images = root / "training/image_2"
    shutil.copy(images / "000000.png", images / "000000.jpg")
    assert image_ids(root) == ["000000", "000001", "000002", "000003"]
