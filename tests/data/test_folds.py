"""Laws of folds and image lists: they partition the images, and neighbours are never parted."""

from itertools import pairwise
from typing import Any

import pytest
from real_data import COCO, KITTI, needs

from ldt.config import conf_dir
from ldt.data.coco import CocoDataModule
from ldt.data.image_lists import listed_ids
from ldt.data.kitti import KittiDataModule, blocks, fold_split
from ldt.runs import identity

IDS = [f"{number:06d}" for number in range(0, 46, 2)]  # 23 ids with holes


@pytest.mark.parametrize("folds", [2, 3, 5, 23])
def test_folds_partition_the_images(folds):
    parts = [fold_split(IDS[::-1], folds, fold)[1] for fold in range(folds)]
    assert [name for part in parts for name in part] == IDS
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("gap", [1, 2, 4])
@pytest.mark.parametrize("folds", [2, 5])
def test_neighbours_are_never_on_both_sides(folds, gap):
    for fold in range(folds):
        train, val = fold_split(IDS, folds, fold, gap)
        assert not set(train) & set(val)
        used = [(IDS.index(name), name in val) for name in sorted([*train, *val])]
        parted = [(a, b) for (a, x), (b, y) in pairwise(used) if x != y]
        assert all(b - a == gap + 1 for a, b in parted)
        neither = [IDS.index(name) for name in IDS if name not in {*train, *val}]
        within = [min(abs(place - IDS.index(name)) for name in val) for place in neither]
        assert all(distance <= gap for distance in within)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"folds": 1}, "dataset.folds=1; allowed: .* of at least 2"),
        ({"folds": 24}, "dataset.folds=24; allowed: .* up to 23"),
        ({"folds": 5, "fold": 5}, "dataset.fold=5; allowed: .* up to 4"),
        ({"folds": 5, "gap": 0}, "dataset.gap=0; allowed"),
        ({"folds": 2, "gap": 12}, "leave none for training"),
    ],
)
def test_what_is_no_fold_is_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        fold_split(IDS, **{"fold": 0, **keys})


@needs(KITTI)
def test_a_reserved_fold_needs_the_flag():
    keys: Any = {"root": str(KITTI), "folds": 10, "reserved_folds": 2, "images": "kitti_frames"}
    assert KittiDataModule(**keys, fold=7).split_ids()["val"]
    with pytest.raises(ValueError, match=r"fold=8 is reserved.* allowed: 0 to 7 .*open_reserved"):
        KittiDataModule(**keys, fold=8).split_ids()
    opened = KittiDataModule(**keys, fold=8, open_reserved=True)
    assert opened.split_ids()["val"] == blocks(opened._ids(), 10)[8]


def test_without_folds_their_keys_are_no_part_of_a_run():
    plain = {"dataset": {"train_fraction": 0.8, "split_seed": 0}}
    now = {"dataset": {**plain["dataset"], "folds": 0, "fold": 0, "gap": 4, "reserved_folds": 0}}
    assert identity.essence(plain) == identity.essence(now)
    one, two = ({"dataset": {**now["dataset"], "folds": 5, "fold": fold}} for fold in (0, 1))
    assert identity.essence(one) != identity.essence(two)


# Lists


def test_the_lists_of_the_benchmark_share_no_image():
    files = {file.stem: file.read_text().split() for file in (conf_dir() / "images").glob("*.txt")}
    assert len(files) == 5
    for name, ids in files.items():
        assert len(set(ids)) == len(ids) > 50, name
        for other, more in files.items():
            assert name == other or not set(ids) & set(more) or name[:4] != other[:4]


def test_a_list_that_does_not_fit_the_data_is_refused(tmp_path):
    file = tmp_path / "ids.txt"
    file.write_text("7\n9\n\n8")
    assert listed_ids(str(file), "dataset.val_images", [8, 9, 10, 7]) == [7, 9, 8]
    with pytest.raises(ValueError, match=r"2 of its 3 images are not in the data: 7, 9;"):
        listed_ids(str(file), "dataset.val_images", [8])
    file.write_text("7 7")
    with pytest.raises(ValueError, match="lists 1 ids twice: 7"):
        listed_ids(str(file), "dataset.val_images", [7])
    file.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        listed_ids(str(file), "dataset.val_images", [7])
    with pytest.raises(FileNotFoundError, match=r"no such list; allowed: .*coco_test"):
        listed_ids("coco_tset", "dataset.val_images", [7])


@pytest.mark.slow
@needs(COCO)
def test_listed_images_of_coco_are_those_that_are_loaded_and_fingerprinted():
    plain: Any = {"root": str(COCO), "train_img": "val2017"}
    plain["train_ann"] = "annotations/instances_val2017.json"
    whole = CocoDataModule(**plain)
    some = CocoDataModule(**plain, train_images="coco_reserved", val_images="coco_test")
    ids = some.split_ids()
    assert (len(ids["train"]), len(ids["val"])) == (54, 110)
    assert sorted(ids["train"] + ids["val"]) == sorted(whole.split_ids()["val"])
    counts = {part: some.object_counts(part) for part in ("train", "val")}
    every = whole.object_counts("val")
    assert [a + b for a, b in zip(counts["train"], counts["val"], strict=True)] == list(every)
    prints = some.fingerprint()
    assert prints["val"]["images"] == 110
    assert prints["train"]["ids"] != prints["val"]["ids"]
    missing = CocoDataModule(root=str(COCO), val_images="coco_train")
    with pytest.raises(ValueError, match=r"dataset.val_images=coco_train: 243 of its 243"):
        missing.split_ids()
    with pytest.raises(ValueError, match="243 of its 243"):
        missing.fingerprint()
