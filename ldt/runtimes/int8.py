"""Post-training quantisation to int8, by NNCF."""

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np

from ldt.detectors.adapter import Detector
from ldt.runtimes.graph import INPUT
from ldt.runtimes.packages import need

IMAGES = 300  # calibration images


def quantise(model: Any, detector: Detector, images: Iterable[np.ndarray]) -> Any:
    """Return a model with weights and feature maps of 8 bits.

    The layers that compute the raw maps, and all that follows them, stay in float: boxes of 8 bits
    lie on a grid.

    Args:
        model: of OpenVINO, or an ONNX model.
        detector: what it was exported from.
        images: calibration images, each [1, 3, H, W].
    """
    nncf = need("nncf")
    is_onnx = hasattr(model, "graph")
    nncf.set_log_level(logging.ERROR)
    inputs = [{INPUT: image} if is_onnx else image for image in images]
    edges = _onnx_edges(model) if is_onnx else _openvino_edges(model)
    return nncf.quantize(
        model,
        nncf.Dataset(inputs),
        subset_size=len(inputs),
        preset=nncf.QuantizationPreset.MIXED,
        target_device=nncf.TargetDevice.CPU,
        ignored_scope=nncf.IgnoredScope(names=sorted(_after(edges, detector.predictors))),
    )


def _onnx_edges(model: Any) -> dict[str, list[str]]:
    """Return the names of the nodes that follow each node."""
    users: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node.name)
    return {
        node.name: [user for name in node.output for user in users.get(name, [])]
        for node in model.graph.node
    }


def _openvino_edges(model: Any) -> dict[str, list[str]]:
    return {
        node.get_friendly_name(): [
            user.get_node().get_friendly_name()
            for output in node.outputs()
            for user in output.get_target_inputs()
        ]
        for node in model.get_ordered_ops()
    }


def _after(edges: dict[str, list[str]], layers: list[str]) -> set[str]:
    """Return the nodes of layers and those that follow them."""
    starts = [f"model.{layer}." for layer in layers]
    stack = [name for name in edges if any(_module(name).startswith(s) for s in starts)]
    found: set[str] = set()
    while stack:
        if (name := stack.pop()) not in found:
            found.add(name)
            stack += edges.get(name, [])
    return found


def _module(node: str) -> str:
    """Return the dotted name of the module of a node, and its operator: ``model.neck.Conv.``."""
    parts = node.strip("/").split("/")
    # `convs/convs.0` is one module
    pairs = zip(parts, [*parts[1:], ""], strict=True)
    return ".".join(part for part, after in pairs if not after.startswith(f"{part}.")) + "."
