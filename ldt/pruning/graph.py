"""Which channels are coupled, and cutting them: a plain view of Torch-Pruning's graph."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from mmcv.cnn.bricks import HSwish, Swish
from torch import Tensor, nn
from torch.nn.modules import activation
from torch_pruning._helpers import _HybridIndex
from torch_pruning.ops import OPTYPE

from ldt.pruning.dependency import (
    DEFORMABLE,
    Fixed,
    Part,
    Tracer,
    depthwise,
    divisions,
    grouped,
    resize_parts,
    split_into,
)
from ldt.pruning.names import below

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
STATISTICS = (nn.GroupNorm, nn.LayerNorm)
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, *DEFORMABLE)
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
        channels: the touched channels of this side, each once.
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
        size: number of channels; those of the root layer that only go together count once.
        members: every side of every layer that changes when a channel goes.
        raw: Torch-Pruning's group, which an importance is called with.
        parts: channels go in steps of one from each of this many equal parts (GroupNorm, grouped
            convolutions, splits).
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
        excluded: layers of the scope that cannot be cut, with the reason: those that rules
            exclude, and those whose cut fails in a trial.
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
        self._graph = Tracer().build_dependency(
            model, images, forward_fn=self._unfrozen, verbose=False
        )
        self.groups: dict[str, CoupledGroup] = {}
        self.scored: dict[str, nn.Module] = {}
        self.excluded: dict[str, str] = {}
        self.norm_of = self._norms()
        in_scope: dict[str, nn.Module] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, CONVOLUTIONS) and below(name, scope)
        }
        if not in_scope:
            parts = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"prune.scope={list(scope)} holds no convolution; the detector's parts are: {parts}"
            )
        made = set(never) & set(in_scope)  # what is decoded from them is not followed
        self.excluded.update({name: f"its channels are predictions of {name}" for name in made})
        for layer in [m for m in self._graph.module2node if m in in_scope.values()]:
            if self._names[layer] not in made:
                made |= self._add(self._raw(layer), in_scope, set(never), scope)
        self._sift(list(self.groups))
        for name in in_scope:
            if name not in self.scored:
                self.excluded.setdefault(name, "not reached by tracing")

    def _unfrozen(self, model: nn.Module, images: Any) -> Any:
        return self.forward(model.requires_grad_(True), images)  # mmdet's eval() freezes stages

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

    def _raw(self, layer: nn.Module, *tried: nn.Module) -> Any:
        """Torch-Pruning's group of all of a layer's output channels, tied ones with one root.

        Where part of a layer's output is coupled with all of another's, the former is the root.
        """
        pruner: Any = self._graph.get_pruner_of_module(layer)
        channels = list(range(pruner.get_out_channels(layer)))
        raw = self._graph.get_pruning_group(layer, pruner.prune_out_channels, channels)
        for item in raw.items:
            maker = item.dep.target.module
            makes = isinstance(maker, CONVOLUTIONS) and self._side(item.dep) == "out"
            partly = makes and len(set(item.idxs)) < width_of(maker, "out")
            if partly and maker not in tried:
                return self._raw(maker, layer, *tried)
        if any(isinstance(item.dep.target.module, Part) for item in raw.items):
            root_of = _tied(raw)
            for item in raw.items:
                item.root_idxs = [root_of[root] for root in item.root_idxs]
        return raw

    def _add(
        self, raw: Any, in_scope: dict[str, nn.Module], never: set[str], scope: Sequence[str]
    ) -> set[str]:
        """Take a group up, or leave it whole; the layers whose outputs it holds."""
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
        size, cells = len(set(root.roots)), _cells(members, raw)
        parts = math.lcm(*(cell.count for cell in cells if not cell.even))
        group = CoupledGroup(root.name, size, members, raw, parts)
        inside = {m.name: m.layer for m in group.makers if m.name in in_scope}
        reason = _obstacle(group, never, scope) or _operation(raw) or _misfit(group, cells)
        if reason is None:
            self.groups[group.name] = group
            self.scored.update(inside)
        else:
            self.excluded.update(dict.fromkeys(inside, reason))
        return set(inside)

    def _sift(self, names: Sequence[str]) -> None:
        """Leave whole what a trial shows to be unsafe, halving down to the groups at fault."""
        reason = self._trial(names) if names else None
        if reason is None:
            return
        if len(names) > 1:
            self._sift(names[: len(names) // 2])
            self._sift(names[len(names) // 2 :])
            return
        for maker in self.groups.pop(names[0]).makers:
            if self.scored.pop(maker.name, None):
                self.excluded[maker.name] = reason

    def _trial(self, names: Sequence[str]) -> str | None:
        """Why half of the channels of these groups cannot go, or None.

        Where all readers of the channels see zeros, their values must not matter: else tracing has
        missed a reader, or taken one channel for another. Then the network must run when it is cut.
        """
        gone = {name: _half(self.groups[name]) for name in names}
        try:
            if any(
                not torch.equal(one.nan_to_num(), other.nan_to_num())
                for one, other in zip(self._masked(gone, 0), self._masked(gone, 1), strict=True)
            ):
                return "something that tracing does not see reads its channels"
            with self._put_back():
                self.remove({name: channels.tolist() for name, channels in gone.items()})
                for group in (self.groups[name] for name in names):
                    root = group.members[0]
                    cut = np.isin(root.roots, gone[group.name]).sum()
                    if width_of(root.layer, "out") != len(root.channels) - cut:
                        return "some of its channels only go together"
                self._run()
        except Exception as error:  # whatever a model's code does with unexpected shapes
            reason = " ".join(str(error).split())[:120]
            return f"the network does not run without half of them ({reason})"
        return None

    def _masked(self, gone: dict[str, np.ndarray], noise: float) -> list[Tensor]:
        """The raw maps with noise on the channels that are gone, which no reader sees."""
        with ExitStack() as hooks:
            for layer in self._names:
                if isinstance(layer, STATISTICS):
                    hooks.callback(layer.register_forward_hook(_affine).remove)
            for name, channels in gone.items():
                for member in self.groups[name].members:
                    touched = member.channels[np.isin(member.roots, channels)]
                    if isinstance(member.layer, CONVOLUTIONS) and member.side != "both":
                        masking = _masking(member.layer, member.side, touched, noise)
                        hooks.callback(masking.remove)
            return list(self._run())

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        """Within it, surgery is for a trial only."""
        before: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for module in self._names:
            sizes = {k: v for k, v in vars(module).items() if isinstance(v, (int, tuple))}
            before.append((vars(module), sizes))
            before += [(d, dict(d)) for d in (module._parameters, module._buffers)]
        try:
            yield
        finally:
            for place, content in before:
                place.update(content)

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
    def feature_modules(self) -> dict[nn.Module, nn.Module]:
        """For every convolution that may lose filters, the module whose output is its F^(l).

        That is the normalisation that follows it, where there is one.
        """
        modules = dict(self.model.named_modules())
        return {layer: modules[self.norm_of.get(name, name)] for name, layer in self.scored.items()}

    @cached_property
    def activated(self) -> frozenset[nn.Module]:
        """The convolutions of :attr:`feature_modules` whose map goes into an activation."""
        makers = {point: layer for layer, point in self.feature_modules.items()}
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

    def _run(self, hooks: Sequence[Any] = ()) -> Any:
        """One forward of the example in eval mode, after which the hooks are removed."""
        training = [module for module in self._names if module.training]
        for module in training:
            module.training = False  # mmdet's eval() would freeze stages
        try:
            with torch.no_grad():
                return self.forward(self.model, self._example)
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
            if name in self.scored or name in self.excluded
        }
        return sum(size for name, size in sizes.items() if name in self.scored), sum(sizes.values())

    def remove(self, channels: dict[str, list[int]]) -> None:
        """Cut channels out of the model, in place; the graph describes what it was before.

        Args:
            channels: for a group's name, the root layer's channels that go.
        """
        trainable = {name: p.requires_grad for name, p in self.model.named_parameters()}
        cuts: dict[tuple[nn.Module, Any], tuple[Any, set[int]]] = {}
        for name, indices in channels.items():
            for item in self.groups[name].raw.items if indices else ():
                layer, gone = item.dep.target.module, np.isin(item.root_idxs, indices)
                if layer in self._names:  # a layer may read several groups: one cut for all
                    _, known = cuts.setdefault((layer, item.dep.handler), (item.dep, set()))
                    known.update(np.asarray(item.idxs)[gone].tolist())
        for cut, indices in cuts.values():
            cut(sorted(indices))
        resize_parts(self.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trainable[name])


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


def _tied(raw: Any) -> list[int]:
    """For each of the root layer's channels its number, counting those that are tied as one.

    Two are tied where one channel of a layer is coupled with both. Torch-Pruning keeps the first
    that reaches the layer, so every edge of the group is followed once more.
    """
    first = list(range(len(raw[0].idxs)))  # of the channels that each is tied to

    def find(root: int) -> int:
        while first[root] != root:
            root = first[root]
        return root

    known = {
        (item.dep.target, item.dep.handler): dict(zip(item.idxs, item.root_idxs, strict=True))
        for item in raw.items
    }
    for (node, handler), roots in known.items():
        for edge in node.dependencies:
            if edge.is_triggered_by(handler):
                given = [_HybridIndex(*pair) for pair in roots.items()]
                for mapping in filter(None, edge.index_mapping):
                    given = mapping(given)
                reached = known.get((edge.target, edge.handler), {})
                for index, root in given:
                    one, other = sorted((find(root), find(reached.get(index, root))))
                    first[other] = one
    heads = [find(root) for root in range(len(first))]
    return np.unique(heads, return_inverse=True)[1].tolist()


@dataclass(frozen=True)
class _Cells:
    """A layer or split whose ``width`` channels are ``count`` cells that must stay equally full."""

    name: str
    count: int
    width: int
    channels: np.ndarray
    roots: np.ndarray

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """The root and the cell of each channel."""
        cells = self.channels // (self.width // self.count)
        return list(zip(self.roots.tolist(), cells.tolist(), strict=True))

    @cached_property
    def even(self) -> bool:
        """Whether every root has as many channels in one cell as in any other."""
        shares: dict[int, Counter[int]] = defaultdict(Counter)
        for root, cell in self.pairs:
            shares[root][cell] += 1
        return all(len(s) == self.count and len({*s.values()}) == 1 for s in shares.values())

    def fits(self, group: CoupledGroup) -> bool:
        """Whether each of the group's parts lies within one cell, all cells equally full."""
        if self.even:
            return True
        if group.size % group.parts or len(self.roots) != self.width:
            return False
        pairs = {(root // (group.size // group.parts), cell) for root, cell in self.pairs}
        return len(pairs) == len({part for part, _ in pairs})


def _cells(members: Sequence[Member], raw: Any) -> list[_Cells]:
    """What of a group has cells: GroupNorm, grouped and deformable convolutions, splits."""
    found = [
        _Cells(m.name, count, width_of(m.layer, m.side), m.channels, m.roots)
        for m in members
        if (count := divisions(m.layer, m.side)) > 1
    ]
    for item in raw.items:
        node = item.dep.target
        if node.type == OPTYPE.SPLIT and (count := split_into(node)):
            width = count * node.outputs[0].module.width
            places = np.asarray(item.idxs), np.asarray(item.root_idxs)
            found.append(_Cells("a split", count, width, *places))
    return found


def _misfit(group: CoupledGroup, cells: Sequence[_Cells]) -> str | None:
    """What of a group's channels cannot be as tracing has it, or None."""
    for m in group.members:
        if isinstance(m.layer, CONVOLUTIONS) and m.channels.max() >= width_of(m.layer, m.side):
            return f"tracing takes other channels for those of {m.name}"
    for cell in cells:
        if not cell.fits(group):
            return f"the groups of {cell.name} hold other channels too"
    return None


def width_of(layer: Any, side: str) -> int:
    """Channels on a side of a layer."""
    names = ("in_channels", "in_features") if side == "in" else ("out_channels", "out_features")
    found = (getattr(layer, name, None) for name in names)
    return next((width for width in found if width), 0) or layer.num_channels


def _obstacle(group: CoupledGroup, never: set[str], scope: Sequence[str]) -> str | None:
    """Why a group must stay whole, or None."""
    for member in group.members:
        layer = member.layer
        if member.side != "in" and isinstance(layer, CONVOLUTIONS):
            if member.name in never:
                return f"its channels are predictions of {member.name}"
            if len(member.channels) < width_of(layer, "out"):
                return f"coupled with a part of {member.name} only"
            if not below(member.name, scope) and not depthwise(layer):  # those only follow
                return f"coupled with {member.name}, which is outside of prune.scope"
        if isinstance(layer, nn.ConvTranspose2d) and layer.groups != 1:
            return f"coupled with the grouped transposed convolution {member.name}"
        if grouped(layer) and layer.groups == layer.out_channels:
            return f"{member.name} makes each channel of several others"
        if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1:
            return f"{member.name} normalises more than channels"
    return None


def _operation(raw: Any) -> str | None:
    """Which operation on a group's channels cannot follow a cut, or None."""
    nodes = [item.dep.target for item in raw.items]
    if any(isinstance(node.module, Fixed) for node in nodes):
        return "its channels are coordinates, offsets or masks"
    for node in nodes:
        if node.type == OPTYPE.PARAMETER:
            return f"coupled with the parameter {raw._DG._param_to_name[node.module]}"
        if node.type == OPTYPE.SPLIT and not split_into(node):
            return "split into parts of a fixed size"
    return None
