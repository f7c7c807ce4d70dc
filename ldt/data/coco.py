"""COCO (Lin et al., ECCV 2014), and any data set in its annotation format."""

import json
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

from ldt.config.places import need_annotations, need_root
from ldt.config.values import assigned
from ldt.data.datamodule import DetectionDataModule, Split
from ldt.data.image_files import MAX_PIXELS, Size, image_sizes
from ldt.data.image_lists import listed_ids
from ldt.data.tally import Tally
from ldt.runs.inputs import file_digest, remembered, split_record

CLASSES: tuple[str, ...] = CocoDataset.METAINFO["classes"]
IMAGE_LIST = re.compile(r'"images"\s*:\s*\[')


def read_annotations(path: Path) -> dict:
    """Read an annotation file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not in COCO format.
    """
    need_annotations(path)
    try:
        content = json.loads(_text(path), object_hook=_without_mask)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path} is not in COCO's format: expected a list under {key!r}")
    if not content["images"]:
        raise ValueError(f"{path} lists no image; expected at least one under 'images'")
    for key, fields in FIELDS.items():
        for number, entry in enumerate(content[key]):
            if fault := _fault_of(entry, fields):
                raise ValueError(f"{path}, {key}[{number}]{fault}")
    ids = [image["id"] for image in content["images"]]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path}: {len(ids) - len(set(ids))} image ids occur more than once")
    return content


def _text(path: Path, errors: str = "strict") -> str:
    """Read a JSON file in UTF-8, 16 or 32, with a byte-order mark or without."""
    content = path.read_bytes()
    return content.decode(json.detect_encoding(content), errors)


def _without_mask(node: dict) -> dict:
    """Drop the polygons of an annotation as it is parsed: most of the memory of a large file."""
    node.pop("segmentation", None)
    return node


def _fault_of(entry: object, fields: dict[str, str]) -> str:
    """Describe the first field that is missing or of another kind; empty if all are good."""
    if not isinstance(entry, dict):
        return f" is {str(entry)[:60]!r}; expected an object with {_list(fields)}"
    for name, kind in fields.items():
        if name not in entry:
            return f" has no {name!r}; expected: {_list(fields)}"
        if not _KINDS[kind](entry[name]):
            return f": {name!r} is {str(entry[name])[:60]!r}; expected {kind}"
    for name, kind in OPTIONAL.items():
        if name in entry and not _KINDS[kind](entry[name]):
            return f": {name!r} is {str(entry[name])[:60]!r}; expected {kind}"
    return ""


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
    "a number": lambda value: value is None or _number(value),
    "0 or 1": lambda value: value is None or value in (0, 1),
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
    },
    "categories": {"id": "a whole number", "name": "a text"},
}
OTHER_CLASS = "annotations of classes that are not in dataset.classes, left out"
FEW = 10  # boxes
OPTIONAL = {"area": "a number", "iscrowd": "0 or 1"}


def _restricted(content: dict, name: str, key: str) -> dict:
    """Return the content of an annotation file with the images of a list only."""
    images = {image["id"]: image for image in content["images"]}
    ids = listed_ids(name, key, list(images))
    kept = set(ids)
    others = images.keys() - kept
    return content | {
        "images": [images[number] for number in ids],
        "annotations": [a for a in content["annotations"] if a["image_id"] not in others],
    }


def check_classes(classes: Sequence[str], available: Sequence[str], path: Path) -> None:
    """Raise ValueError for the first of `classes` that is not `available` in the file `path`."""
    for name in classes:
        if name not in available:
            raise ValueError(
                f"{path} has no class {name!r}; available: {', '.join(available)} "
                f"(type for example {assigned('dataset.classes', list(available[:2]))})"
            )


def check_images(folder: Path, names: Sequence[str]) -> None:
    """Raise FileNotFoundError with the number of images missing from `folder` and the first one."""
    missing = [name for name in names if not _is_file(folder / name)]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images of the annotation file are missing, the first "
            f"is {str(folder / missing[0])[:300]}; type dataset.train_img=... or "
            "dataset.val_img=... if the images are in another folder"
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long a name
        return False


def label_ids(categories: Sequence[dict], classes: Sequence[str], told: Tally) -> dict[int, int]:
    """Return the label of each category id; categories of one name are one class.

    Raises:
        ValueError: an id has two names.
    """
    names: dict[int, str] = {}
    for category in categories:
        number, name = category["id"], category["name"]
        if names.setdefault(number, name) != name:
            raise ValueError(f"the category id {number} has two names: {names[number]!r}, {name!r}")
    ids: dict[str, list[int]] = defaultdict(list)
    for number, name in names.items():
        ids[name].append(number)
    for name, found in ids.items():
        if len(found) > 1 and name in classes:
            told.add("names of several categories, merged to one class each", f"{name!r}: {found}")
    return {number: label for label, name in enumerate(classes) for number in ids[name]}


def check_sizes(path: Path, images: Sequence[dict], sizes: Sequence[Size], told: Tally) -> None:
    """Check the sizes of images in an annotation file, which boxes refer to.

    A difference of one pixel is corrected in `images`.

    Raises:
        ValueError: an image has another size.
    """
    other = []
    for image, (width, height) in zip(images, sizes, strict=True):
        stated = image["width"], image["height"]
        if stated == (width, height):
            continue
        if max(abs(stated[0] - width), abs(stated[1] - height)) > 1:
            other.append((image["file_name"], stated, (width, height)))
        else:
            told.add("images a pixel larger or smaller than stated", image["file_name"])
            image["width"], image["height"] = width, height
    if other:
        name, stated, found = other[0]
        turned = " (turned by its EXIF data)" if stated == found[::-1] else ""
        raise ValueError(
            f"{path}: {len(other)} of {len(images)} images have another size than it states, so "
            f"its boxes do not fit them; the first: {name} has {found[0]}x{found[1]} pixels"
            f"{turned}, stated are {stated[0]}x{stated[1]}. Restore the images, or scale `bbox`, "
            "`width` and `height` to them"
        )


@DATASETS.register_module()
class CocoBoxes(CocoDataset):
    """CocoDataset that loads boxes only, validates its files and keeps the order of `classes`.

    mmdet labels a subset of the classes in the order of the annotation *file*, whatever order
    the names are given in, and loads all masks. Crowds become ignore regions; images without
    boxes are kept; boxes of other classes are left out, and those that mmdet drops, but counted.
    Objects without a positive `area`, which mmdet drops too, have that of their box. Images carry
    the areas of their objects, without crowds, under `areas`.

    Args:
        max_pixels: of an image.
        images: list of the images to load, see `ldt.data.image_lists`; all if None.
        key: its configuration key, for messages.
        options: of CocoDataset.

    Attributes:
        told: what was left out or changed.

    Raises:
        FileNotFoundError: the annotation file or an image is missing.
        ValueError: the file is not in COCO format, lacks one of the classes, has relative boxes
            or the sizes of other images; or an image is damaged or too large.
    """

    def __init__(
        self,
        *,
        max_pixels: int = MAX_PIXELS,
        images: str | None = None,
        key: str = "dataset.val_images",
        **options: Any,
    ) -> None:
        self.max_pixels, self.told = max_pixels, Tally()
        self.images, self.key = images, key
        super().__init__(**options)

    def load_data_list(self) -> list[dict]:
        """Read and check the annotation file; called by mmengine."""
        path, folder = Path(str(self.ann_file)), Path(self.data_prefix["img"])
        content = read_annotations(path)
        if self.images:
            content = _restricted(content, self.images, self.key)
        images, categories = content["images"], content["categories"]
        classes = self.metainfo["classes"]
        check_classes(classes, list({category["name"]: 0 for category in categories}), path)
        try:
            self.cat2label = label_ids(categories, classes, self.told)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self.cat_ids = list(self.cat2label)
        self.listed = {category["id"] for category in categories}
        check_images(folder, [image["file_name"] for image in images])
        files = [os.path.join(folder, image["file_name"]) for image in images]
        check_sizes(path, images, image_sizes(files, self.max_pixels), self.told)
        check_boxes(path, [annotation["bbox"] for annotation in content["annotations"]])
        annotations: dict[int, list[dict]] = defaultdict(list)
        for annotation in content["annotations"]:
            annotations[annotation["image_id"]].append(annotation)
        infos = [self._parse(image, annotations.pop(image["id"], [])) for image in images]
        self._tell_rest(images, annotations)
        self._tell_corners(content["annotations"], images)
        self.told.log(path)
        return infos

    def _parse(self, image: dict, annotations: list[dict]) -> dict:
        found = [each for each in annotations if self._keeps(each, image)]
        seen: set[tuple[float, ...]] = set()
        for each in found:
            if (key := (each["category_id"], *each["bbox"])) in seen:
                self.told.add("objects annotated again with an equal box", _name(each, image))
            seen.add(key)
        raw = {"raw_img_info": {**image, "img_id": image["id"]}, "raw_ann_info": found}
        info = self.parse_data_info(raw)
        assert isinstance(info, dict)
        assert len(info["instances"]) == len(found), "mmdet leaves out more than is counted"
        areas = [(instance.pop("mask"), instance["ignore_flag"]) for instance in info["instances"]]
        info["areas"] = [area for area, ignored in areas if not ignored]
        return info

    def _keeps(self, annotation: dict, image: dict) -> bool:
        """Whether an annotation is an object or a crowd; what is left out is counted."""
        _, _, width, height = annotation["bbox"]
        category, reason = annotation["category_id"], ""
        if annotation.get("ignore"):
            reason = "annotations marked `ignore`, left out"
        elif category not in self.listed:
            reason = "annotations of categories that are not in the file, left out"
        elif category not in self.cat2label:
            reason = OTHER_CLASS
        elif width < 1 or height < 1:
            reason = "boxes narrower or lower than a pixel, left out"
        elif min(inside := _inside_of(image, annotation)) <= 0:
            reason = "boxes outside of their image, left out"
        elif min(inside) < 1:
            reason = "boxes with less than a pixel inside of their image, left out"
        if reason:
            self.told.add(reason, _name(annotation, image), expected=reason == OTHER_CLASS)
            return False
        if (annotation.get("area") or 0) <= 0:
            self.told.add(
                "objects without an area, which is that of their box", _name(annotation, image)
            )
            annotation["area"] = width * height
        annotation["segmentation"] = annotation["area"]  # mmdet hands it on as `mask`
        return True

    def _tell_rest(self, images: Sequence[dict], strangers: Mapping[int, list[dict]]) -> None:
        """Count annotations of unknown images, and images that are listed twice."""
        for image, annotations in strangers.items():
            for annotation in annotations:
                about = {"file_name": f"the image id {image}"}
                reason = "annotations of images that are not in the file, left out"
                self.told.add(reason, _name(annotation, about))
        seen: set[str] = set()
        for image in images:
            if (name := image["file_name"]) in seen:
                self.told.add("images listed again under another id", name)
            seen.add(name)

    def _tell_corners(self, annotations: Sequence[dict], images: Sequence[dict]) -> None:
        """Tell if boxes look like x1, y1, x2, y2: all would fit so, and some do not as stated."""
        boxes = (annotation["bbox"] for annotation in annotations)
        if len(annotations) < FEW or not all(w > x and h > y for x, y, w, h in boxes):
            return
        by_id = {image["id"]: image for image in images}
        for annotation in annotations:
            image, (x, y, width, height) = by_id.get(annotation["image_id"]), annotation["bbox"]
            if image and (x + width > image["width"] + 1 or y + height > image["height"] + 1):
                what = "boxes that reach beyond their image, as if written as x1, y1, x2, y2"
                self.told.add(what, _name(annotation, image))


def _name(annotation: Mapping[str, Any], image: Mapping[str, Any]) -> str:
    number, box = annotation.get("id", "without id"), annotation["bbox"]
    return f"annotation {number} of {image['file_name']}, bbox {box}"


def _inside_of(image: Mapping[str, Any], annotation: Mapping[str, Any]) -> tuple[float, float]:
    """Return width and height of the part of a box that is inside of the image."""
    x, y, width, height = annotation["bbox"]
    return (
        min(x + width, image["width"]) - max(x, 0),
        min(y + height, image["height"]) - max(y, 0),
    )


def check_boxes(path: Path, boxes: Sequence[Sequence[float]]) -> None:
    """Raise ValueError if boxes are relative to the size of their image."""
    if boxes and all(0 <= value <= 1 for box in boxes for value in box):
        raise ValueError(
            f"{path}: all boxes are within 0 and 1, as if relative to the size of the image, and "
            f"would be left out; the first is {boxes[0]}. Expected: x, y, width, height in pixels"
        )


def _listed_images(path: Path) -> dict[str, list]:
    """List ids and files of the images of an annotation file, in order.

    Only the list of images is parsed: parsing all of COCO's annotations takes a hundred times as
    long.
    """
    text = _text(path, errors="replace")
    places = [match.end() - 1 for match in IMAGE_LIST.finditer(text)]
    try:
        (place,) = places  # the key must be unique in the file
        images, _ = json.JSONDecoder().raw_decode(text, place)
        return {"ids": [i["id"] for i in images], "files": [i["file_name"] for i in images]}
    except (ValueError, TypeError, KeyError, RecursionError):
        images = read_annotations(path)["images"]  # raises a specific error
        return {"ids": [i["id"] for i in images], "files": [i["file_name"] for i in images]}


@dataclass(kw_only=True, eq=False)
class CocoDataModule(DetectionDataModule):
    """COCO below `root`; see `DetectionDataModule` for the other arguments.

    `classes` may be a subset of the file's classes in any order; default: the 80 of COCO.

    Args:
        train_ann, val_ann: annotation files, relative to `root` or absolute.
        train_img, val_img: image folders, relative to `root` or absolute.
        train_images, val_images: lists of the images that take part, see `ldt.data.image_lists`;
            all if None.
    """

    train_ann: str = "annotations/instances_train2017.json"
    val_ann: str = "annotations/instances_val2017.json"
    train_img: str = "train2017"
    val_img: str = "val2017"
    train_images: str | None = None
    val_images: str | None = None

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
            max_pixels=self.max_pixels,
            images=self._list(split),
            key=f"dataset.{split}_images",
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprints of both splits; image lists of large files are cached."""
        found = {}
        for split in ("train", "val"):
            annotations, images = self._paths(split)
            if not annotations.is_file():
                read_annotations(annotations)  # raises an error that says what to type
            listed = remembered(annotations, "images", _listed_images)
            names = dict(zip(listed["ids"], listed["files"], strict=True))
            if own := self._list(split):
                ids = listed_ids(own, f"dataset.{split}_images", list(names))
                names = {number: names[number] for number in ids}
            paths = (os.path.join(images, name) for name in names.values())
            found[split] = split_record(list(names), paths, file_digest(annotations))
        return found

    def _list(self, split: Split) -> str | None:
        return self.train_images if split == "train" else self.val_images

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
        return need_root(self.root, "coco") / path
