"""Trial pruning: check that removing a group's channels affects only the layers traced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldt.pruning.coupled_groups import CoupledGroup
from ldt.pruning.dependency import Shuffle
from ldt.pruning.layer_types import CONVOLUTIONS, STATISTICS, Side, width_of

if TYPE_CHECKING:
    from ldt.pruning.graph import PruningGraph


def trial_failure(graph: PruningGraph, names: Sequence[str]) -> str | None:
    """Return why half of the channels of these groups cannot be removed, or None.

    First the channels are masked at the inputs of all consumers that tracing found: then their
    values must not affect the output, or tracing missed a consumer or confused channels. Second,
    the network must run after they are removed. Third, a shuffle must still compute the same, since
    it also runs on channels that it confuses.
    """
    removed = {name: _half(graph.groups[name]) for name in names}
    try:
        masked, noisy = (_masked_outputs(graph, removed, noise) for noise in (0, 1))
        pairs = [(m.nan_to_num(), n.nan_to_num()) for m, n in zip(masked, noisy, strict=True)]
        if not all(torch.equal(one, other) for one, other in pairs):
            return "a consumer that tracing does not see reads its channels"
        with restored(graph.model):
            graph.remove({name: channels.tolist() for name, channels in removed.items()})
            for group in (graph.groups[name] for name in names):
                root = group.members[0]
                count = np.isin(root.roots, removed[group.name]).sum()
                if width_of(root.layer, "out") != len(root.channels) - count:
                    return "some of its channels can only be removed together"
            sliced = _masked_outputs(graph, {}, noise=0)
        shuffled = any(graph.groups[name].holds(Shuffle) for name in names)
        if shuffled and not all(map(_alike, masked, sliced)):
            return "its channels are shuffled by a hard-coded number"
    except Exception as error:  # whatever a model's code raises for unexpected shapes
        reason = " ".join(str(error).split())[:120]
        return f"the network does not run without half of them ({reason})"
    return None


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape != other.shape or torch.allclose(
        one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max()), equal_nan=True
    )


def _masked_outputs(
    graph: PruningGraph, channels: dict[str, np.ndarray], noise: float
) -> list[Tensor]:
    """Return the raw maps with noise added to channels that are masked for all consumers."""
    with ExitStack() as hooks:
        for layer in graph.model.modules():
            if isinstance(layer, STATISTICS):
                hooks.callback(layer.register_forward_hook(_affine_only).remove)
        for name, masked in channels.items():
            group = graph.groups[name]
            for member in group.members if group.consumers else ():  # queries meet keys: no layer
                own = member.channels[np.isin(member.roots, masked)]
                if isinstance(member.layer, CONVOLUTIONS) and member.side != "both":
                    hook = _register_mask(member.layer, member.side, own, noise)
                    hooks.callback(hook.remove)
        return list(graph.run())


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Undo, on exit, what was pruned within the context."""
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        sizes = {k: v for k, v in vars(module).items() if isinstance(v, (int, tuple))}
        before.append((vars(module), sizes))
        before += [(d, dict(d)) for d in (module._parameters, module._buffers)]
    try:
        yield
    finally:
        for target, content in before:
            target.update(content)


def _half(group: CoupledGroup) -> np.ndarray:
    """Return about half of a group's channels, the same number from each of its parts.

    An odd number of channels is left, if that is possible: the heads of an attention layer, which
    are views of channels, would not notice that half of them are gone.
    """
    size, rng = group.size // group.parts, np.random.default_rng(0)
    count = max(size // 2 - (size - size // 2 + 1) % 2, min(1, size // 2))
    chosen = [first + rng.permutation(size)[:count] for first in range(0, group.size, size)]
    return np.concatenate(chosen)


def _affine_only(
    layer: nn.GroupNorm | nn.LayerNorm, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """Replace a norm by its affine part; statistics over several channels would mix these."""
    if layer.weight is None:
        return inputs[0]
    shape = (-1, 1, 1)  # subclasses of LayerNorm work on feature maps, as GroupNorm does
    if isinstance(layer, nn.LayerNorm) and type(layer) is nn.LayerNorm:
        shape = layer.normalized_shape
    return inputs[0] * layer.weight.view(shape) + layer.bias.view(shape)


def _register_mask(
    layer: nn.Module, side: Side, channels: np.ndarray, noise: float
) -> RemovableHandle:
    """Mask input channels of a consumer with zeros, or add noise to output channels."""
    shape = (-1,) if isinstance(layer, nn.Linear) else (-1, 1, 1)
    mask = torch.zeros(width_of(layer, side))
    mask[channels] = torch.linspace(1, 2, len(channels))
    mask = mask.view(shape)

    def zero_inputs(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].masked_fill(mask.to(inputs[0]) != 0, 0), *inputs[1:])

    def add_noise(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + noise * mask.to(output)

    if side == "in":
        return layer.register_forward_pre_hook(zero_inputs)
    return layer.register_forward_hook(add_noise)
