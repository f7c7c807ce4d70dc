"""Groups of channels that can only be pruned together, and the rules that exclude some of them."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import nn

from ldt.config.names import below
from ldt.pruning.dependency import (
    FixedChannels,
    depthwise,
    grouped,
    num_partitions,
    num_split_parts,
)
from ldt.pruning.layer_types import CONVOLUTIONS, Side, width_of
from ldt.pruning.torch_pruning_internals import (
    OPTYPE,
    Group,
    group_items,
    parameter_name,
)


@dataclass(frozen=True)
class Member:
    """One side of one layer, and its channels that belong to a group.

    Attributes:
        name: the layer's name in the model.
        layer: the layer.
        side: ``out`` (its filters), ``in`` (its input channels), or ``both`` (norms, depthwise
            convolutions and other layers that process channels independently).
        channels: the affected channels of this side, each once.
        roots: for each of them, the group's channel it belongs to.
    """

    name: str
    layer: nn.Module
    side: Side
    channels: np.ndarray
    roots: np.ndarray


@dataclass(frozen=True)
class CoupledGroup:
    """Channels that can only be pruned together, over all the layers that share them.

    Attributes:
        name: the root layer, whose channels number the group's channels.
        size: number of channels; channels of the root layer that are tied count once.
        members: every side of every layer that changes when a channel is removed.
        raw: Torch-Pruning's group, the argument of an importance.
        parts: the group consists of this many equal parts, and the same number of channels is
            removed from each (GroupNorm, grouped convolutions, splits).
    """

    name: str
    size: int
    members: tuple[Member, ...]
    raw: Group = field(repr=False, default_factory=Group)
    parts: int = 1

    def holds(self, module_type: type[nn.Module]) -> bool:
        """Return whether the channels pass through a module of a type."""
        return any(isinstance(i.dep.target.module, module_type) for i in group_items(self.raw))

    @property
    def producers(self) -> tuple[Member, ...]:
        """The convolutions whose output channels are the group's channels."""
        return tuple(
            m for m in self.members if m.side != "in" and isinstance(m.layer, CONVOLUTIONS)
        )

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The convolutions whose input channels are the group's channels."""
        return tuple(
            m for m in self.members if m.side != "out" and isinstance(m.layer, CONVOLUTIONS)
        )


@dataclass(frozen=True)
class Partition:
    """A layer or split whose ``width`` channels form ``count`` parts that must stay equal in size.

    Attributes:
        name: of the layer.
        count: number of parts.
        width: channels of the whole layer.
        channels: the affected ones.
        roots: for each of them, the group's channel it belongs to.
    """

    name: str
    count: int
    width: int
    channels: np.ndarray
    roots: np.ndarray

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """The root and the part of each channel."""
        parts = self.channels // (self.width // self.count)
        return list(zip(self.roots.tolist(), parts.tolist(), strict=True))

    @cached_property
    def balanced(self) -> bool:
        """Whether every root has the same number of channels in each part."""
        counts: dict[int, Counter[int]] = defaultdict(Counter)
        for root, part in self.pairs:
            counts[root][part] += 1
        return all(len(c) == self.count and len({*c.values()}) == 1 for c in counts.values())

    def fits(self, size: int, parts: int) -> bool:
        """Return whether equal parts of a group's channels each lie within one part of the layer.

        Args:
            size: number of the group's channels.
            parts: number of its parts, which lose the same number of channels.
        """
        if self.balanced:
            return True
        if size % parts or len(self.roots) != self.width:
            return False
        counts = np.bincount(self.roots, minlength=size).reshape(parts, -1)
        pairs = {(root // (size // parts), part) for root, part in self.pairs}
        alike = (counts == counts[:, :1]).all()
        return bool(alike) and len(pairs) == len({part for part, _ in pairs})


def equal_parts(size: int, partitions: Sequence[Partition]) -> int:
    """Return the least number of equal parts of a group that fit into all partitions.

    If none does, the result fits into some of them only.
    """
    least = math.lcm(*(p.count for p in partitions if not p.balanced))
    # splits of a split need more; two channels in a part, or nothing could be removed
    more = (parts for parts in range(least, size // 2 + 1, least) if size % parts == 0)
    return next((parts for parts in more if all(p.fits(size, parts) for p in partitions)), least)


def find_partitions(members: Sequence[Member], raw: Group) -> list[Partition]:
    """Return the partitions in a group: GroupNorm, grouped and deformable convolutions, splits."""
    found = [
        Partition(m.name, count, width_of(m.layer, m.side), m.channels, m.roots)
        for m in members
        if (count := num_partitions(m.layer, m.side)) > 1
    ]
    for item in group_items(raw):
        node = item.dep.target
        if node.type == OPTYPE.SPLIT and (count := num_split_parts(node)):
            width = count * node.outputs[0].module.width
            indices = np.asarray(item.idxs), np.asarray(item.root_idxs)
            found.append(Partition("a split", count, width, *indices))
    return found


def mapping_conflict(group: CoupledGroup, partitions: Sequence[Partition]) -> str | None:
    """Return the layer or split whose parts a group does not fit, or None."""
    for partition in partitions:
        if not partition.fits(group.size, group.parts):
            return f"the groups of {partition.name} contain other channels too"
    return None


def excluded_layer(group: CoupledGroup, predictors: set[str], scope: Sequence[str]) -> str | None:
    """Return why a layer of a group rules out pruning it, or None."""
    for member in group.members:
        layer = member.layer
        if member.side != "in" and isinstance(layer, CONVOLUTIONS):
            if member.name in predictors:
                return f"its channels are predictions of {member.name}"
            if len(member.channels) < width_of(layer, "out"):
                return f"coupled with only a part of {member.name}"
            if not below(member.name, scope) and not depthwise(layer):  # these follow their input
                return f"coupled with {member.name}, which is outside prune.scope"
        if isinstance(layer, nn.ConvTranspose2d) and layer.groups != 1:
            return f"coupled with the grouped transposed convolution {member.name}"
        if grouped(layer) and layer.groups == layer.out_channels:
            return f"{member.name} computes each output channel from several input channels"
        if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1:
            return f"{member.name} normalises more dimensions than the channels"
    return None


def excluded_operation(raw: Group) -> str | None:
    """Return which operation on a group's channels rules out pruning it, or None."""
    nodes = [item.dep.target for item in group_items(raw)]
    if any(isinstance(node.module, FixedChannels) for node in nodes):
        return "its channels are coordinates, offsets or masks"
    for node in nodes:
        if node.type == OPTYPE.PARAMETER:
            return f"coupled with the parameter {parameter_name(raw, node.module)}"
        if node.type == OPTYPE.SPLIT and not num_split_parts(node):
            return "split into parts of a hard-coded size"
    return None
