"""A pruned network as plain data: what changed against the network its config builds.

The record holds strings and integers only, so a checkpoint that carries it loads under
``torch.load(weights_only=True)``, and it needs neither a trace nor Torch-Pruning to be applied.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldt.pruning.dependency import resize_parts

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
    """The integer sizes of every layer that has any, by layer name."""
    sizes = {
        name: {key: value for key in SIZES if type(value := getattr(module, key, None)) is int}
        for name, module in model.named_modules()
        if module._parameters or not any(True for _ in module.children())
    }
    return {name: found for name, found in sizes.items() if found}


def rebuild(model: nn.Module, structure: Structure, state: Mapping[str, Tensor]) -> None:
    """Give a freshly built model the recorded structure, in place; weights are loaded afterwards.

    Args:
        model: as its config builds it.
        structure: from :func:`record` on the pruned model.
        state: the pruned model's state dict; its shapes are taken over, not its values.

    Raises:
        ValueError: a recorded layer or tensor does not exist in the model, or a layer would grow.
    """
    modules = dict(model.named_modules())
    for name, sizes in structure.items():
        if name not in modules:
            raise ValueError(
                f"the structure record names the layer {name!r}, which "
                f"{type(model).__name__} does not have; it belongs to another detector"
            )
        for key, value in sizes.items():
            if value > getattr(modules[name], key, value):
                raise ValueError(
                    f"the structure record wants {key}={value} in {name!r}, more than the "
                    f"{getattr(modules[name], key)} of the detector that the config builds"
                )
            setattr(modules[name], key, value)
    resize_parts(model)
    for prefix, module in modules.items():
        dot = f"{prefix}." if prefix else ""
        for name, parameter in list(module.named_parameters(recurse=False)):
            shape = _shape(state, dot + name, parameter.shape)
            if shape != parameter.shape:
                fresh = nn.Parameter(parameter.new_zeros(shape), parameter.requires_grad)
                setattr(module, name, fresh)
        if isinstance(module, nn.LayerNorm):  # its size is a tuple, so the record lacks it
            module.normalized_shape = tuple(module.weight.shape)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if dot + name in state and state[dot + name].shape != buffer.shape:
                setattr(module, name, buffer.new_zeros(state[dot + name].shape))


def changes(
    model: nn.Module, structure: Structure, state: Mapping[str, Tensor]
) -> tuple[Structure, dict[str, str]]:
    """What of a record and of a state dict differs from a model as its config builds it.

    Args:
        model: as its config builds it; stays as it is.
        structure: from :func:`record` on the pruned model.
        state: the pruned model's state dict.

    Returns:
        The entries of ``structure`` that the model does not have already, and the shapes of the
        tensors that have another one in the model, as text (``8x3x7x7``): all that
        :func:`apply_changes` needs beside the model.
    """
    built, whole = record(model), model.state_dict()
    sizes = {name: found for name, found in structure.items() if found != built.get(name)}
    other = {key: state[key].shape for key, own in whole.items() if state[key].shape != own.shape}
    return sizes, {key: "x".join(map(str, shape)) for key, shape in other.items()}


def apply_changes(model: nn.Module, sizes: Structure, shapes: Mapping[str, str]) -> None:
    """Give a freshly built model a pruned structure from :func:`changes`, as :func:`rebuild`."""
    pruned = {
        key: torch.empty(*map(int, text.split("x")), device="meta") for key, text in shapes.items()
    }
    rebuild(model, sizes, model.state_dict() | pruned)


def _shape(state: Mapping[str, Tensor], key: str, built: torch.Size) -> torch.Size:
    if key not in state:
        raise ValueError(f"the checkpoint has no tensor {key!r}; it belongs to another detector")
    shape = state[key].shape  # pruning takes channels from the first two dimensions only
    if shape[2:] != built[2:] or any(new > old for new, old in zip(shape, built, strict=False)):
        raise ValueError(
            f"the checkpoint holds {key!r} with shape {tuple(shape)}, which pruning cannot make of "
            f"{tuple(built)}; it belongs to another detector"
        )
    return shape


def channels(structure: Structure) -> dict[str, int]:
    """Output channels of every convolution and linear layer in a record."""
    return {
        name: sizes.get("out_channels", sizes.get("out_features", 0))
        for name, sizes in structure.items()
        if "out_channels" in sizes or "out_features" in sizes
    }
