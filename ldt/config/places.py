"""Files and folders that a configuration names: missing ones are told before heavy imports."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldt.config import CocoConfig, KittiConfig
from ldt.config.keys import dataset_schema

IMAGES, LABELS = Path("training/image_2"), Path("training/label_2")  # in KITTI's layout
LAYOUTS = {
    "kitti": f"KITTI's folders {IMAGES} (.png or .jpg) and {LABELS} (.txt)",
    "coco": "COCO's folders annotations, train2017 and val2017",
}
CONFIGS = "give a file, or a packaged config such as mmdet::gfl/gfl_r50_fpn_1x_coco.py"
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
    if root is None:
        raise ValueError(f"dataset.root is not set; type {typed} ({LAYOUTS[layout]})")
    path = Path(root).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"no folder {path}; expected there: {LAYOUTS[layout]}. Type {typed}"
        )
    return path


def need_checkpoint(path: str | Path) -> Path:
    """Return the path of a detector's weights; raise FileNotFoundError if there is no such file."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"detector.checkpoint={str(path)!r}: no such file")
    return file


def check_files(config: Mapping[str, Any]) -> None:
    """Check that the root of the data, the detector's config and its weights exist.

    Args:
        config: configuration of a run; data sets of one's own are not checked.

    Raises:
        ValueError: the root is not set.
        FileNotFoundError: something is missing.
    """
    dataset, detector, kind = config["dataset"], config["detector"], dataset_schema(config)
    if kind is KittiConfig:
        need_root(dataset["root"], "kitti")
    if kind is CocoConfig and not all(Path(dataset[key]).is_absolute() for key in COCO_PATHS):
        need_root(dataset["root"], "coco")
    model = detector["config"]
    if "::" not in model and not Path(model).expanduser().is_file():
        raise FileNotFoundError(f"detector.config={model!r}: no such file; {CONFIGS}")
    if detector["checkpoint"]:
        need_checkpoint(detector["checkpoint"])
