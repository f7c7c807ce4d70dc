"""The structure of a pruned network as plain data, relative to the one its config builds.

The record contains strings and integers only, so a checkpoint with it loads under
``torch.load(weights_only=True)``, and applying it needs neither tracing nor Torch-Pruning.
"""

from collections.abc import Mapping
from operator import le
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ldt.pruning.attention import upgraded
from ldt.pruning.dependency import update_split_widths

SIZES = (
    "in_channels",
    "out_channels",
    "groups",
    "num_features",
    "num_channels",
    "in_features",
    "out_features",
)

Structure = dict[str, dict[str, int]]


def record(model: nn.Module) -> Structure:
    """Return the integer sizes of every layer that has any, by layer name."""
    sizes = {
        name: {key: value for key in SIZES if type(value := getattr(module, key, None)) is int}
        for name, module in model.named_modules()
        if module._parameters or not any(True for _ in module.children())
    }
    return {name: own for name, own in sizes.items() if own}


def rebuild(model: nn.Module, structure: Structure, state: Mapping[str, Tensor]) -> None:
    """Apply a recorded structure to a freshly built model, in place; load the weights afterwards.

    Args:
        model: as its config builds it.
        structure: from :func:`record` on the pruned model.
        state: the pruned model's state dict; only its shapes are used.

    Raises:
        ValueError: a recorded layer or tensor does not exist in the model, or is larger there.
    """
    structure, state = upgraded(model, structure, state)
    modules = dict(model.named_modules())
    for name, sizes in structure.items():
        if name not in modules:
            raise ValueError(
                f"the structure record contains the layer {name!r}, which "
                f"{type(model).__name__} does not have; it belongs to another detector"
            )
        for key, value in sizes.items():
            built = getattr(modules[name], key, None)
            if type(built) is not int or not 1 <= value <= built:
                raise ValueError(
                    f"the structure record has {key}={value} for {name!r}, where the detector that "
                    f"the config builds has {built}"
                )
            setattr(modules[name], key, value)
    for prefix, module in modules.items():
        dot = f"{prefix}." if prefix else ""
        for name, parameter in list(module.named_parameters(recurse=False)):
            shape = _shape(state, dot + name, parameter.shape)
            if shape != parameter.shape:
                fresh = nn.Parameter(parameter.new_zeros(shape), parameter.requires_grad)
                setattr(module, name, fresh)
        if isinstance(module, nn.LayerNorm):  # its size is a tuple, which is not recorded
            module.normalized_shape = tuple(module.weight.shape)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if dot + name in state and state[dot + name].shape != buffer.shape:
                shape = _shape(state, dot + name, buffer.shape)
                setattr(module, name, buffer.new_zeros(shape))
        _check_sizes(prefix, module)
    update_split_widths(model)


def changed_sizes(model: nn.Module, structure: Structure) -> Structure:
    """Return the entries of a record that differ from a model as its config builds it."""
    built = record(model)
    return {name: own for name, own in structure.items() if own != built.get(name)}


def changes(
    model: nn.Module, structure: Structure, state: Mapping[str, Tensor]
) -> tuple[Structure, dict[str, str]]:
    """Return how a record and a state dict differ from a model as its config builds it.

    Args:
        model: as its config builds it; is not changed.
        structure: from :func:`record` on the pruned model.
        state: the pruned model's state dict.

    Returns:
        The entries of ``structure`` that differ from the model's, and the shapes of the tensors
        that differ, as text (``8x3x7x7``): the arguments of :func:`apply_changes`.
    """
    unpruned, sizes = model.state_dict(), changed_sizes(model, structure)
    pruned = {k: state[k].shape for k, own in unpruned.items() if state[k].shape != own.shape}
    return sizes, {key: "x".join(map(str, shape)) for key, shape in pruned.items()}


def apply_changes(model: nn.Module, sizes: Structure, shapes: Mapping[str, str]) -> None:
    """Apply the result of :func:`changes` to a freshly built model; see :func:`rebuild`."""
    pruned = {
        key: torch.empty(*map(int, text.split("x")), device="meta") for key, text in shapes.items()
    }
    rebuild(model, sizes, model.state_dict() | pruned)


def _shape(state: Mapping[str, Tensor], key: str, built: torch.Size) -> torch.Size:
    if key not in state:
        raise ValueError(f"the checkpoint has no tensor {key!r}; it belongs to another detector")
    shape = state[key].shape  # pruning shrinks the first two dimensions only
    smaller = len(shape) == len(built) and all(map(le, shape, built))
    if not smaller or shape[2:] != built[2:]:
        raise ValueError(
            f"the checkpoint has {key!r} with shape {tuple(shape)}, which cannot be pruned from "
            f"{tuple(built)}; it belongs to another detector"
        )
    return shape


def _check_sizes(name: str, layer: nn.Module) -> None:
    """Check that the sizes of a layer are those of its weight."""
    sizes: Any = layer
    if isinstance(layer, _ConvNd):
        ends = (layer.out_channels, layer.in_channels)
        first, second = reversed(ends) if layer.transposed else ends
        expected = (first, second // layer.groups)
    elif isinstance(layer, nn.Linear):
        expected = (layer.out_features, layer.in_features)
    elif isinstance(layer, (_NormBase, nn.GroupNorm)) and layer.affine:
        expected = (sizes.num_features if isinstance(layer, _NormBase) else sizes.num_channels,)
    else:
        return
    if sizes.weight.shape[: len(expected)] != expected:
        raise ValueError(
            f"the structure record does not fit the weight of {name!r}, whose shape is "
            f"{tuple(sizes.weight.shape)}: {expected} expected"
        )


def channels(structure: Structure) -> dict[str, int]:
    """Return the output channels of every convolution and linear layer in a record."""
    return {
        name: sizes.get("out_channels", sizes.get("out_features", 0))
        for name, sizes in structure.items()
        if "out_channels" in sizes or "out_features" in sizes
    }
