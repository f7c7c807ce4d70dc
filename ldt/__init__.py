"""ldt: compress visual detectors by location-aware discriminant analysis."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ldt.detectors import mmcv_ops, unneeded_imports

if TYPE_CHECKING:
    from ldt.api import PruningResult, evaluate, prune, sensitivity
    from ldt.callbacks.ldt_loss import LDTLoss
    from ldt.criteria.base import Criterion
    from ldt.deployment.prediction import predict
    from ldt.deployment.to_mmdet import export
    from ldt.deployment.to_runtime import export_file
    from ldt.detectors.checkpoints import load_pruned
    from ldt.experiment import train
    from ldt.module import DetectorModule
    from ldt.runs.run import open_run
    from ldt.runs.study import load_study

mmcv_ops.install()
unneeded_imports.install()

__all__ = [
    "Criterion",
    "DetectorModule",
    "LDTLoss",
    "PruningResult",
    "evaluate",
    "export",
    "export_file",
    "load_pruned",
    "load_study",
    "open_run",
    "predict",
    "prune",
    "sensitivity",
    "train",
]
_FOUND_IN = {  # imported when asked for: keeps `import ldt` free of torch
    "Criterion": "ldt.criteria.base",
    "DetectorModule": "ldt.module",
    "LDTLoss": "ldt.callbacks.ldt_loss",
    "PruningResult": "ldt.api",
    "evaluate": "ldt.api",
    "export": "ldt.deployment.to_mmdet",
    "export_file": "ldt.deployment.to_runtime",
    "load_pruned": "ldt.detectors.checkpoints",
    "load_study": "ldt.runs.study",
    "open_run": "ldt.runs.run",
    "predict": "ldt.deployment.prediction",
    "prune": "ldt.api",
    "sensitivity": "ldt.api",
    "train": "ldt.experiment",
}


def __getattr__(name: str) -> Any:
    if name not in _FOUND_IN:
        raise AttributeError(f"module 'ldt' has no attribute {name!r}")
    return getattr(import_module(_FOUND_IN[name]), name)
