"""COCO (Lin et al., ECCV 2014), and any data set in its annotation format."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS

from ldt.data.datamodule import DetectionDataModule, Split, need_folder

CLASSES: tuple[str, ...] = CocoDataset.METAINFO["classes"]
LAYOUT = "COCO's folders annotations, train2017 and val2017"


def read_annotations(path: Path) -> dict:
    """Read an annotation file.

    Raises FileNotFoundError if there is none, ValueError if it is not in COCO's format.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no annotation file {path}; expected: {LAYOUT}. Type dataset.root=/path/to/coco, or "
            "dataset.train_ann=... and dataset.val_ann=... for other names"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path} is not in COCO's format: expected a list under {key!r}")
    if not content["images"]:
        raise ValueError(f"{path} lists no image; expected at least one under 'images'")
    return content


def check_classes(classes: Sequence[str], available: Sequence[str], path: Path) -> None:
    """Raise ValueError naming the first of `classes` that is not `available` in file `path`."""
    for name in classes:
        if name not in available:
            raise ValueError(
                f"{path} has no class {name!r}; available: {', '.join(available)} "
                f"(type for example dataset.classes=[{','.join(available[:2])}])"
            )


def check_images(folder: Path, names: Sequence[str]) -> None:
    """Raise FileNotFoundError naming the first of `names` missing from `folder`, and the count."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images of the annotation file are missing, the first "
            f"is {folder / missing[0]}; type dataset.train_img=... or dataset.val_img=... if the "
            "images are in another folder"
        )


@DATASETS.register_module()
class CocoBoxes(CocoDataset):
    """mmdet's CocoDataset that reads boxes only, checks its files and obeys the order of `classes`.

    mmdet numbers a subset of the classes in the order of the annotation *file*, whatever order
    the names are given in, and loads every mask. Crowds are ignore regions; images without a box
    are kept; boxes of other classes are left out.

    Raises:
        FileNotFoundError: the annotation file or an image is missing.
        ValueError: it is not in COCO's format, or lacks one of the classes.
    """

    def load_data_list(self) -> list[dict]:
        """Read and check the annotation file; called by mmengine."""
        path = Path(str(self.ann_file))
        content = read_annotations(path)
        try:
            return self._read(content, path)
        except KeyError as error:
            raise ValueError(
                f"{path}: an entry has no {error}; expected: images with id, file_name, width and "
                "height, annotations with image_id, category_id, bbox and area, categories with "
                "id and name"
            ) from error

    def _read(self, content: dict, path: Path) -> list[dict]:
        by_name = {category["name"]: category["id"] for category in content["categories"]}
        classes = self.metainfo["classes"]
        check_classes(classes, list(by_name), path)
        check_images(Path(self.data_prefix["img"]), [i["file_name"] for i in content["images"]])
        self.cat_ids = [by_name[name] for name in classes]
        self.cat2label = {category: label for label, category in enumerate(self.cat_ids)}
        annotations = defaultdict(list)
        for annotation in content["annotations"]:
            annotation.pop("segmentation", None)
            annotations[annotation["image_id"]].append(annotation)
        return [self._parse(image, annotations[image["id"]]) for image in content["images"]]

    def _parse(self, image: dict, annotations: list[dict]) -> dict:
        raw = {"raw_img_info": {**image, "img_id": image["id"]}, "raw_ann_info": annotations}
        info = self.parse_data_info(raw)
        assert isinstance(info, dict)
        return info


@dataclass(kw_only=True, eq=False)
class CocoDataModule(DetectionDataModule):
    """COCO below `root`: see `DetectionDataModule` for what is not named here.

    Args:
        train_ann, val_ann: annotation files, relative to `root` or absolute.
        train_img, val_img: image folders, relative to `root` or absolute.

    `classes` may be a subset of the file's, in any order; the 80 of COCO by default.
    """

    train_ann: str = "annotations/instances_train2017.json"
    val_ann: str = "annotations/instances_val2017.json"
    train_img: str = "train2017"
    val_img: str = "val2017"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.classes = self.classes or CLASSES

    def split_ids(self) -> dict[str, list]:
        """COCO's image ids (int) of both splits."""
        return {"train": self._ids("train"), "val": self._ids("val")}

    def load(self, split: Split) -> CocoBoxes:
        """Read the annotations of `split`."""
        annotations, images = (
            (self.train_ann, self.train_img) if split == "train" else (self.val_ann, self.val_img)
        )
        return CocoBoxes(
            ann_file=str(self._path(annotations)),
            data_prefix={"img": str(self._path(images))},
            metainfo={"classes": self.classes},
            test_mode=True,
        )

    def _ids(self, split: Split) -> list[int]:
        dataset = self.dataset(split)
        return [dataset.get_data_info(index)["img_id"] for index in range(len(dataset))]

    def _path(self, path: str) -> Path:
        if Path(path).is_absolute():
            return Path(path)
        if self.root is None:
            raise ValueError(f"dataset.root is not set; type dataset.root=/path/to/coco ({LAYOUT})")
        return need_folder(self.root, "dataset.root", LAYOUT) / path
