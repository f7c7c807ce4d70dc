"""The undocumented part of Torch-Pruning's API that is used, gathered in one place.

``tests/test_internals.py`` names what is missing when a release changes it.
"""

from collections.abc import Sequence
from typing import Protocol, cast

import torch_pruning as tp
from torch import nn
from torch_pruning._helpers import _HybridIndex as HybridIndex
from torch_pruning.dependency.dependency import Dependency
from torch_pruning.dependency.group import Group
from torch_pruning.dependency.index_mapping import _SplitIndexMapping as SplitIndexMapping
from torch_pruning.dependency.node import Node
from torch_pruning.ops import OPTYPE, DummyPruner
from torch_pruning.ops import _ElementWiseOp as ElementWiseOp

__all__ = [
    "OPTYPE",
    "Dependency",
    "DummyPruner",
    "ElementWiseOp",
    "Group",
    "GroupItem",
    "HybridIndex",
    "Node",
    "SplitIndexMapping",
    "group_items",
    "group_of",
    "parameter_name",
    "prunes_outputs",
]


class GroupItem(Protocol):
    """One layer of a group: the channels to prune, and the group's channel of each.

    Attributes:
        dep: what is pruned (``dep.target.module``) and how (``dep.handler``).
        idxs: channels of the layer.
        root_idxs: for each of them, the channel of the group's root layer.
    """

    dep: Dependency
    idxs: list[int]
    root_idxs: list[int]


def group_items(group: Group) -> list[GroupItem]:
    """Return the items of a group; Torch-Pruning declares ``root_idxs`` as None."""
    return cast(list[GroupItem], group.items)


def group_of(
    graph: tp.DependencyGraph, members: Sequence[tuple[Dependency, dict[int, int]]]
) -> Group:
    """Return a group of what is pruned, each with its channels and the root of each of them."""
    group = Group()
    setattr(group, "_DG", graph)  # noqa: B010 - declared as None
    for dep, channels in members:
        group.add_dep(dep, list(channels))
        group_items(group)[-1].root_idxs = list(channels.values())
    return group


def prunes_outputs(group: Group, dep: Dependency) -> bool:
    """Return whether a dependency of a group removes output channels of its layer."""
    return _graph_of(group).is_out_channel_pruning_fn(dep.handler)


def parameter_name(group: Group, parameter: nn.Module | nn.Parameter) -> str:
    """Return the name of a parameter of the model that a group belongs to."""
    return _graph_of(group)._param_to_name[parameter]


def _graph_of(group: Group) -> tp.DependencyGraph:
    return cast(tp.DependencyGraph, group._DG)
