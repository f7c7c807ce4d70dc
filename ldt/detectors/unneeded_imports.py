"""Keep mmdet from importing transformers, which takes longer than all of mmdet and serves nothing.

mmdet tries to import it for detectors prompted by text, which need an earlier version than 5; with
later ones that fails halfway. This file imports neither, since it runs on `import ldt`.
"""

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

LIBRARY, OLD = "transformers", 4  # the major version that mmdet is written for


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if fullname == LIBRARY and _mmdet_is_being_imported() and _is_new():
            raise ModuleNotFoundError(f"{LIBRARY} is not what mmdet needs", name=LIBRARY)


def _mmdet_is_being_imported() -> bool:
    specs = [m.__spec__ for name, m in list(sys.modules.items()) if name.startswith("mmdet.")]
    return any(getattr(spec, "_initializing", False) for spec in specs)


def _is_new() -> bool:
    try:
        return int(version(LIBRARY).partition(".")[0]) > OLD
    except (PackageNotFoundError, ValueError):
        return False


def install() -> None:
    """Hide transformers from mmdet from now on (idempotent); others import it as usual."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
