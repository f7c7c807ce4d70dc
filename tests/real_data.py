"""Real images and weights for the tests that use them; these skip where there are none.

LDT_TEST_DATA names a folder with `kitti/` and `coco/` in their usual layouts and `weights/`.
"""

import os
from pathlib import Path

import pytest

_SHARED = Path(__file__).parents[2] / "shared/data"
DATA = Path(os.environ.get("LDT_TEST_DATA", _SHARED))
KITTI, COCO = DATA / "kitti", DATA / "coco"
YOLOX_NANO = DATA / "weights/yolox_nano_coco_mmdet.pth"
NANODET_G = DATA / "weights/nanodet_g"


def needs(path: Path) -> pytest.MarkDecorator:
    """Skip a test without this file or folder."""
    return pytest.mark.skipif(not path.exists(), reason=f"no {path}; set LDT_TEST_DATA")
