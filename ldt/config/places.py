"""Files and folders that a configuration names: missing ones are told before heavy imports."""

from collections.abc import Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ldt.config import CocoConfig, KittiConfig
from ldt.config.keys import dataset_schema

IMAGES, LABELS = Path("training/image_2"), Path("training/label_2")  # in KITTI's layout
KITTI = f"KITTI's folders {IMAGES} (.png or .jpg) and {LABELS} (.txt)"
LAYOUTS = {
    "kitti": KITTI,
    "coco": "COCO's folders annotations, train2017 and val2017",
}
CONFIGS = "give a file, or a packaged config such as mmdet::gfl/gfl_r50_fpn_1x_coco.py"
CHECKPOINTS = (b"PK\x03\x04", b"\x80")  # how files of torch.save begin, and began
CONFIG_SUFFIXES = (".py", ".json", ".yaml", ".yml")  # that mmengine reads
COCO_PATHS = ("train_ann", "train_img", "val_ann", "val_img")


def need_root(root: str | Path | None, layout: str) -> Path:
    """Return the root of a data set as a path.

    Args:
        root: ``dataset.root``.
        layout: a key of `LAYOUTS`.

    Raises:
        ValueError: it is not set.
        FileNotFoundError: there is no such folder.
    """
    typed = f"dataset.root=/path/to/{layout}"
    if not root:
        raise ValueError(f"dataset.root is not set; type {typed} ({LAYOUTS[layout]})")
    path = Path(root).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"no folder {path}; expected there: {LAYOUTS[layout]}. Type {typed}"
        )
    return path


def need_kitti(root: str | Path | None) -> Path:
    """Return the root of data in KITTI's layout.

    Raises:
        ValueError: it is not set.
        FileNotFoundError: it, or one of the folders in it, is missing.
    """
    path = need_root(root, "kitti")
    for folder in (IMAGES, LABELS):
        if not (path / folder).is_dir():
            raise FileNotFoundError(f"no folder {path / folder}; expected in {path}: {KITTI}")
    return path


def need_annotations(path: Path) -> None:
    """Check that an annotation file in COCO's format is there.

    Raises:
        FileNotFoundError: it is not.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no annotation file {path}; expected: {LAYOUTS['coco']}. Type "
            "dataset.root=/path/to/coco, or dataset.train_ann=... and dataset.val_ann=... for "
            "other names"
        )


def _need_coco(dataset: Mapping[str, Any]) -> None:
    paths = {key: Path(dataset[key]).expanduser() for key in COCO_PATHS}
    root = Path()
    if not all(path.is_absolute() for path in paths.values()):
        root = need_root(dataset["root"], "coco")
    for split in ("train", "val"):
        need_annotations(root / paths[f"{split}_ann"])
        folder = root / paths[f"{split}_img"]
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no folder {folder}; type dataset.{split}_img=<folder of the images>"
            )


def need_checkpoint(path: str | Path) -> Path:
    """Return the path of a detector's weights; raise FileNotFoundError if there is no such file."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"detector.checkpoint={str(path)!r}: no such file; give one, or "
            "detector.checkpoint=null for random weights"
        )
    return file


def need_config(config: str) -> None:
    """Check that an mmdet config is there.

    Raises:
        ValueError: it is of another kind.
        FileNotFoundError: there is no such file.
    """
    package, separator, name = config.rpartition("::")
    file = Path(name).expanduser()
    if separator:
        if (folder := config_folder(package)) is None or not (folder / name).is_file():
            raise FileNotFoundError(
                f"detector.config={config!r}: {package} has no such config; "
                f"{_nearest(file, folder)}{CONFIGS}"
            )
    elif not file.is_file():
        raise FileNotFoundError(f"detector.config={config!r}: no such file; {CONFIGS}")
    if file.suffix not in CONFIG_SUFFIXES:
        raise ValueError(f"detector.config={config!r}: no config of mmdet; {CONFIGS}")


def config_folder(package: str) -> Path | None:
    """Return the folder of the configs that an installed package has; None if it has none."""
    if package == "ldt":
        return Path(__file__).parents[1] / "detectors/configs"
    found = find_spec(package) if package.isidentifier() else None
    places = list((found and found.submodule_search_locations) or ())
    return Path(places[0], ".mim", "configs") if places else None


def _nearest(file: Path, folder: Path | None) -> str:
    known = {config.stem: config for config in folder.glob("*/*.py")} if folder else {}
    near = get_close_matches(file.stem, known, 1)
    if not near:
        return ""
    config = known[near[0]]
    return f"did you mean mmdet::{config.parent.name}/{config.name}? "


def check_files(config: Mapping[str, Any]) -> None:
    """Check that the root of the data, the detector's config and its weights exist.

    Args:
        config: configuration of a run; data sets of one's own are not checked.

    Raises:
        ValueError: the root is not set, or a file is of another kind.
        FileNotFoundError: something is missing.
    """
    dataset, detector, kind = config["dataset"], config["detector"], dataset_schema(config)
    if kind is KittiConfig:
        need_kitti(dataset["root"])
    if kind is CocoConfig:
        _need_coco(dataset)
    need_config(detector["config"])
    if detector["checkpoint"] is not None:
        with need_checkpoint(detector["checkpoint"]).open("rb") as file:
            if not file.read(4).startswith(CHECKPOINTS):
                raise ValueError(
                    f"detector.checkpoint={detector['checkpoint']!r}: no checkpoint of PyTorch"
                )
