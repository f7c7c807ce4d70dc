"""COCO (Lin et al., ECCV 2014), and any data set in its annotation format."""

import json
import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS

from ldt.data.datamodule import DetectionDataModule, Split, need_folder
from ldt.runs.inputs import file_digest, remembered, split_record

log = logging.getLogger(__name__)

CLASSES: tuple[str, ...] = CocoDataset.METAINFO["classes"]
LAYOUT = "COCO's folders annotations, train2017 and val2017"
IMAGE_LIST = re.compile(r'"images"\s*:\s*\[')


def read_annotations(path: Path) -> dict:
    """Read an annotation file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not in COCO format.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no annotation file {path}; expected: {LAYOUT}. Type dataset.root=/path/to/coco, or "
            "dataset.train_ann=... and dataset.val_ann=... for other names"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path} is not in COCO's format: expected a list under {key!r}")
    if not content["images"]:
        raise ValueError(f"{path} lists no image; expected at least one under 'images'")
    for key, fields in FIELDS.items():
        for number, entry in enumerate(content[key]):
            _check_entry(entry, fields, f"{path}, {key}[{number}]")
    ids = [image["id"] for image in content["images"]]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path}: {len(ids) - len(set(ids))} image ids occur more than once")
    return content


def _check_entry(entry: Any, fields: dict[str, str], where: str) -> None:
    """Raise ValueError unless all fields are present and of the expected kind."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {str(entry)[:60]!r}; expected an object with {_list(fields)}")
    for name, kind in fields.items():
        if name not in entry:
            raise ValueError(f"{where} has no {name!r}; expected: {_list(fields)}")
        if not _KINDS[kind](entry[name]):
            raise ValueError(f"{where}: {name!r} is {str(entry[name])[:60]!r}; expected {kind}")
    if not isinstance(entry.get("iscrowd", 0), int):
        raise ValueError(f"{where}: 'iscrowd' is {str(entry['iscrowd'])[:60]!r}; expected 0 or 1")


def _list(fields: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in fields.items())


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _number(value: object) -> bool:
    return _whole(value) or (isinstance(value, float) and math.isfinite(value))


def _inside(value: object) -> bool:
    """Whether a relative file name stays inside its folder."""
    path = PurePath(value) if isinstance(value, str) and value and "\0" not in value else None
    return path is not None and not path.is_absolute() and ".." not in path.parts


_KINDS: dict[str, Callable[[Any], bool]] = {
    "a whole number": _whole,
    "a positive whole number": lambda value: _whole(value) and value > 0,
    "a number": _number,
    "a text": lambda value: isinstance(value, str),
    "a file below the image folder": _inside,
    "four numbers": lambda v: isinstance(v, list) and len(v) == 4 and all(map(_number, v)),
}
FIELDS = {
    "images": {
        "id": "a whole number",
        "file_name": "a file below the image folder",
        "width": "a positive whole number",
        "height": "a positive whole number",
    },
    "annotations": {
        "image_id": "a whole number",
        "category_id": "a whole number",
        "bbox": "four numbers",
        "area": "a number",
    },
    "categories": {"id": "a whole number", "name": "a text"},
}


def check_classes(classes: Sequence[str], available: Sequence[str], path: Path) -> None:
    """Raise ValueError for the first of `classes` that is not `available` in the file `path`."""
    for name in classes:
        if name not in available:
            raise ValueError(
                f"{path} has no class {name!r}; available: {', '.join(available)} "
                f"(type for example dataset.classes=[{','.join(available[:2])}])"
            )


def check_images(folder: Path, names: Sequence[str]) -> None:
    """Raise FileNotFoundError with the number of images missing from `folder` and the first one."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images of the annotation file are missing, the first "
            f"is {folder / missing[0]}; type dataset.train_img=... or dataset.val_img=... if the "
            "images are in another folder"
        )


@DATASETS.register_module()
class CocoBoxes(CocoDataset):
    """CocoDataset that loads boxes only, validates its files and keeps the order of `classes`.

    mmdet labels a subset of the classes in the order of the annotation *file*, whatever order
    the names are given in, and loads all masks. Crowds become ignore regions; images without
    boxes are kept; boxes of other classes are dropped. Images carry the annotated areas of their
    objects, without crowds, under `areas`.

    Raises:
        FileNotFoundError: the annotation file or an image is missing.
        ValueError: the file is not in COCO format, or lacks one of the classes.
    """

    def load_data_list(self) -> list[dict]:
        """Read and check the annotation file; called by mmengine."""
        path = Path(str(self.ann_file))
        content = read_annotations(path)
        by_name = {category["name"]: category["id"] for category in content["categories"]}
        classes = self.metainfo["classes"]
        check_classes(classes, list(by_name), path)
        check_images(Path(self.data_prefix["img"]), [i["file_name"] for i in content["images"]])
        self.cat_ids = [by_name[name] for name in classes]
        self.cat2label = {category: label for label, category in enumerate(self.cat_ids)}
        annotations: dict[int, list[dict]] = defaultdict(list)
        for annotation in content["annotations"]:
            annotation["segmentation"] = annotation["area"]  # mmdet hands it on as `mask`
            annotations[annotation["image_id"]].append(annotation)
        _tell_unused(path, content["images"], annotations)
        return [self._parse(image, annotations[image["id"]]) for image in content["images"]]

    def _parse(self, image: dict, annotations: list[dict]) -> dict:
        raw = {"raw_img_info": {**image, "img_id": image["id"]}, "raw_ann_info": annotations}
        info = self.parse_data_info(raw)
        assert isinstance(info, dict)
        areas = [(instance.pop("mask"), instance["ignore_flag"]) for instance in info["instances"]]
        info["areas"] = [area for area, ignored in areas if not ignored]
        return info


def _listed_images(path: Path) -> dict[str, list]:
    """List ids and files of the images of an annotation file, in order.

    Only the list of images is parsed: parsing all of COCO's annotations takes a hundred times as
    long.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    places = [match.end() - 1 for match in IMAGE_LIST.finditer(text)]
    try:
        (place,) = places  # the key must be unique in the file
        images, _ = json.JSONDecoder().raw_decode(text, place)
        return {"ids": [i["id"] for i in images], "files": [i["file_name"] for i in images]}
    except (ValueError, TypeError, KeyError, RecursionError):
        images = read_annotations(path)["images"]  # raises a specific error
        return {"ids": [i["id"] for i in images], "files": [i["file_name"] for i in images]}


def _tell_unused(path: Path, images: list[dict], annotations: Mapping[int, list[dict]]) -> None:
    """Warn about annotations that mmdet drops: of unknown images, or outside their image."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    strangers = [a for image, found in annotations.items() if image not in sizes for a in found]
    outside = [
        a for image, size in sizes.items() for a in annotations.get(image, ()) if _beyond(a, size)
    ]
    for found, what in (
        (strangers, "belong to no image of the file"),
        (outside, "lie outside their image"),
    ):
        if found:
            first = found[0].get("id", found[0]["bbox"])
            text = "%s: %d annotations %s and are dropped; the first has the id %s"
            log.warning(text, path, len(found), what, first)


def _beyond(annotation: dict, size: tuple[int, int]) -> bool:
    x, y, width, height = annotation["bbox"]
    return x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0


@dataclass(kw_only=True, eq=False)
class CocoDataModule(DetectionDataModule):
    """COCO below `root`; see `DetectionDataModule` for the other arguments.

    `classes` may be a subset of the file's classes in any order; default: the 80 of COCO.

    Args:
        train_ann, val_ann: annotation files, relative to `root` or absolute.
        train_img, val_img: image folders, relative to `root` or absolute.
    """

    train_ann: str = "annotations/instances_train2017.json"
    val_ann: str = "annotations/instances_val2017.json"
    train_img: str = "train2017"
    val_img: str = "val2017"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.classes = self.classes or CLASSES

    def split_ids(self) -> dict[str, list]:
        """Return the COCO image ids (int) of both splits."""
        return {"train": self._ids("train"), "val": self._ids("val")}

    def load(self, split: Split) -> CocoBoxes:
        """Read the annotations of `split`."""
        annotations, images = self._paths(split)
        return CocoBoxes(
            ann_file=str(annotations),
            data_prefix={"img": str(images)},
            metainfo={"classes": self.classes},
            test_mode=True,
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprints of both splits; image lists of large files are cached."""
        found = {}
        for split in ("train", "val"):
            annotations, images = self._paths(split)
            if not annotations.is_file():
                read_annotations(annotations)  # raises an error that says what to type
            listed = remembered(annotations, "images", _listed_images)
            paths = (os.path.join(images, name) for name in listed["files"])
            found[split] = split_record(listed["ids"], paths, file_digest(annotations))
        return found

    def _paths(self, split: Split) -> tuple[Path, Path]:
        """Return annotation file and image folder of a split."""
        if split == "train":
            return self._path(self.train_ann), self._path(self.train_img)
        return self._path(self.val_ann), self._path(self.val_img)

    def _ids(self, split: Split) -> list[int]:
        dataset = self.dataset(split)
        return [dataset.get_data_info(index)["img_id"] for index in range(len(dataset))]

    def _path(self, path: str) -> Path:
        if Path(path).is_absolute():
            return Path(path)
        if self.root is None:
            raise ValueError(f"dataset.root is not set; type dataset.root=/path/to/coco ({LAYOUT})")
        return need_folder(self.root, "dataset.root", LAYOUT) / path
