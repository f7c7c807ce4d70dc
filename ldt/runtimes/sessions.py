"""Open exported files in ONNX Runtime or OpenVINO and run them.

A file may come from anyone. It is data: one file (OpenVINO's: two in a folder), known operators,
no code, nothing that it names is opened, nothing is fetched.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ldt.runs.refusal import one_line
from ldt.runtimes.about import KEY, About, read_about
from ldt.runtimes.packages import need, openvino_core

if TYPE_CHECKING:
    from onnx import GraphProto, TypeProto
    from openvino import InferRequest, Model

SUFFIXES = (".onnx", ".xml")
LARGEST_FILE = 2**31 - 1  # bytes, as ONNX's own limit
LARGEST_XML = 2**26
LARGEST_TENSOR = 2**31  # bytes, of what a node computes
LOOPS = ("If", "Loop", "Scan", "SequenceMap", "TensorIterator", "ReadValue", "Assign")
F32 = {"INFERENCE_PRECISION_HINT": "f32"}  # OpenVINO would compute in bfloat16 where a CPU has it


class Session(Protocol):
    """An exported file, ready to run.

    Attributes:
        about: its metadata.
    """

    about: About

    def __call__(self, image: np.ndarray) -> list[np.ndarray]:
        """Return the outputs for an image [1, 3, H, W], float32, pixel values as mmdet has them."""
        ...


@dataclass
class OnnxSession:
    """An ONNX file in ONNX Runtime, on the CPU."""

    about: About
    session: Any

    def __call__(self, image: np.ndarray) -> list[np.ndarray]:
        """Return the outputs for an image; see :class:`Session`."""
        return self.session.run(None, {self.session.get_inputs()[0].name: image})


@dataclass
class OpenVinoSession:
    """An OpenVINO model, on the CPU."""

    about: About
    request: "InferRequest"

    def __call__(self, image: np.ndarray) -> list[np.ndarray]:
        """Return the outputs for an image; see :class:`Session`."""
        return [value.copy() for value in self.request.infer([image]).to_tuple()]


def open_session(path: str | Path, threads: int | None = None) -> Session:
    """Open an exported file.

    Args:
        path: ``.onnx`` for ONNX Runtime, ``.xml`` (with ``.bin`` beside it) for OpenVINO.
        threads: of a run; None: as the runtime chooses.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, `ldt export` did not write it, or it holds what is not allowed.
        ImportError: the runtime is not installed.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{str(path)!r} is no exported file; allowed: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"no exported file at {str(path)!r}")
    try:
        return (_open_onnx if path.suffix == ".onnx" else _open_openvino)(path, threads)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def _open_onnx(path: Path, threads: int | None) -> OnnxSession:
    runtime = need("onnxruntime")
    content = _bytes(path, LARGEST_FILE)
    about = checked_onnx(content)
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    try:  # from memory: there is no folder to find further files in
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many types
        raise ValueError(f"ONNX Runtime cannot open it ({one_line(error, 300)})") from error
    return OnnxSession(about, session)


def checked_onnx(content: bytes) -> About:
    """Return the metadata of an ONNX file, which holds nothing but a graph of known operators.

    Raises:
        ValueError: in one line, what is not allowed.
    """
    onnx = need("onnx")
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:
        raise ValueError(f"it is damaged or no ONNX file ({type(error).__name__})") from error
    found = {entry.key: entry.value for entry in model.metadata_props}
    about = read_about(found.get(KEY))
    if model.functions or model.training_info:
        raise ValueError("it has functions or training steps; allowed: a graph")
    if any(entry.domain not in ("", "ai.onnx") for entry in model.opset_import):
        raise ValueError("it uses other operators than ONNX's own")
    graph = model.graph
    for node in graph.node:
        kinds = {attribute.type for attribute in node.attribute}
        if node.domain not in ("", "ai.onnx") or node.op_type in LOOPS or kinds & _GRAPHS(onnx):
            raise ValueError(f"it has the operator {node.op_type[:50]!r}, which is not allowed")
    for tensor in _tensors(graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise ValueError("its weights lie in another file; allowed: a single file")
    _check_input([_dims(each.type) for each in graph.input], about)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception as error:
        raise ValueError(f"its graph is not valid ({one_line(error, 300)})") from error
    _check_tensors(_dims(value.type) for value in [*inferred.value_info, *inferred.output])
    return about


def _GRAPHS(onnx: ModuleType) -> set[int]:
    return {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS}


def _tensors(graph: "GraphProto") -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for sparse in [attribute.sparse_tensor, *attribute.sparse_tensors]:
                yield from (sparse.values, sparse.indices)


def _dims(kind: "TypeProto") -> list[int]:
    """Return the known sizes of an ONNX tensor; unknown ones are 1."""
    return [side.dim_value or 1 for side in kind.tensor_type.shape.dim]


def _open_openvino(path: Path, threads: int | None) -> OpenVinoSession:
    weights = path.with_suffix(".bin")
    if not weights.is_file() or weights.resolve().parent != path.resolve().parent:
        raise ValueError(f"its weights {weights.name} are not beside it")
    content = _bytes(path, LARGEST_XML)
    core = openvino_core()
    try:
        model = core.read_model(content, _bytes(weights, LARGEST_FILE))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"it is damaged or no OpenVINO model ({one_line(error, 300)})") from error
    about = checked_openvino(model)
    options = F32 | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    try:
        compiled = core.compile_model(model, "CPU", options)
    except Exception as error:
        raise ValueError(f"OpenVINO cannot compile it ({one_line(error, 300)})") from error
    return OpenVinoSession(about, compiled.create_infer_request())


def checked_openvino(model: "Model") -> About:
    """Return the metadata of an OpenVINO model that was read; see :func:`checked_onnx`."""
    text = model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else None
    about = read_about(text)
    for node in model.get_ops():
        if node.get_type_name() in LOOPS:
            raise ValueError(f"it has the operator {node.get_type_name()}, which is not allowed")
        _check_tensors(
            [side.get_length() if side.is_static else 1 for side in output.partial_shape]
            for output in node.outputs()
            if output.partial_shape.rank.is_static
        )
    _check_input([_sides(each) for each in model.inputs], about)
    return about


def _sides(port: Any) -> list[int]:
    shape = port.partial_shape
    return [int(side) for side in shape.to_shape()] if shape.is_static else []


def _check_input(inputs: list[list[int]], about: About) -> None:
    if inputs != [[1, 3, *about.size]]:
        raise ValueError(f"its inputs are {str(inputs)[:100]}, not one [1, 3, H, W]={about.size}")


def _check_tensors(shapes: Iterable[list[int]]) -> None:
    for shape in shapes:
        if 4 * prod(shape) > LARGEST_TENSOR:
            raise ValueError(f"it computes a tensor of {shape} numbers, more than is allowed")


def _bytes(path: Path, most: int) -> bytes:
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path.name} has {size} bytes; allowed: {most}")
    return path.read_bytes()
