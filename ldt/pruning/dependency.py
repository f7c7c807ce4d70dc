"""What Torch-Pruning has to be told to trace and cut every layer of mmdet's detectors.

Grouped convolutions
    lose the same number of channels in each of their groups, on either side
    (:func:`divisions`), and each filter keeps the inputs that are left of its own group.
Deformable convolutions (mmcv's), region pooling and grid sampling
    keep apart the channels of their first input. Coordinates and masks have a meaning for each
    channel, so the layers that make them keep their outputs (:class:`Fixed`).
Maps of one channel
    are broadcast over the channels of others, which they are not coupled with.
Reshapes
    that keep the dimension of channels change nothing for them.
Splits
    into equal parts follow a cut that takes the same number of channels of each (:class:`Part`).
    Res2Net's blocks remember the width of a part, which is set anew (:func:`resize_parts`). Other
    sizes that are written in the model's code cannot follow, so what is split stays whole.
Split attention
    (ResNeSt's) views a map as parts and sums over them. It is traced as a split and a sum, which
    tie channel c of all parts (:func:`followed`).
Elementwise operations
    between elementwise operations are one: following hundreds of them takes minutes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any

import torch
import torch_pruning as tp
from mmcv.ops import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
)
from mmdet.models.backbones.res2net import Bottle2neck
from mmdet.models.backbones.resnest import SplitAttentionConv2d
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from ldt.pruning.torch_pruning_internals import (
    OPTYPE,
    DummyPruner,
    ElementWiseOp,
    Node,
    SplitIndexMapping,
)

DEFORMABLE = (DeformConv2d, DeformConv2dPack, ModulatedDeformConv2d, ModulatedDeformConv2dPack)


def depthwise(layer: nn.Module) -> bool:
    """Whether a convolution keeps channels apart: one filter for each."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels


def grouped(layer: nn.Module) -> bool:
    """Whether a convolution has groups of several channels."""
    return isinstance(layer, (nn.Conv2d, *DEFORMABLE)) and layer.groups > 1 and not depthwise(layer)


def divisions(layer: Any, side: str) -> int:
    """How many equal parts of a layer's channels must lose the same number of channels."""
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups
    groups = layer.groups if grouped(layer) else 1
    if isinstance(layer, DEFORMABLE) and side == "in":
        return math.lcm(groups, layer.deform_groups)
    return groups


COORDINATES = ("DeformConv", "RoIAlign", "RoIPool", "GridSampler")  # backward nodes that read them


class Fixed(nn.Module):
    """Stands in the graph for a reader that gives every channel a meaning of its own."""


class Part(nn.Module):
    """Stands in the graph for the part of a split that begins at channel ``start``."""

    def __init__(self, start: int, width: int) -> None:
        super().__init__()
        self.start, self.width = start, width


class _PartPruner(DummyPruner):
    def get_out_channels(self, layer: Any) -> int:
        return layer.width

    def get_in_channels(self, layer: Any) -> int:
        return layer.width


class ConvolutionPruner(tp.BasePruningFunc):
    """Cuts deformable and grouped convolutions."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        """Remove filters."""
        keep = _rest(layer.out_channels, idxs)
        layer.out_channels = len(keep)
        layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 0)
        if getattr(layer, "bias", None) is not None:
            layer.bias = self._prune_parameter_and_grad(layer.bias, keep, 0)
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        """Remove inputs, the same number of each group."""
        keep = torch.tensor(_rest(layer.in_channels, idxs), device=layer.weight.device)
        width = layer.in_channels // layer.groups
        own = keep.view(layer.groups, -1) % width
        filters = layer.weight.detach().chunk(layer.groups)
        left = [f.index_select(1, kept) for f, kept in zip(filters, own, strict=True)]
        layer.in_channels = len(keep)
        layer.weight = nn.Parameter(torch.cat(left))
        return layer

    def get_out_channels(self, layer: Any) -> int:
        """The number of filters."""
        return layer.out_channels

    def get_in_channels(self, layer: Any) -> int:
        """The number of inputs."""
        return layer.in_channels


class _Grouped(nn.Conv2d):
    """A key to register the pruner under; grouped convolutions have no class of their own."""


class Tracer(tp.DependencyGraph):
    """Torch-Pruning's graph under the rules of this module."""

    def __init__(self) -> None:
        super().__init__()
        self._pruner = ConvolutionPruner()
        for kind in (_Grouped, *DEFORMABLE):
            self.register_customized_layer(kind, self._pruner)
        part_pruner: Any = _PartPruner()
        self.register_customized_layer(Part, part_pruner)

    def build_dependency(self, model: nn.Module, *args: Any, **options: Any) -> Any:
        """The graph, traced."""
        with followed(model):
            super().build_dependency(model, *args, **options)
        for part, node in self.module2node.items():
            if isinstance(part, Part):
                _map_part(part, node)
        return self

    def get_pruner_of_module(self, module: nn.Module) -> Any:
        """The pruner of a layer or operation."""
        if isinstance(module, Fixed):
            return self.REGISTERED_PRUNERS[OPTYPE.CUSTOMIZED]
        return self._pruner if grouped(module) else super().get_pruner_of_module(module)

    def _trace(
        self, model: nn.Module, example_inputs: Tensor, forward_fn: Callable, output_transform: Any
    ) -> dict[Any, Any]:
        self.IGNORED_LAYERS_IN_TRACING.clear()  # the layers inside of deformable convolutions
        nodes = super()._trace(model, example_inputs, forward_fn, output_transform)
        for node in list(nodes.values()):
            unchanged = node.type == OPTYPE.RESHAPE and _keeps_channels(node.grad_fn)
            if unchanged or node.type == OPTYPE.EXPAND:  # else expected to repeat attention heads
                node.type = OPTYPE.ELEMENTWISE
            if getattr(node.module, "out_channels", 0) == 1:
                _broadcast(node)
            if any(name in str(node.grad_fn) for name in COORDINATES):
                _fix(node, nodes)
            if node.type == OPTYPE.SPLIT:
                node.enable_index_mapping = False  # each part has its own
                _divide(node, nodes)
        _merge_elementwise(nodes)
        return nodes


def _rest(size: int, idxs: Sequence[int]) -> list[int]:
    gone = set(idxs)
    return [i for i in range(size) if i not in gone]


def _fix(node: Any, nodes: dict[Any, Any]) -> None:
    """Let a node read the first input of each call only; the channels of the others are fixed."""
    given = [type(f).__name__ for f, _ in node.grad_fn.next_functions]
    per_call = sum(name not in ("NoneType", "AccumulateGrad") for name in given)
    first, fixed = node.inputs[::per_call], Node(Fixed(), None)
    for other in dict.fromkeys(n for n in node.inputs if n not in first):
        other.outputs[:] = [fixed if n is node else n for n in other.outputs]
        fixed.inputs.append(other)
        nodes[fixed.module] = fixed
    node.inputs[:] = first


def _divide(split: Any, nodes: dict[Any, Any]) -> None:
    """Put a node for each part behind a split of the channels into equal ones."""
    function = split.grad_fn
    width = getattr(function, "_saved_split_size", 0)  # 0: a list of sizes
    sizes = function._saved_self_sym_sizes
    if not width or function._saved_dim != 1 or sizes[1] % width:
        return
    taken = {
        reader: [index for other, index in reader.grad_fn.next_functions if other == function]
        for reader in split.outputs
    }
    if any(reader.inputs.count(split) != len(parts) for reader, parts in taken.items()):
        return  # a layer of several calls, of which only one is known
    parts = [Node(Part(start, width), None) for start in range(0, sizes[1], width)]
    for part in parts:
        part.inputs.append(split)
        nodes[part.module] = part
    for reader, indices in taken.items():
        left = iter(indices)
        reader.inputs[:] = [parts[next(left)] if n is split else n for n in reader.inputs]
        for index in indices:
            parts[index].outputs.append(reader)
    split.outputs[:] = parts


def _map_part(part: Part, node: Any) -> None:
    """Tell the edges between a split and one of its parts which channels the part holds."""
    (split,), ends = node.inputs, [part.start, part.start + part.width]
    for edge in (*split.dependencies, *node.dependencies):
        if (edge.source, edge.target) in ((split, node), (node, split)):
            edge.index_mapping[0] = SplitIndexMapping(ends, reverse=edge.source is node)


def split_into(node: Any) -> int:
    """How many equal parts a split makes that a cut can follow."""
    return sum(isinstance(reader.module, Part) for reader in node.outputs)


@contextmanager
def followed(model: nn.Module) -> Iterator[None]:
    """Within it, split attention computes the same by operations that tracing follows."""
    layers: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, SplitAttentionConv2d) and module.radix > 1 and module.groups == 1
    ]
    for layer in layers:
        layer.forward = partial(_split_attention, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _split_attention(layer: Any, images: Tensor) -> Tensor:
    parts = layer.relu(layer.norm0(layer.conv(images))).chunk(layer.radix, 1)
    pooled = adaptive_avg_pool2d(reduce(torch.add, parts), 1)
    logits = layer.fc2(layer.relu(layer.norm1(layer.fc1(pooled)))).chunk(layer.radix, 1)
    weights = [logit.exp() for logit in logits]
    weighted = map(torch.mul, weights, parts)
    return reduce(torch.add, weighted) / reduce(torch.add, weights)


def resize_parts(model: nn.Module) -> None:
    """Tell the blocks that remember the width of what they split what it is after a cut."""
    blocks: list[Any] = [m for m in model.modules() if isinstance(m, Bottle2neck)]
    for block in blocks:
        block.width = block.conv1.out_channels // block.scales


def _keeps_channels(view: Any) -> bool:
    """Whether a reshape leaves the dimension of channels as it is."""
    before, after = view._saved_self_sym_sizes, view._input_metadata[0].shape
    return len(before) > 1 and len(after) > 1 and before[1] == after[1]


def _broadcast(node: Any) -> None:
    """Let nothing follow a layer of one channel: it weighs the channels of others."""
    for reader in node.outputs:
        reader.inputs[:] = [n for n in reader.inputs if n is not node]
    node.outputs.clear()


def _merge_elementwise(nodes: dict[Any, Any]) -> None:
    """Make one node of each connected set of elementwise ones.

    Those next to a concatenation or split stay: there the order of neighbours has a meaning.
    """

    def inner(node: Any) -> bool:
        return isinstance(node.module, ElementWiseOp) and all(
            n.type in (OPTYPE.ELEMENTWISE, OPTYPE.CONV, OPTYPE.BN)
            for n in (*node.inputs, *node.outputs)
        )

    for node in [n for n in nodes.values() if inner(n)]:
        into = next((n for n in (*node.inputs, *node.outputs) if n is not node and inner(n)), None)
        if into is None:
            continue
        for near, back in (("inputs", "outputs"), ("outputs", "inputs")):
            known = getattr(into, near)
            for other in dict.fromkeys(getattr(node, near)):
                links = [n for n in getattr(other, back) if n is not node and n is not into]
                if other is not into and other is not node:
                    setattr(other, back, [*links, into])
                    known[:] = [*(n for n in known if n is not other), other]
            known[:] = [n for n in known if n is not node and n is not into]
        del nodes[node.module]
