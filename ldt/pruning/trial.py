"""Prune on trial: do the channels of a group matter to anything but the layers that are cut?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ldt.pruning.coupled_groups import CoupledGroup
from ldt.pruning.layer_types import CONVOLUTIONS, STATISTICS, width_of

if TYPE_CHECKING:
    from ldt.pruning.graph import PruningGraph


def failure(graph: PruningGraph, names: Sequence[str]) -> str | None:
    """Why half of the channels of these groups cannot go, or None.

    Where all readers of the channels see zeros, their values must not matter: else tracing has
    missed a reader, or taken one channel for another. Then the network must run when it is cut.
    """
    gone = {name: _half(graph.groups[name]) for name in names}
    try:
        if any(
            not torch.equal(one.nan_to_num(), other.nan_to_num())
            for one, other in zip(
                _masked_outputs(graph, gone, 0), _masked_outputs(graph, gone, 1), strict=True
            )
        ):
            return "something that tracing does not see reads its channels"
        with _restored(graph.model):
            graph.remove({name: channels.tolist() for name, channels in gone.items()})
            for group in (graph.groups[name] for name in names):
                root = group.members[0]
                cut = np.isin(root.roots, gone[group.name]).sum()
                if width_of(root.layer, "out") != len(root.channels) - cut:
                    return "some of its channels only go together"
            graph.run()
    except Exception as error:  # whatever a model's code does with unexpected shapes
        reason = " ".join(str(error).split())[:120]
        return f"the network does not run without half of them ({reason})"
    return None


def _masked_outputs(graph: PruningGraph, gone: dict[str, np.ndarray], noise: float) -> list[Tensor]:
    """The raw maps with noise on the channels that are gone, which no reader sees."""
    with ExitStack() as hooks:
        for layer in graph.model.modules():
            if isinstance(layer, STATISTICS):
                hooks.callback(layer.register_forward_hook(_affine).remove)
        for name, channels in gone.items():
            for member in graph.groups[name].members:
                touched = member.channels[np.isin(member.roots, channels)]
                if isinstance(member.layer, CONVOLUTIONS) and member.side != "both":
                    masking = _masking(member.layer, member.side, touched, noise)
                    hooks.callback(masking.remove)
        return list(graph.run())


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Within it, surgery is for a trial only."""
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        sizes = {k: v for k, v in vars(module).items() if isinstance(v, (int, tuple))}
        before.append((vars(module), sizes))
        before += [(d, dict(d)) for d in (module._parameters, module._buffers)]
    try:
        yield
    finally:
        for place, content in before:
            place.update(content)


def _half(group: CoupledGroup) -> np.ndarray:
    """Half of a group's channels, the same number of each of its parts."""
    size, rng = group.size // group.parts, np.random.default_rng(0)
    chosen = [first + rng.permutation(size)[: size // 2] for first in range(0, group.size, size)]
    return np.concatenate(chosen)


def _affine(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A normalisation by statistics over several channels, without these: they mix channels."""
    if layer.weight is None:
        return inputs[0]
    plain = type(layer) is nn.LayerNorm  # its subclasses work on maps, as GroupNorm does
    shape = layer.normalized_shape if plain else (-1, 1, 1)
    return inputs[0] * layer.weight.view(shape) + layer.bias.view(shape)


def _masking(layer: nn.Module, side: str, channels: np.ndarray, noise: float) -> Any:
    """A hook that hides channels from a reader, or adds noise to what a layer makes."""
    shape = (-1,) if isinstance(layer, nn.Linear) else (-1, 1, 1)
    mask = torch.zeros(width_of(layer, side))
    mask[channels] = torch.linspace(1, 2, len(channels))
    mask = mask.view(shape)

    def hide(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].masked_fill(mask.to(inputs[0]) != 0, 0), *inputs[1:])

    def disturb(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output + noise * mask.to(output)

    if side == "in":
        return layer.register_forward_pre_hook(hide)
    return layer.register_forward_hook(disturb)
