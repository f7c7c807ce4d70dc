"""ldt: compress visual detectors by location-aware discriminant analysis."""

from typing import TYPE_CHECKING, Any

from ldt.detectors.mmcv_ops import install

if TYPE_CHECKING:
    from ldt.detectors.checkpoints import load_pruned

install()

__all__ = ["load_pruned"]


def __getattr__(name: str) -> Any:  # keeps `import ldt` free of torch
    if name == "load_pruned":
        from ldt.detectors.checkpoints import load_pruned

        return load_pruned
    raise AttributeError(f"module 'ldt' has no attribute {name!r}")
