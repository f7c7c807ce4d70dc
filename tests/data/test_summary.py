"""What a data set holds is counted, told, and checked before training."""

import json

import cv2
import numpy as np
import pytest
from test_coco import box, content, module, write_coco

from ldt.cli import ldt
from ldt.data.summary import check_data, summarise, warnings_of

BIG = {"bbox": [0, 0, 60, 40], "area": 9e9}  # its box counts, not its area


def write(root, **annotations):
    """Write three images, with the given annotations of a split instead of the usual ones."""
    write_coco(root, content())
    for split, given in annotations.items():
        doc = content() | {"annotations": [{"id": i, **each} for i, each in enumerate(given)]}
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(doc))
    for index in (1, 2, 3):  # no image is in both splits
        pixels = np.full((40, 60, 3), index, np.uint8)
        assert cv2.imwrite(str(root / f"val2017/{index:03d}.png"), pixels)
    return root


def test_a_split_is_counted(tmp_path):
    dogs = [box(11, 7), {**box(12, 7), **BIG}, box(12, 7, crowd=1), box(13, 5), box(13, 4)]
    found = summarise(module(write(tmp_path, train=dogs)), "train")
    assert found.objects == {"dog": 2, "cat": 1, "bird": 0}
    assert list(found.objects) == ["dog", "cat", "bird"]
    assert (found.images, found.empty, found.ignored) == (3, 0, 1)
    assert found.sizes == {(60, 40): 3}
    assert found.bands == {"small": 2, "medium": 1}
    assert len(found.told.lines()) == 1


@pytest.mark.slow
def test_classes_without_objects_and_shared_images_are_told(tmp_path):
    data = module(write(tmp_path, val=[]))
    assert warnings_of(data) == ["none of the validation images has an object: metrics will be nan"]
    (tmp_path / "val2017/002.png").write_bytes((tmp_path / "train2017/001.png").read_bytes())
    missing, shared = warnings_of(module(write_again(tmp_path)))
    assert missing == "2 of 3 classes have no object in the training images: dog, bird"
    assert shared.startswith("3 images are in both splits, so the metrics are too good; the first")


def write_again(root):
    """Leave cats alone in the training images, which are all alike."""
    file = root / "annotations/instances_train2017.json"
    cats = [annotation for annotation in content()["annotations"] if annotation["category_id"] == 5]
    file.write_text(json.dumps(content() | {"annotations": cats}))
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content()))
    return root


def test_training_without_objects_is_refused_with_what_was_left_out(tmp_path):
    outside = [{**box(11, 5), "bbox": [90, 90, 5, 5]}] * 4
    with pytest.raises(ValueError, match=r"an object of cat, dog, bird: .*left out: 4"):
        check_data(module(write(tmp_path, train=outside)))


@pytest.mark.slow
def test_an_image_that_resizing_leaves_nothing_of_is_refused(tmp_path):
    thin = content()
    thin["images"][1] |= {"width": 2000, "height": 1}
    write_coco(tmp_path, thin)
    for split in ("train", "val"):
        pixels = np.zeros((1, 2000, 3), np.uint8)
        assert cv2.imwrite(str(tmp_path / f"{split}2017/002.png"), pixels)
    with pytest.raises(ValueError, match=r"002\.png has 2000x1 pixels .* resized to 60x0"):
        check_data(module(tmp_path))
    check_data(module(tmp_path, keep_ratio=False))


@pytest.mark.slow
def test_the_command_shows_counts_and_what_is_left_out(tmp_path, capsys, caplog):
    write(tmp_path, train=[box(11, 5), {**box(11, 7), "bbox": [90, 90, 5, 5]}])
    given = ["dataset=coco", f"dataset.root={tmp_path}", "dataset.classes=[cat,dog,bird]"]
    ldt(["data", *given], standalone_mode=False)
    assert caplog.text == ""  # it is in the table
    shown = " ".join(capsys.readouterr().out.split())
    assert "images 3 3" in shown
    assert "objects 1 3" in shown
    assert "cat 1 1" in shown
    assert "training boxes outside of their image, left out 1 annotation 1 of 001.png" in shown
    assert "warning: 2 of 3 classes have no object in the training images: dog, bird" in shown


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["dataset=coco"], "dataset.root is not set"),
        (["dataset.rot=x"], "did you mean dataset.root"),
    ],
)
def test_the_command_refuses_what_a_run_refuses(given, told):
    with pytest.raises(ValueError, match=told) as error:
        ldt(["data", *given], standalone_mode=False)
    assert getattr(error.value, "refused", False)
