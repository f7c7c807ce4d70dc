"""Run mmdet without compiling mmcv: torchvision's operators back mmcv's Python layers.

mmcv-lite ships `mmcv/ops/*.py`, the autograd Functions and layers that mmdet uses, but not the
compiled module `mmcv._ext` that they call. If there is none, `mmcv_ext.py` in this directory is
imported instead. This file imports neither torch nor mmcv, since it runs on `import ldt`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "mmcv._ext":
            return None
        return importlib.util.spec_from_file_location(
            fullname, Path(__file__).with_name("mmcv_ext.py")
        )


def install() -> None:
    """Make `mmcv._ext` importable if mmcv was not compiled (idempotent).

    The finder is appended to `sys.meta_path`: Python tries it last, so a compiled `mmcv._ext` takes
    precedence, and nothing is loaded before `mmcv.ops` is imported.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
