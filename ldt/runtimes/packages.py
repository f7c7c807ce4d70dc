"""The packages of the extra ``deploy``, imported when they are needed."""

import ctypes
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any


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


@cache
def openvino_core() -> Any:
    """Return OpenVINO's ``Core``, one for the whole process.

    Each that compiles a model replaces the stack on which its thread handles signals (see
    https://github.com/openvinotoolkit/openvino/pull/11894) and unmaps its own when it is deleted.
    After two that overlap the stack is one that is gone, and the next signal, be it the end of a
    child process, kills this one.

    Raises:
        ImportError: it is not installed.
    """
    return need("openvino").Core()


class _Stack(ctypes.Structure):
    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Afterwards signals are handled on the stack of before, whatever ``Core`` a library made."""
    if sys.platform != "linux":
        yield
        return
    library, before = ctypes.CDLL(None), _Stack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)
