"""Groups of channels that can only be removed together, and which of them cannot be removed."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from torch import nn

from ldt.pruning.dependency import Fixed, depthwise, divisions, grouped, split_into
from ldt.pruning.layer_types import CONVOLUTIONS, width_of
from ldt.pruning.names import below
from ldt.pruning.torch_pruning_internals import OPTYPE, HybridIndex, parameter_name


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


def tied_roots(raw: Any) -> list[int]:
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
                given = [HybridIndex(*pair) for pair in roots.items()]
                for mapping in filter(None, edge.index_mapping):
                    given = mapping(given)
                reached = known.get((edge.target, edge.handler), {})
                for index, root in given:
                    one, other = sorted((find(root), find(reached.get(index, root))))
                    first[other] = one
    heads = [find(root) for root in range(len(first))]
    return np.unique(heads, return_inverse=True)[1].tolist()


@dataclass(frozen=True)
class Cells:
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


def cells_of(members: Sequence[Member], raw: Any) -> list[Cells]:
    """What of a group has cells: GroupNorm, grouped and deformable convolutions, splits."""
    found = [
        Cells(m.name, count, width_of(m.layer, m.side), m.channels, m.roots)
        for m in members
        if (count := divisions(m.layer, m.side)) > 1
    ]
    for item in raw.items:
        node = item.dep.target
        if node.type == OPTYPE.SPLIT and (count := split_into(node)):
            width = count * node.outputs[0].module.width
            places = np.asarray(item.idxs), np.asarray(item.root_idxs)
            found.append(Cells("a split", count, width, *places))
    return found


def misfit(group: CoupledGroup, cells: Sequence[Cells]) -> str | None:
    """What of a group's channels cannot be as tracing has it, or None."""
    for m in group.members:
        if isinstance(m.layer, CONVOLUTIONS) and m.channels.max() >= width_of(m.layer, m.side):
            return f"tracing takes other channels for those of {m.name}"
    for cell in cells:
        if not cell.fits(group):
            return f"the groups of {cell.name} hold other channels too"
    return None


def obstacle(group: CoupledGroup, never: set[str], scope: Sequence[str]) -> str | None:
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


def fixed_operation(raw: Any) -> str | None:
    """Which operation on a group's channels cannot follow a cut, or None."""
    nodes = [item.dep.target for item in raw.items]
    if any(isinstance(node.module, Fixed) for node in nodes):
        return "its channels are coordinates, offsets or masks"
    for node in nodes:
        if node.type == OPTYPE.PARAMETER:
            return f"coupled with the parameter {parameter_name(raw, node.module)}"
        if node.type == OPTYPE.SPLIT and not split_into(node):
            return "split into parts of a fixed size"
    return None
