"""Post-training quantisation to int8, by NNCF."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ldt.detectors.adapter import Detector
from ldt.runtimes.detection_graph import INPUT
from ldt.runtimes.packages import kept_signal_stack, need

if TYPE_CHECKING:
    from onnx import ModelProto
    from openvino import Model

IMAGES = 300  # calibration images
TRIALS = 3  # each leaves one part more of the backbone in float
BACKBONE = "model.backbone."


def quantise(model: Any, detector: Detector, images: Sequence[np.ndarray], spared: int = 1) -> Any:
    """Return a model with weights (by channel) and feature maps of 8 bits.

    The layers that compute the raw maps, and all that follows them, stay in float: boxes of 8 bits
    lie on a grid. So do the first parts of the backbone, whose few channels matter most.

    Args:
        model: of OpenVINO or ONNX.
        detector: what it was exported from.
        images: calibration images, each [1, 3, H, W].
        spared: number of the backbone's parts (its stem, its first stage...) that stay in float.
    """
    nncf = need("nncf")
    is_onnx = hasattr(model, "graph")
    edges = (_onnx_edges if is_onnx else _openvino_edges)(model)
    kept = _after(edges, detector.predictors) | _first_parts(edges, spared)
    # its own function would change every handler that listens to it
    logging.getLogger("nncf").setLevel(logging.ERROR)
    with kept_signal_stack():
        return nncf.quantize(
            model,
            nncf.Dataset([{INPUT: image} for image in images] if is_onnx else list(images)),
            subset_size=len(images),
            preset=nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice.CPU,
            ignored_scope=nncf.IgnoredScope(names=sorted(kept), validate=False),
        )


def _onnx_edges(model: "ModelProto") -> dict[str, list[str]]:
    """Return the names of the nodes that follow each node, in the order of the network."""
    users: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node.name)
    return {
        node.name: [user for name in node.output for user in users.get(name, [])]
        for node in model.graph.node
        if node.op_type != "Constant"
    }


def _openvino_edges(model: "Model") -> dict[str, list[str]]:
    return {
        node.get_friendly_name(): [
            user.get_node().get_friendly_name()
            for output in node.outputs()
            for user in output.get_target_inputs()
        ]
        for node in model.get_ordered_ops()
        if node.get_type_name() != "Constant"
    }


def _after(edges: dict[str, list[str]], layers: Sequence[str]) -> set[str]:
    """Return the nodes of layers and those that follow them."""
    starts = tuple(f"model.{layer}." for layer in layers)
    stack = [name for name in edges if _module(name).startswith(starts)]
    found: set[str] = set()
    while stack:
        if (name := stack.pop()) not in found:
            found.add(name)
            stack += edges.get(name, [])
    return found


def _first_parts(edges: dict[str, list[str]], count: int) -> set[str]:
    """Return the nodes of the first parts of the backbone, in the order of the network."""
    places = {name: _module(name) for name in edges}
    parts: dict[str, None] = {}  # an ordered set
    for name, place in places.items():
        if place.startswith(BACKBONE) and "Conv" in name:
            parts[_part(place)] = None
    first = set(list(parts)[:count])
    return {name for name, p in places.items() if p.startswith(BACKBONE) and _part(p) in first}


def _part(place: str) -> str:
    return place.removeprefix(BACKBONE).partition(".")[0]


def _module(node: str) -> str:
    """Return the dotted name of the module of a node, and its operator: ``model.neck.Conv.``."""
    parts = node.strip("/").split("/")
    # `convs/convs.0` is one module
    pairs = zip(parts, [*parts[1:], ""], strict=True)
    return ".".join(part for part, after in pairs if not after.startswith(f"{part}.")) + "."
