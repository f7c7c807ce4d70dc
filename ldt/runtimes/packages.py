"""The packages of the extra ``deploy``, imported when they are needed."""

import importlib
import sys
from types import ModuleType


def need(name: str) -> ModuleType:
    """Import a package of the extra ``deploy``; none of them sends anything over the network.

    Args:
        name: ``onnx``, ``onnxruntime``, ``openvino`` or ``nncf``.

    Raises:
        ImportError: it is not installed.
    """
    # openvino and nncf would report how they are used; without this package they cannot
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"exported detectors need the package {name} ({error}); run pip install 'ldt[deploy]'"
        ) from error
