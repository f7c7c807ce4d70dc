"""Any bytes give data or our own error: parsers under hypothesis."""

import json
import math
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from damaging import damaged, fuzzed
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldt.data import coco
from ldt.data.kitti import read_image_sets
from ldt.data.kitti_labels import COLUMNS, TYPES, KittiObject, parse_label

WIDTH, HEIGHT = 100, 50
FUZZ = fuzzed(300)


GIBIBYTE = 2**30


@pytest.fixture(scope="module", autouse=True)
def a_gibibyte_is_enough() -> Iterator[None]:
    """No input makes a parser take 1 GiB: there is no more address space than that (Linux)."""
    used = Path("/proc/self/statm")
    if not used.exists():
        yield
        return
    pages = int(used.read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GIBIBYTE, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_more_than_a_gibibyte_is_an_error_here():
    with pytest.raises(MemoryError):
        bytearray(4 * GIBIBYTE)  # other tests of this process may have freed some
    assert len(bytearray(GIBIBYTE // 4))


words = st.one_of(
    st.sampled_from([*TYPES, "nan", "inf", "-1", "1e999", "0x10", "1_0", "", "\x00", "٣"]),
    st.floats().map(str),
    st.integers().map(str),
    st.text(max_size=8),
)
lines = st.lists(words, min_size=COLUMNS - 1, max_size=COLUMNS + 1).map(" ".join)
good_lines = st.tuples(
    st.sampled_from(TYPES), *[st.floats(-20, 120).map(lambda x: f"{x:.2f}")] * (COLUMNS - 1)
).map(" ".join)
labels = st.lists(st.one_of(lines, good_lines, st.text(max_size=60)), max_size=6).map("\n".join)


def check_label(read: Any) -> None:
    try:
        objects = read()
    except ValueError as error:
        assert "line " in str(error)  # ours: it names the line
        return
    for item in objects:
        assert isinstance(item, KittiObject)
        x1, y1, x2, y2 = item.box
        assert 0 <= x1 < x2 <= WIDTH
        assert 0 <= y1 < y2 <= HEIGHT


@pytest.mark.slow
@FUZZ
@given(labels)
def test_a_kitti_label_is_read_or_its_line_is_named(text: str):
    check_label(lambda: parse_label(text, WIDTH, HEIGHT))


@pytest.mark.slow
@FUZZ
@given(st.binary(max_size=200))
def test_a_kitti_label_of_any_bytes(tmp_path: Path, content: bytes):
    file = tmp_path / "label.txt"
    file.write_bytes(content)
    check_label(lambda: parse_label(file, WIDTH, HEIGHT))


@pytest.mark.slow
@FUZZ
@given(st.binary(max_size=60), st.binary(max_size=60))
def test_image_sets_of_any_bytes(tmp_path: Path, train: bytes, val: bytes):
    folder = tmp_path / "ImageSets"
    folder.mkdir(exist_ok=True)
    (folder / "train.txt").write_bytes(train)
    (folder / "val.txt").write_bytes(val)
    try:
        found = read_image_sets(tmp_path)
    except ValueError as error:
        assert str(folder) in str(error)
        return
    assert found is not None
    assert not set(found[0]) & set(found[1])


# COCO -----------------------------------------------------------------------------------------

anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def document() -> dict[str, Any]:
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in range(2)],
        "annotations": [
            {"id": i, "image_id": i % 2, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16}
            for i in range(3)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def check_coco(file: Path, images: Path) -> None:
    try:
        dataset = coco.CocoBoxes(
            ann_file=str(file),
            data_prefix={"img": str(images)},
            metainfo={"classes": ("cat", "dog")},
            test_mode=True,
        )
    except (ValueError, FileNotFoundError) as error:
        assert str(file) in str(error) or str(images) in str(error), repr(error)
        return
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        assert Path(info["img_path"]).resolve().is_relative_to(images.resolve())
        for instance in info["instances"]:
            assert all(map(math.isfinite, instance["bbox"]))
            assert instance["bbox_label"] in (0, 1)


@pytest.fixture(scope="module")
def images(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("coco") / "images"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (9, 9)).save(folder / f"{i}.jpg")
    return folder


@pytest.mark.slow
@FUZZ
@given(damaged(document(), anything))
def test_a_damaged_annotation_file_is_named(tmp_path: Path, images: Path, content: Any):
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(content))
    check_coco(file, images)


@pytest.mark.slow
@FUZZ
@given(st.one_of(st.binary(max_size=80), anything.map(lambda x: json.dumps(x).encode())))
def test_an_annotation_file_of_any_bytes(tmp_path: Path, images: Path, content: bytes):
    file = tmp_path / "annotations.json"
    file.write_bytes(content)
    check_coco(file, images)


def test_the_document_that_is_damaged_is_good(tmp_path: Path, images: Path):
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(document()))
    dataset = coco.CocoBoxes(
        ann_file=str(file),
        data_prefix={"img": str(images)},
        metainfo={"classes": ("cat", "dog")},
        test_mode=True,
    )
    assert [len(dataset.get_data_info(i)["instances"]) for i in range(2)] == [2, 1]


@pytest.mark.parametrize("depth", [100_000])
def test_deep_nesting_is_no_crash(tmp_path: Path, images: Path, depth: int):
    file = tmp_path / "annotations.json"
    file.write_text("[" * depth)
    with pytest.raises(ValueError, match="is not a JSON file"):
        coco.read_annotations(file)


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../b.jpg", "", "a\0b"])
def test_an_image_cannot_lie_outside_of_its_folder(tmp_path: Path, images: Path, name: str):
    content = document()
    content["images"][1]["file_name"] = name
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"images\[1\]: 'file_name' is .*below the image folder"):
        coco.read_annotations(file)
