"""Which channels are coupled, and cutting them: a plain view of Torch-Pruning's graph."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch_pruning as tp
from mmcv.cnn.bricks import HSwish, Swish
from torch import Tensor, nn
from torch.nn.modules import activation

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
ACTIVATIONS = (
    activation.ReLU, activation.ReLU6, activation.LeakyReLU, activation.PReLU, activation.ELU,
    activation.SiLU, activation.Mish, activation.GELU, activation.Hardswish, Swish, HSwish,
)  # fmt: skip

Forward = Callable[..., Any]  # (model, images) -> the raw output maps


@dataclass(frozen=True)
class Member:
    """One side of one layer that the channels of a group touch.

    Attributes:
        name: the layer's name in the model.
        layer: the layer.
        side: ``out`` (its filters), ``in`` (what it reads), or ``both`` (norms, depthwise
            convolutions and other layers that keep channels apart).
        channels: the touched channels of this side.
        roots: for each of them, the group's channel it belongs to.
    """

    name: str
    layer: nn.Module
    side: Literal["out", "in", "both"]
    channels: np.ndarray
    roots: np.ndarray


@dataclass(frozen=True)
class CoupledGroup:
    """Channels that can only be removed together, over all the layers that share them.

    Attributes:
        name: the root layer, in whose channels the group is counted.
        size: number of channels.
        members: every side of every layer that changes when a channel goes.
        raw: Torch-Pruning's group, which an importance is called with.
        parts: channels go in steps of one from each of this many equal parts (GroupNorm).
    """

    name: str
    size: int
    members: tuple[Member, ...]
    raw: Any = field(repr=False, default=None)
    parts: int = 1

    @property
    def makers(self) -> tuple[Member, ...]:
        """The convolutions whose output channels the group is made of."""
        return tuple(
            m for m in self.members if m.side != "in" and isinstance(m.layer, CONVOLUTIONS)
        )


class PruningGraph:
    """The coupled groups of a model's scope, and the surgery that removes their channels.

    Args:
        model: in eval mode, with gradients on for all parameters (tracing follows ``grad_fn``).
        forward: ``forward(model, images)`` gives the raw output maps.
        images: an example input [1, 3, H, W].
        scope: name prefixes; only layers below them lose filters.
        never: layers whose outputs must stay (predictors).

    Attributes:
        model, forward, never: as given.
        groups: what can be cut, by name of the root layer.
        scored: the convolutions of the scope that the groups' channels come from.
        left_whole: layers of the scope that cannot be cut, with the reason.
        norm_of: the normalisation layer that directly follows a convolution.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        images: Tensor,
        scope: Sequence[str],
        never: Sequence[str] = (),
    ) -> None:
        self.model, self.forward, self.never = model, forward, tuple(never)
        self._example = images
        self._names = {module: name for name, module in model.named_modules()}
        self._graph = tp.DependencyGraph().build_dependency(
            model, images, forward_fn=forward, verbose=False
        )
        self.groups: dict[str, CoupledGroup] = {}
        self.scored: dict[str, nn.Module] = {}
        self.left_whole: dict[str, str] = {}
        self.norm_of = self._norms()
        in_scope: dict[str, nn.Module] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, CONVOLUTIONS) and _below(name, scope)
        }
        if not in_scope:
            parts = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"prune.scope={list(scope)} holds no convolution; the detector's parts are: {parts}"
            )
        for raw in self._graph.get_all_groups(root_module_types=list(CONVOLUTIONS)):
            self._add(raw, in_scope, set(never), scope)
        for name in in_scope:
            if name not in self.scored:
                self.left_whole.setdefault(name, "not reached by tracing")

    def _norms(self) -> dict[str, str]:
        found = {}
        for module, node in self._graph.module2node.items():
            # a module that is called several times has its neighbours listed once per call
            following = {output.module: output for output in node.outputs}
            if not isinstance(module, CONVOLUTIONS) or len(following) != 1:
                continue
            norm, after = following.popitem()
            if isinstance(norm, NORMS) and all(i.module is module for i in after.inputs):
                found[self._names[module]] = self._names[norm]
        return found

    def _add(self, raw: Any, in_scope: dict[str, nn.Module], never: set[str], scope: Any) -> None:
        members = tuple(
            Member(
                self._names[item.dep.target.module],
                item.dep.target.module,
                self._side(item.dep),
                np.asarray(item.idxs),
                np.asarray(item.root_idxs),
            )
            for item in raw.items
            if item.dep.target.module in self._names
        )
        root = members[0]
        group = CoupledGroup(root.name, len(root.roots), members, raw, _parts(members))
        inside = {m.name: m.layer for m in group.makers if m.name in in_scope}
        if not inside:
            return
        reason = _obstacle(group, never, scope)
        if reason is None:
            self.groups[group.name] = group
            self.scored.update(inside)
        else:
            self.left_whole.update(dict.fromkeys(inside, reason))

    def _side(self, dep: Any) -> Literal["out", "in", "both"]:
        out = self._graph.is_out_channel_pruning_fn(dep.handler)
        inn = self._graph.is_in_channel_pruning_fn(dep.handler)
        return "both" if out and inn else "out" if out else "in"

    @cached_property
    def positions(self) -> dict[str, int]:
        """Output positions of every layer over all its calls, for one image of the example's size.

        A convolution costs ``weight.numel()`` multiply-adds per position (a transposed one per
        position of its input, which is what is counted then); a head shared by five levels is
        called five times.
        """
        counted: dict[str, int] = {}

        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            name = self._names[module]
            counted_map = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
            channels = counted_map.shape[-1 if isinstance(module, nn.Linear) else 1]
            if isinstance(module, nn.LayerNorm):  # channels first or last, it depends on the model
                channels = module.normalized_shape[-1]
            counted[name] = counted.get(name, 0) + counted_map.numel() // channels

        layers = [m for m in self._names if isinstance(m, CONVOLUTIONS + NORMS)]
        self._run([layer.register_forward_hook(count) for layer in layers])
        return counted

    @cached_property
    def points(self) -> dict[nn.Module, nn.Module]:
        """For every convolution that may lose filters, the module whose output is its F^(l).

        That is the normalisation that follows it, where there is one.
        """
        modules = dict(self.model.named_modules())
        return {layer: modules[self.norm_of.get(name, name)] for name, layer in self.scored.items()}

    @cached_property
    def activated(self) -> frozenset[nn.Module]:
        """The convolutions of :attr:`points` whose map goes straight into an activation module."""
        makers = {point: layer for layer, point in self.points.items()}
        made: dict[int, tuple[nn.Module, Tensor]] = {}  # holds the maps, so that ids stay theirs
        found = set()

        def produced(module: nn.Module, _inputs: Any, output: Tensor) -> None:
            made[id(output)] = (makers[module], output)

        def entered(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if id(inputs[0]) in made:
                found.add(made[id(inputs[0])][0])

        hooks = [point.register_forward_hook(produced) for point in makers]
        hooks += [
            module.register_forward_pre_hook(entered)
            for module in self._names
            if isinstance(module, ACTIVATIONS)
        ]
        self._run(hooks)
        return frozenset(found)

    def _run(self, hooks: Sequence[Any]) -> None:
        """One forward of the example in eval mode, after which the hooks are removed."""
        training = [module for module in self._names if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                self.forward(self.model, self._example)
        finally:
            for hook in hooks:
                hook.remove()
            for module in training:
                module.training = True

    def prunable_share(self) -> tuple[int, int]:
        """Parameters of the scope's layers that can lose filters, and of all of them."""
        sizes = {
            name: sum(p.numel() for p in module.parameters(recurse=False))
            for name, module in self.model.named_modules()
            if name in self.scored or name in self.left_whole
        }
        return sum(size for name, size in sizes.items() if name in self.scored), sum(sizes.values())

    def remove(self, channels: dict[str, list[int]]) -> None:
        """Cut channels out of the model, in place.

        Args:
            channels: for a group's name, the root layer's channels that go.
        """
        trainable = {name: p.requires_grad for name, p in self.model.named_parameters()}
        for name, indices in channels.items():
            if not indices:
                continue
            layer = self.groups[name].members[0].layer
            pruner: Any = self._graph.get_pruner_of_module(layer)
            raw = self._graph.get_pruning_group(layer, pruner.prune_out_channels, sorted(indices))
            raw.prune(record_history=False)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trainable[name])


def _below(name: str, scope: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in scope)


def _parts(members: Sequence[Member]) -> int:
    """How many equal parts must lose the same number of channels."""
    return math.lcm(*(m.layer.num_groups for m in members if isinstance(m.layer, nn.GroupNorm)))


def _depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels


def _obstacle(group: CoupledGroup, never: set[str], scope: Sequence[str]) -> str | None:
    """Why a group must stay whole, or None."""
    for member in group.members:
        layer = member.layer
        if member.side != "in" and isinstance(layer, CONVOLUTIONS):
            if member.name in never:
                return f"its channels are predictions of {member.name}"
            if not _below(member.name, scope) and not _depthwise(layer):  # those only follow
                return f"coupled with {member.name}, which is outside of prune.scope"
        if getattr(layer, "groups", 1) != 1 and not _depthwise(layer):
            return f"coupled with the grouped convolution {member.name}"
        if isinstance(layer, nn.GroupNorm) and len(member.roots) != layer.num_channels:
            return f"{member.name} normalises it together with other channels"
    return None
