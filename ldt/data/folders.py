"""Data in a folder, whichever layout it has."""

from pathlib import Path
from typing import Any

from ldt.data.coco import CocoDataModule
from ldt.data.datamodule import DetectionDataModule
from ldt.data.kitti import KittiDataModule


def open_folder(
    folder: Path, settings: dict[str, Any], files: dict[str, str]
) -> DetectionDataModule:
    """Open data in COCO's or KITTI's layout.

    Args:
        folder: of the data.
        settings: arguments of the data module.
        files: ``train_ann``, ``train_img``, ``val_ann`` and ``val_img`` of one's own COCO files.
    """
    settings = {"root": str(folder), **settings}
    if (folder / "training" / "label_2").is_dir():
        return KittiDataModule(**settings)
    settings |= files
    return CocoDataModule(**settings)
