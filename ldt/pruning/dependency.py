"""Torch-Pruning extensions for the layers of mmdet's detectors.

Grouped convolutions
    lose the same number of channels in each of their groups, on either side
    (:func:`num_partitions`); each filter keeps the remaining inputs of its own group.
Deformable convolutions (mmcv's), region pooling and grid sampling
    process the channels of their first input independently. Their other inputs are coordinates and
    masks, in which every channel has a fixed meaning, so the layers that produce these are not
    pruned (:class:`FixedChannels`).
Feature maps with one channel
    are broadcast over the channels of other maps and are not coupled with them.
Reshapes
    that preserve the channel dimension leave the channel indices unchanged.
Splits
    into equal parts support pruning that removes the same number of channels from each part
    (:class:`SplitPart`). Res2Net's blocks store the width of a part, which is updated after pruning
    (:func:`update_split_widths`). Other sizes that are hard-coded in the model cannot be updated,
    so the channels that such a split divides are not pruned.
Split attention
    (ResNeSt's) views a feature map as parts and sums over them. It is traced as a split and a sum,
    which couple channel c of all parts (:func:`traceable_split_attention`).
Elementwise operations
    that follow each other are merged into one node: traversing hundreds of them takes minutes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from typing import TypeGuard, cast

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


def depthwise(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether a layer is a depthwise convolution: one filter per channel."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels


def grouped(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether a layer is a convolution with several groups that is not depthwise."""
    return isinstance(layer, (nn.Conv2d, *DEFORMABLE)) and layer.groups > 1 and not depthwise(layer)


def num_partitions(layer: nn.Module, side: str) -> int:
    """Return how many equal parts a layer's channels form that must be pruned equally."""
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups
    groups = layer.groups if grouped(layer) else 1
    if isinstance(layer, DEFORMABLE) and side == "in":
        return math.lcm(groups, layer.deform_groups)
    return groups


COORDINATES = ("DeformConv", "RoIAlign", "RoIPool", "GridSampler")  # backward nodes that take them


class FixedChannels(nn.Module):
    """Placeholder node for an input whose channels each have a fixed meaning and must be kept."""


class SplitPart(nn.Module):
    """Placeholder node for one part of a split, ``width`` channels from channel ``start``."""

    def __init__(self, start: int, width: int) -> None:
        super().__init__()
        self.start, self.width = start, width


class _SplitPartPruner(DummyPruner):
    def get_out_channels(self, layer: SplitPart) -> int:
        return layer.width

    def get_in_channels(self, layer: SplitPart) -> int:
        return layer.width


class ConvolutionPruner(tp.BasePruningFunc):
    """Prune deformable and grouped convolutions."""

    def prune_out_channels(self, layer: nn.Conv2d, idxs: Sequence[int]) -> nn.Module:
        """Remove filters."""
        keep = _kept_indices(layer.out_channels, idxs)
        layer.out_channels = len(keep)
        layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 0)
        if getattr(layer, "bias", None) is not None:
            layer.bias = self._prune_parameter_and_grad(layer.bias, keep, 0)
        return layer

    def prune_in_channels(self, layer: nn.Conv2d, idxs: Sequence[int]) -> nn.Module:
        """Remove input channels, the same number from each group."""
        keep = torch.tensor(_kept_indices(layer.in_channels, idxs), device=layer.weight.device)
        width = layer.in_channels // layer.groups
        keep_per_group = keep.view(layer.groups, -1) % width
        filters = layer.weight.detach().chunk(layer.groups)
        weights = [f.index_select(1, kept) for f, kept in zip(filters, keep_per_group, strict=True)]
        layer.in_channels = len(keep)
        layer.weight = nn.Parameter(torch.cat(weights))
        return layer

    def get_out_channels(self, layer: nn.Conv2d) -> int:
        """Return the number of filters."""
        return layer.out_channels

    def get_in_channels(self, layer: nn.Conv2d) -> int:
        """Return the number of input channels."""
        return layer.in_channels


class _GroupedConv2d(nn.Conv2d):
    """Registration key for grouped convolutions, which have no class of their own in torch."""


class Tracer(tp.DependencyGraph):
    """Torch-Pruning's dependency graph with the extensions of this module."""

    def __init__(self) -> None:
        super().__init__()
        self._pruner = ConvolutionPruner()
        for layer_type in (_GroupedConv2d, *DEFORMABLE):
            self.register_customized_layer(layer_type, self._pruner)
        self.register_customized_layer(SplitPart, cast(tp.BasePruningFunc, _SplitPartPruner()))

    def trace(self, model: nn.Module, example: Tensor, forward: Callable) -> "Tracer":
        """Trace ``forward(model, example)`` and build the graph; return self."""
        with traceable_split_attention(model):
            self.build_dependency(model, example, forward_fn=forward, verbose=False)
        for part, node in self.module2node.items():
            if isinstance(part, SplitPart):
                _set_part_mapping(part, node)
        return self

    def get_pruner_of_module(self, module: nn.Module) -> tp.BasePruningFunc | None:
        """Return the pruner of a layer or operation."""
        if isinstance(module, FixedChannels):
            return self.REGISTERED_PRUNERS[OPTYPE.CUSTOMIZED]
        return self._pruner if grouped(module) else super().get_pruner_of_module(module)

    def _trace(
        self,
        model: nn.Module,
        example_inputs: Tensor,
        forward_fn: Callable,
        output_transform: Callable | None,
    ) -> dict[nn.Module, Node]:
        self.IGNORED_LAYERS_IN_TRACING.clear()  # those in deformable convolutions are traced
        nodes = super()._trace(model, example_inputs, forward_fn, output_transform)
        for node in list(nodes.values()):
            unchanged = node.type == OPTYPE.RESHAPE and _preserves_channels(node)
            # Torch-Pruning assumes that an expand repeats the heads of an attention layer
            if unchanged or node.type == OPTYPE.EXPAND:
                node.type = OPTYPE.ELEMENTWISE
            if getattr(node.module, "out_channels", 0) == 1:
                _disconnect_outputs(node)
            if any(name in str(node.grad_fn) for name in COORDINATES):
                _fix_secondary_inputs(node, nodes)
            if node.type == OPTYPE.SPLIT:
                node.enable_index_mapping = False  # each part has its own mapping
                _insert_split_parts(node, nodes)
        _merge_elementwise(nodes)
        return nodes


def _kept_indices(size: int, removed: Sequence[int]) -> list[int]:
    pruned = set(removed)
    return [i for i in range(size) if i not in pruned]


def _fix_secondary_inputs(node: Node, nodes: dict[nn.Module, Node]) -> None:
    """Keep only the first input of each call; the channels of the other inputs become fixed."""
    inputs = [type(function).__name__ for function, _ in node.grad_fn.next_functions]
    per_call = sum(name not in ("NoneType", "AccumulateGrad") for name in inputs)
    first, fixed = node.inputs[::per_call], Node(FixedChannels(), None)
    for other in dict.fromkeys(n for n in node.inputs if n not in first):
        other.outputs[:] = [fixed if n is node else n for n in other.outputs]
        fixed.inputs.append(other)
        nodes[fixed.module] = fixed
    node.inputs[:] = first


def _insert_split_parts(split: Node, nodes: dict[nn.Module, Node]) -> None:
    """Insert a node per part after a split of the channels into equal parts."""
    function = split.grad_fn
    width = getattr(function, "_saved_split_size", 0)  # 0: split by a list of sizes
    sizes = function._saved_self_sym_sizes
    if not width or function._saved_dim != 1 or sizes[1] % width:
        return
    parts_read = {
        consumer: [index for other, index in consumer.grad_fn.next_functions if other == function]
        for consumer in split.outputs
    }
    if any(consumer.inputs.count(split) != len(read) for consumer, read in parts_read.items()):
        return  # the consumer is called several times, and only the last call is recorded
    parts = [Node(SplitPart(start, width), None) for start in range(0, sizes[1], width)]
    for part in parts:
        part.inputs.append(split)
        nodes[part.module] = part
    for consumer, indices in parts_read.items():
        remaining = iter(indices)
        consumer.inputs[:] = [parts[next(remaining)] if n is split else n for n in consumer.inputs]
        for index in indices:
            parts[index].outputs.append(consumer)
    split.outputs[:] = parts


def _set_part_mapping(part: SplitPart, node: Node) -> None:
    """Set the index mapping of the edges between a split and one of its parts."""
    (split,), ends = node.inputs, [part.start, part.start + part.width]
    for edge in (*split.dependencies, *node.dependencies):
        if (edge.source, edge.target) in ((split, node), (node, split)):
            edge.index_mapping[0] = SplitIndexMapping(ends, reverse=edge.source is node)


def num_split_parts(node: Node) -> int:
    """Return the number of equal parts of a split that can be pruned; 0 if it cannot."""
    return sum(isinstance(consumer.module, SplitPart) for consumer in node.outputs)


@contextmanager
def traceable_split_attention(model: nn.Module) -> Iterator[None]:
    """Compute split attention by equivalent operations that can be traced, within the context."""
    layers = [
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


def _split_attention(layer: SplitAttentionConv2d, x: Tensor) -> Tensor:
    parts = layer.relu(layer.norm0(layer.conv(x))).chunk(layer.radix, 1)
    pooled = adaptive_avg_pool2d(reduce(torch.add, parts), 1)
    logits = layer.fc2(layer.relu(layer.norm1(layer.fc1(pooled)))).chunk(layer.radix, 1)
    weights = [logit.exp() for logit in logits]
    weighted = map(torch.mul, weights, parts)
    return reduce(torch.add, weighted) / reduce(torch.add, weights)


def update_split_widths(model: nn.Module) -> None:
    """Update ``Bottle2neck.width`` after pruning."""
    for block in model.modules():
        if isinstance(block, Bottle2neck):
            conv1 = cast(nn.Conv2d, block.conv1)
            block.width = conv1.out_channels // block.scales


def _preserves_channels(reshape: Node) -> bool:
    """Return whether a reshape leaves the channel dimension unchanged."""
    function = reshape.grad_fn
    before, after = function._saved_self_sym_sizes, function._input_metadata[0].shape
    return len(before) > 1 and len(after) > 1 and before[1] == after[1]


def _disconnect_outputs(node: Node) -> None:
    """Remove the edges behind a layer with one channel, which is broadcast over other channels."""
    for consumer in node.outputs:
        consumer.inputs[:] = [n for n in consumer.inputs if n is not node]
    node.outputs.clear()


def _merge_elementwise(nodes: dict[nn.Module, Node]) -> None:
    """Merge each connected set of elementwise nodes into one.

    Nodes next to a concatenation or split are kept: there the order of the neighbours matters.
    """

    def mergeable(node: Node) -> bool:
        return isinstance(node.module, ElementWiseOp) and all(
            n.type in (OPTYPE.ELEMENTWISE, OPTYPE.CONV, OPTYPE.BN)
            for n in (*node.inputs, *node.outputs)
        )

    for node in [n for n in nodes.values() if mergeable(n)]:
        others = (n for n in (*node.inputs, *node.outputs) if n is not node)
        into = next(filter(mergeable, others), None)
        if into is None:
            continue
        for near, back in (("inputs", "outputs"), ("outputs", "inputs")):
            neighbours = getattr(into, near)
            for other in dict.fromkeys(getattr(node, near)):
                rest = [n for n in getattr(other, back) if n is not node and n is not into]
                if other is not into and other is not node:
                    setattr(other, back, [*rest, into])
                    neighbours[:] = [*(n for n in neighbours if n is not other), other]
            neighbours[:] = [n for n in neighbours if n is not node and n is not into]
        del nodes[node.module]
