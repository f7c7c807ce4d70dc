"""Everything of Torch-Pruning that is used and not documented, in one place.

``tests/test_internals.py`` names what is missing when a release changes it.
"""

from typing import Any

from torch import nn
from torch_pruning._helpers import _HybridIndex as HybridIndex
from torch_pruning.dependency.index_mapping import _SplitIndexMapping as SplitIndexMapping
from torch_pruning.dependency.node import Node
from torch_pruning.ops import OPTYPE, DummyPruner
from torch_pruning.ops import _ElementWiseOp as ElementWiseOp

__all__ = [
    "OPTYPE",
    "DummyPruner",
    "ElementWiseOp",
    "HybridIndex",
    "Node",
    "SplitIndexMapping",
    "makes_channels",
    "parameter_name",
]


def makes_channels(raw: Any, dep: Any) -> bool:
    """Whether a dependency of a group removes output channels of its layer."""
    return raw._DG.is_out_channel_pruning_fn(dep.handler)


def parameter_name(raw: Any, parameter: nn.Parameter) -> str:
    """Return the name of a parameter of the model that a group belongs to."""
    return raw._DG._param_to_name[parameter]
