"""KITTI object detection (Geiger et al., CVPR 2012), and any data set in its layout."""

import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Le
from mmdet.datasets import BaseDetDataset
from mmdet.registry import DATASETS

from ldt.config.kinds import Grouping
from ldt.config.places import IMAGES, KITTI, LABELS, need_kitti
from ldt.config.values import Count, NaturalNumber, check_value
from ldt.data.datamodule import DetectionDataModule, Split
from ldt.data.image_files import MAX_PIXELS, SUFFIXES, Size, image_sizes
from ldt.data.image_lists import listed_ids
from ldt.data.kitti_labels import (
    CLASSES,
    SETS,
    TYPES,
    KittiObject,
    parse_label,
)
from ldt.data.tally import Tally
from ldt.runs.inputs import digest, split_record

log = logging.getLogger(__name__)

GROUPINGS: dict[str, dict[str, str]] = {
    "merged": {"Van": "Car", "Truck": "Car", "Tram": "Car", "Person_sitting": "Pedestrian"},
    "strict": {},
}


def group(objects: Iterable[KittiObject], grouping: str, classes: Sequence[str]) -> list[dict]:
    """Convert objects to mmdet instances; objects of other classes become ignore regions.

    "merged" maps Van, Truck and Tram to Car and Person_sitting to Pedestrian; "strict" keeps all
    types. Ignore regions have the label -1.
    """
    labels = {name: label for label, name in enumerate(classes)}
    merged = GROUPINGS[grouping]
    instances = []
    for item in objects:
        label = labels.get(merged.get(item.name, item.name), -1)
        instances.append(
            {"bbox": list(item.box), "bbox_label": label, "ignore_flag": int(label < 0)}
        )
    return instances


def check_classes(classes: Sequence[str], grouping: str) -> None:
    """Raise ValueError for an unknown `grouping`, or a class that does not exist in it.

    Names that are not KITTI's are one's own.
    """
    check_value("dataset.grouping", grouping, Grouping)
    merged = GROUPINGS[grouping]
    allowed = [name for name in TYPES if name != "DontCare" and name not in merged]
    for name in classes:
        if name in merged or name == "DontCare":
            raise ValueError(
                f"KITTI has no class {name!r} with dataset.grouping={grouping}; allowed: "
                f"{', '.join(allowed)}, and names of your own (type for example "
                f"dataset.classes=[{','.join(CLASSES)}], or dataset.grouping=strict)"
            )


def image_ids(root: Path) -> list[str]:
    """List the sorted names, without extension, of the images under `root`.

    Raises:
        FileNotFoundError: there are no images.
    """
    ids = sorted(_image_files(root))
    if not ids:
        raise FileNotFoundError(f"no images in {root / IMAGES}; expected in {root}: {KITTI}")
    return ids


def _image_files(root: Path) -> dict[str, Path]:
    """Return the image of every id; of several with one id the last by name."""
    files = (file for file in _entries(root / IMAGES) if file.suffix.lower() in SUFFIXES)
    return {file.stem: file for file in files}


def _entries(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted, without hidden files such as macOS's ``._000001.png``."""
    found = sorted(folder.iterdir()) if folder.is_dir() else ()
    return [entry for entry in found if not entry.name.startswith(".")]


def split(ids: Sequence[str], fraction: float = 0.8, seed: int = 0) -> tuple[list[str], list[str]]:
    """Split `ids` into sorted (train, val) with `fraction` of them, rounded, in train.

    The split is based on a hash of (seed, id), so it depends neither on the order of `ids` nor on
    a library's random number generator.

    Raises:
        ValueError: an id occurs twice, or a split would be empty.
    """
    if len(set(ids)) != len(ids):
        raise ValueError("cannot split: an image id occurs twice")
    count = round(fraction * len(ids))
    if not 0 < count < len(ids):
        raise ValueError(
            f"dataset.train_fraction={fraction} of {len(ids)} images leaves {count} for training "
            f"and {len(ids) - count} for validation; allowed: at least one each (type for "
            "example dataset.train_fraction=0.8)"
        )
    order = sorted(ids, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    return sorted(order[:count]), sorted(order[count:])


def blocks(ids: Sequence[str], folds: int) -> list[list[str]]:
    """Cut the sorted ids into contiguous blocks whose sizes differ by one at most.

    Example:
        >>> blocks(["c", "a", "b", "e", "d"], 2)
        [['a', 'b'], ['c', 'd', 'e']]
    """
    ordered = sorted(ids)
    edges = [len(ordered) * fold // folds for fold in range(folds + 1)]
    return [ordered[start:end] for start, end in pairwise(edges)]


def fold_split(
    ids: Sequence[str], folds: int, fold: int, gap: int = 1
) -> tuple[list[str], list[str]]:
    """Split `ids` into (train, val): val is a contiguous block, and train keeps its distance.

    Neighbouring frames of a drive show the same objects, so that `gap` images on either side of the
    block are in neither split.

    Args:
        ids: image ids, whose order is that of the frames.
        folds: number of blocks.
        fold: the block for validation, from 0.
        gap: images left out on either side of it.

    Raises:
        ValueError: no such block, or nothing is left for training.
    """
    check_value("dataset.folds", folds, Annotated[int, Ge(2), Le(len(ids))], 5)
    check_value("dataset.fold", fold, Annotated[int, Ge(0), Le(folds - 1)], 0)
    check_value("dataset.gap", gap, Count, 4)
    parts = blocks(ids, folds)
    before = [name for part in parts[:fold] for name in part]
    after = [name for part in parts[fold + 1 :] for name in part]
    train = [*before[: max(len(before) - gap, 0)], *after[gap:]]
    if not train:
        raise ValueError(
            f"dataset.folds={folds} of {len(ids)} images and dataset.gap={gap} leave none for "
            "training; type a smaller dataset.gap"
        )
    return train, parts[fold]


def _split_files(root: Path) -> list[Path]:
    return [root / SETS / f"{name}.txt" for name in ("train", "val")]


def read_image_sets(root: Path) -> tuple[list[str], list[str]] | None:
    """Read (train, val) from ImageSets/train.txt and val.txt; None unless both exist.

    Raises:
        ValueError: an image is in both, or twice in one, or one of them is empty.
    """
    files = _split_files(root)
    if not all(file.is_file() for file in files):
        return None
    train, val = (file.read_text("utf-8-sig", errors="replace").split() for file in files)
    both = sorted(set(train) & set(val))
    if both:
        raise ValueError(f"{len(both)} images are in {files[0]} and in {files[1]}: {both[0]}, ...")
    for file, ids in zip(files, (train, val), strict=True):
        if not ids:
            raise ValueError(f"{file} is empty; expected one image id in a line, like 000042")
        if twice := [name for name, count in Counter(ids).items() if count > 1]:
            raise ValueError(f"{file} lists {len(twice)} images more than once: {twice[0]}, ...")
    return train, val


def _pair(root: Path, name: str, images: dict[str, Path]) -> tuple[Path, Path]:
    """Return image and label file of an id; raise FileNotFoundError if one is missing."""
    label = root / LABELS / f"{name}.txt"
    if name not in images:
        image = root / IMAGES / name
        raise FileNotFoundError(f"no image {image}.png or .jpg, although {name!r} is in the list")
    if not label.is_file():
        raise FileNotFoundError(f"no label {label} for the image {images[name]}")
    return images[name], label


@DATASETS.register_module()
class KittiDataset(BaseDetDataset):
    """Data set of the images `ids` in KITTI's layout below `root`; `img_id` = index in `ids`.

    With `official`, images carry all their `KittiObject`s under `kitti` for KITTI's own metric.
    Objects of less than a pixel are left out, and counted in `told`.

    Raises:
        FileNotFoundError: the root, or an image or its label is missing.
        ValueError: an image that is damaged or has more than `max_pixels`, a damaged label (see
            `parse_label`), relative boxes, an unknown grouping or class.
    """

    METAINFO = {"dataset_type": "kitti", "classes": CLASSES}

    def __init__(
        self,
        root: str | Path,
        ids: Sequence[str],
        grouping: str = "merged",
        classes: Sequence[str] = CLASSES,
        pipeline: Sequence[dict] = (),
        test_mode: bool = True,
        official: bool = True,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.official, self.max_pixels = official, max_pixels
        self.told, self.largest = Tally(), 0.0  # the largest coordinate of a box
        self.root = need_kitti(root)
        self.ids = list(ids)
        self.grouping = grouping
        check_classes(classes, grouping)
        super().__init__(
            data_root=str(self.root),
            metainfo={"classes": tuple(classes)},
            pipeline=list(pipeline),
            test_mode=test_mode,
        )

    def load_data_list(self) -> list[dict]:
        """Load and validate all labels; called by mmengine."""
        files = _image_files(self.root)
        pairs = [_pair(self.root, name, files) for name in self.ids]
        sizes = image_sizes([str(image) for image, _ in pairs], self.max_pixels)
        infos = [
            self._load(index, image, label, size)
            for index, ((image, label), size) in enumerate(zip(pairs, sizes, strict=True))
        ]
        self.told.log(self.root / LABELS)
        if 0 < self.largest <= 1:
            raise ValueError(
                f"all boxes in {self.root / LABELS} are within 0 and 1, as if relative to the size "
                "of the image; expected: x1, y1, x2, y2 in pixels"
            )
        return infos

    def _load(self, index: int, image: Path, label: Path, size: Size) -> dict:
        width, height = size
        objects = parse_label(label, width, height)
        instances = group(objects, self.grouping, self.metainfo["classes"])
        pairs = zip(objects, instances, strict=True)
        return {
            "img_id": index,
            "img_path": str(image),
            "width": width,
            "height": height,
            "instances": [kept for item, kept in pairs if self._keeps(item, kept, label)],
            **({"kitti": objects} if self.official else {}),
        }

    def _keeps(self, item: KittiObject, instance: dict, label: Path) -> bool:
        x1, y1, x2, y2 = item.box
        self.largest = max(self.largest, *item.labelled)
        if instance["ignore_flag"]:
            what = f"objects of the type {item.name}, which become ignored regions"
            self.told.add(what, label.name, expected=item.name in TYPES)
        elif min(x2 - x1, y2 - y1) < 1:
            example = f"{item.name} {item.labelled} in {label.name}"
            self.told.add("boxes narrower or lower than a pixel, left out", example)
            return False
        return True


@dataclass(kw_only=True, eq=False)
class KittiDataModule(DetectionDataModule):
    """KITTI below `root`; see `DetectionDataModule` for the other arguments.

    Args:
        grouping: "merged" or "strict", see `group`.
        train_fraction: share of the images used for training; ignored if ImageSets/train.txt and
            ImageSets/val.txt exist.
        split_seed: seed of this split, separate from `seed` so that runs with different seeds
            share it.
        images: list of the images that take part, see `ldt.data.image_lists`; all if None.
        folds: number of contiguous blocks of the sorted images (see `fold_split`), one of which is
            for validation; 0: a random split by `train_fraction`. ImageSets are not used.
        fold: the block for validation, from 0.
        gap: images left out of training on either side of it.
        reserved_folds: so many of the last blocks are for a last, single look.
        open_reserved: allow `fold` to be one of these.
    """

    official: ClassVar[bool] = True  # whether KITTI's own metric is computed

    grouping: str = "merged"
    train_fraction: float = 0.8
    split_seed: int = 0
    images: str | None = None
    folds: NaturalNumber = 0
    fold: NaturalNumber = 0
    gap: NaturalNumber = 4
    reserved_folds: NaturalNumber = 0
    open_reserved: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.classes = self.classes or CLASSES
        check_classes(self.classes, self.grouping)

    def folder(self) -> Path:
        """Return the root; raise ValueError or FileNotFoundError if it is not set or missing."""
        return need_kitti(self.root)

    def split_ids(self) -> dict[str, list]:
        """Return the image names of both splits, like "000042"."""
        root = self.folder()
        if self.folds:
            train, val = self._fold_ids()
            return {"train": train, "val": val}
        listed = None if self.images else read_image_sets(root)
        if listed and self.train_fraction != KittiDataModule.train_fraction:
            warnings.warn(
                f"the split is read from {root}/ImageSets: dataset.train_fraction is not used",
                stacklevel=2,
            )
        if listed and type(self) is KittiDataModule:
            log.info("the split is read from %s/ImageSets; dataset.split_seed is not used", root)
        train, val = listed or split(self._ids(), self.train_fraction, self.split_seed)
        return {"train": train, "val": val}

    def _ids(self) -> list[str]:
        ids = image_ids(self.folder())
        return listed_ids(self.images, "dataset.images", ids) if self.images else ids

    def _fold_ids(self) -> tuple[list[str], list[str]]:
        """Return the ids of the fold.

        Raises:
            ValueError: it is a reserved one that is not opened.
        """
        first = self.folds - self.reserved_folds
        if self.fold >= first and self.fold < self.folds and not self.open_reserved:
            allowed = f"0 to {first - 1}" if first > 0 else "none"
            raise ValueError(
                f"dataset.fold={self.fold} is reserved for a last look; allowed: {allowed} (type "
                "dataset.open_reserved=true to open it)"
            )
        return fold_split(self._ids(), self.folds, self.fold, self.gap)

    def load(self, split: Split) -> KittiDataset:
        """Load the labels of `split`."""
        return KittiDataset(
            self.folder(),
            self.split_ids()[split],
            self.grouping,
            self.classes,
            official=self.official,
            max_pixels=self.max_pixels,
        )

    def unread(self) -> Tally:
        """Return what lies in the folders of images, labels and lists and is in neither split."""
        root, told = self.folder(), Tally()
        used = _image_files(root)
        listed = {name for ids in self.split_ids().values() for name in ids}
        for entry in _entries(root / IMAGES):
            if entry.suffix.lower() not in SUFFIXES:
                told.add("entries that are not images, not read", str(IMAGES / entry.name))
            elif used[entry.stem] != entry:
                told.add("images not read, since another has their id", str(IMAGES / entry.name))
            elif entry.stem not in listed and not (self.folds or self.images):
                told.add("images in neither list of ImageSets", str(IMAGES / entry.name))
        for entry in _entries(root / LABELS):
            if entry.suffix == ".txt" and entry.stem not in used:
                told.add("labels without an image, not read", str(LABELS / entry.name))
        lists = [file for file in _split_files(root) if file.is_file()]
        if len(lists) == 1:
            told.add("lists of a split, not used without the other one", str(lists[0]))
        return told

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprints of both splits, with a hash of the label files."""
        root = self.folder()
        images, found = _image_files(root), {}
        for split, ids in self.split_ids().items():
            pairs = [_pair(root, name, images) for name in ids]
            labels = digest(label.read_bytes() for _, label in pairs)
            found[split] = split_record(ids, (str(image) for image, _ in pairs), labels)
        return found


def __getattr__(name: str) -> Any:
    """Resolve the former path of the generated data set, used by configurations of older runs."""
    if name == "RoadScenesDataModule":
        return import_module("ldt.data.roadscenes").RoadScenesDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
