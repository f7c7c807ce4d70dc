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
Channel shuffles
    (ShuffleNet's) couple channel c of all of their groups, which keeps the order that they make the
    same when channels are removed (:class:`Shuffle`).
Parameters with a value for each channel
    (LayerScale, position biases) lose channels with the maps that they are added to or multiplied
    with (:class:`ChannelParameter`). A single value, such as a weight of a fusion, is not coupled.
Split attention
    (ResNeSt's) views a feature map as parts and sums over them. It is traced as a split and a sum,
    which couple channel c of all parts (:func:`traceable_split_attention`).
Elementwise operations
    that follow each other are merged into one node: traversing hundreds of them takes minutes.
Groups
    are found in a search of our own, which ends (:meth:`Tracer.get_pruning_group`).
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any, TypeGuard, cast

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

from ldt.pruning.attention import PrunablePositions, update_embedding_widths
from ldt.pruning.torch_pruning_internals import (
    OPTYPE,
    Dependency,
    DummyPruner,
    ElementWiseOp,
    Group,
    HybridIndex,
    Node,
    SplitIndexMapping,
    group_of,
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


MOST_CHANNELS = 2**18  # of all layers of a group together; mmdet's detectors have up to 40 000

POINTWISE = re.compile("(Mul|Add|Sub|Div|View|Unsqueeze|Expand)Backward")  # what parameters enter

COORDINATES = ("DeformConv", "RoIAlign", "RoIPool", "GridSampler")  # backward nodes that take them


class FixedChannels(nn.Module):
    """Placeholder node for an input whose channels each have a fixed meaning and must be kept."""


class SplitPart(nn.Module):
    """Placeholder node for one part of a split, ``width`` channels from channel ``start``."""

    def __init__(self, start: int, width: int) -> None:
        super().__init__()
        self.start, self.width = start, width


class Shuffle(nn.Module):
    """Placeholder node for a channel shuffle; it views its ``groups`` * ``width`` channels as such.

    Channel (g, c) becomes channel (c, g).
    """

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.groups, self.width = groups, width

    def before(self, indices: Sequence[HybridIndex]) -> list[HybridIndex]:
        """Return all channels (g, c) of the channels c that are given behind the shuffle."""
        starts = range(0, self.groups * self.width, self.width)
        return [HybridIndex(g + i // self.groups, root) for i, root in indices for g in starts]

    def behind(self, indices: Sequence[HybridIndex]) -> list[HybridIndex]:
        """Return all channels (c, g) of the channels c that are given before the shuffle."""
        firsts = ((i % self.width * self.groups, root) for i, root in indices)
        return [HybridIndex(i + g, root) for i, root in firsts for g in range(self.groups)]


class ChannelParameter(nn.Module):
    """Stands for a parameter of a model that holds values for each channel, along ``dim``."""

    def __init__(self, model: nn.Module, name: str, dim: int) -> None:
        super().__init__()
        path, _, self._attribute = name.rpartition(".")
        self._owner = (model.get_submodule(path),)  # in a tuple: not a child
        self.name, self.dim = name, dim

    @property
    def values(self) -> nn.Parameter:
        """The parameter as it is now."""
        return getattr(self._owner[0], self._attribute)

    def replace_values(self, new: nn.Parameter) -> None:
        """Give the model another parameter in its place."""
        setattr(self._owner[0], self._attribute, new)

    @property
    def num_channels(self) -> int:
        """Its size along ``dim``."""
        return self.values.shape[self.dim]


class ChannelParameterPruner(tp.BasePruningFunc):
    """Prune the parameters that :class:`ChannelParameter` stands for."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        """Remove channels."""
        keep = _kept_indices(layer.num_channels, idxs)
        pruned = self._prune_parameter_and_grad(layer.values, keep, layer.dim)
        layer.replace_values(pruned)
        return layer

    def get_out_channels(self, layer: Any) -> int:
        """Return the number of channels."""
        return layer.num_channels

    prune_in_channels = prune_out_channels
    get_in_channels = get_out_channels


class PositionsPruner(tp.BasePruningFunc):
    """Prune position encodings."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        """Remove channels."""
        layer.kept = layer.kept[_kept_indices(len(layer.kept), idxs)]
        return layer

    def get_out_channels(self, layer: Any) -> int:
        """Return the number of channels."""
        return len(layer.kept)

    prune_in_channels = prune_out_channels
    get_in_channels = get_out_channels


class _PlaceholderPruner(DummyPruner):
    """Tells the number of channels of the operations that stand for themselves."""

    def get_out_channels(self, layer: Any) -> Any:
        if isinstance(layer, Shuffle):
            return layer.groups * layer.width
        if isinstance(layer, SplitPart):
            return layer.width
        return sum(layer.split_sizes) if layer.split_sizes else None  # a split of the channels

    def get_in_channels(self, layer: Any) -> Any:
        return self.get_out_channels(layer)


class MisreadError(Exception):
    """The search for a group finds channels that do not exist, or ever more of them.

    Attributes:
        group: what it has found until then.
    """

    def __init__(self, reason: str, group: Group) -> None:
        super().__init__(reason)
        self.group = group


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
        self.register_customized_layer(ChannelParameter, ChannelParameterPruner())
        self.register_customized_layer(PrunablePositions, PositionsPruner())
        placeholder = cast(tp.BasePruningFunc, _PlaceholderPruner())
        self.REGISTERED_PRUNERS[OPTYPE.SPLIT] = placeholder
        for placeholder_type in (SplitPart, Shuffle):
            self.register_customized_layer(placeholder_type, placeholder)

    def trace(self, model: nn.Module, example: Tensor, forward: Callable) -> "Tracer":
        """Trace ``forward(model, example)`` and build the graph; return self."""
        with traceable_split_attention(model):
            self.build_dependency(model, example, forward_fn=forward, verbose=False)
        for part, node in self.module2node.items():
            if isinstance(part, SplitPart):
                _set_part_mapping(part, node)
            if isinstance(part, Shuffle):
                _set_shuffle_mapping(part, node)
        return self

    def get_pruning_group(
        self, module: nn.Module, pruning_fn: Callable, idxs: Sequence[int]
    ) -> Group:
        """Return all that is pruned with these channels of a layer.

        Channels of the layer that meet in a channel of another layer are tied: they have the same
        root. Every channel of every layer is visited once. Torch-Pruning's own search visits them
        once per way that leads there, and goes round in circles where one adds channels.

        Raises:
            MisreadError: channels are reached that do not exist, or over ``MOST_CHANNELS``.
        """
        tied = {index: index for index in idxs}  # union-find over the roots

        def find(root: int) -> int:
            while tied[root] != root:
                tied[root] = root = tied[tied[root]]
            return root

        start = Dependency(pruning_fn, pruning_fn, *[self.module2node[module]] * 2)
        reached = {(start.target, pruning_fn): {index: index for index in idxs}}
        edges, total = [start], len(idxs)
        stack = [(start, [HybridIndex(index, index) for index in idxs])]
        reason = None
        while stack and reason is None:
            last, channels = stack.pop()
            for edge in last.target.dependencies:
                if not edge.is_triggered_by(last.handler):
                    continue
                indices = channels
                for mapping in filter(None, edge.index_mapping):
                    indices = mapping(indices)
                if not indices:
                    continue
                key = edge.target, edge.handler
                if key not in reached:
                    edges.append(edge)
                roots, new = reached.setdefault(key, {}), []
                for index, root in indices:
                    if index in roots:
                        low, high = sorted((find(root), find(roots[index])))
                        tied[high] = low
                    else:
                        roots[index] = root
                        new.append(HybridIndex(index, root))
                total += len(new)
                if new:
                    stack.append((edge, new))
                    reason = reason or self._conflict(edge, max(new).idx, total)
        number = {root: n for n, root in enumerate(sorted(set(map(find, tied))))}
        members = ((edge, reached[edge.target, edge.handler].items()) for edge in edges)
        group = group_of(self, [(e, {i: number[find(r)] for i, r in m}) for e, m in members])
        if reason is not None:
            raise MisreadError(reason, group)
        return group

    def _conflict(self, edge: Dependency, channel: int, total: int) -> str | None:
        """Return what is wrong with a channel that the search for a group has reached, or None."""
        name = self._module2name.get(edge.target.module)
        if name is not None and not isinstance(edge.target.module, nn.Parameter):
            outwards = self.is_out_channel_pruning_fn(edge.handler)
            width = (self.get_out_channels if outwards else self.get_in_channels)(edge.target)
            if width is not None and channel >= width:
                return f"tracing found channels that {name} does not have"
        if total > MOST_CHANNELS:
            return "tracing couples it with ever more channels"
        return None

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
            _insert_shuffle(node, nodes)
            _disconnect_single_values(node)
            if node.type == OPTYPE.PARAMETER and (dim := _channel_dimension(node)) is not None:
                name = self._param_to_name[node.module]
                _replace(node, ChannelParameter(model, name, dim), nodes)
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


def _insert_shuffle(node: Node, nodes: dict[nn.Module, Node]) -> None:
    """Replace a node by a channel shuffle, if one starts there."""
    groups = getattr(node.grad_fn, "_saved_groups", 0) if _named(node, "ChannelShuffle") else 0
    if groups:
        width = node.grad_fn._input_metadata[0].shape[1] // groups
    elif node.type == OPTYPE.RESHAPE:
        before, after = _shapes(node)
        split = len(after) == len(before) + 1 > 3 and after[1] * after[2] == before[1]
        behind = _transposed(node) if split and after[3:] == before[2:] else None
        if behind is None or _shapes(behind)[1] != before:
            return
        groups, width = after[1:3]
        behind.type = OPTYPE.ELEMENTWISE
    else:
        return
    _replace(node, Shuffle(groups, width), nodes)


def _replace(node: Node, module: nn.Module, nodes: dict[nn.Module, Node]) -> None:
    """Replace a node by one for another module."""
    new = Node(module, None)
    new.inputs, new.outputs = node.inputs, node.outputs
    for neighbours in (*(n.outputs for n in node.inputs), *(n.inputs for n in node.outputs)):
        neighbours[:] = [new if n is node else n for n in neighbours]
    del nodes[node.module]
    nodes[module] = new


def _channel_dimension(parameter: Node) -> int | None:
    """Return the dimension of a parameter along which it has a value for each channel, or None."""
    shape, consumers = cast(nn.Parameter, parameter.module).shape, parameter.outputs
    if not consumers or not all(POINTWISE.match(type(n.grad_fn).__name__) for n in consumers):
        return None
    long = [dim for dim, size in enumerate(shape) if size > 1]
    dim = long[0] if len(long) == 1 else len(shape) - 3  # maps are [N, C, h, w]
    return dim if dim in (0, 1) else None  # those that checkpoints may have pruned


def _disconnect_single_values(node: Node) -> None:
    """Remove the edges behind a single value, which is broadcast over the channels of maps."""
    produced = getattr(node.grad_fn, "_input_metadata", [])
    if len(produced) and all(math.prod(each.shape) == 1 for each in produced):
        _disconnect_outputs(node)
        node.type = OPTYPE.ELEMENTWISE  # a split into nothing has no parts


def _transposed(node: Node) -> Node | None:
    """Return the reshape behind a node and a transposition of dimensions 1 and 2, or None."""
    swaps = 0
    while len(node.outputs) == 1 and swaps < 2:
        (node,) = node.outputs
        function = node.grad_fn
        if node.type == OPTYPE.RESHAPE:
            return node if swaps == 1 else None
        if _named(node, "Transpose"):
            ends = (function._saved_dim0, function._saved_dim1)
            order = list(range(len(function._input_metadata[0].shape)))
            first, second = (order[d - 2**64 if d >= 2**63 else d] for d in ends)  # negative: huge
            order[first], order[second] = second, first
        elif _named(node, "Permute"):
            order = list(function._saved_dims)
        elif _named(node, "Clone"):
            continue
        else:
            return None
        swaps += 1
        if order != [0, 2, 1, *range(3, len(order))]:
            return None
    return None


def _named(node: Node, operation: str) -> bool:
    return operation in type(node.grad_fn).__name__


def _set_shuffle_mapping(shuffle: Shuffle, node: Node) -> None:
    """Set the index mapping of the edges behind a channel shuffle."""
    for consumer in node.outputs:
        for edge in node.dependencies:
            if edge.target is consumer:
                edge.index_mapping[0] = shuffle.behind
        for edge in consumer.dependencies:
            if edge.target is node:
                edge.index_mapping[0] = shuffle.before


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
    """Update ``Bottle2neck.width``, and widths of embeddings, after pruning."""
    update_embedding_widths(model)
    for block in model.modules():
        if isinstance(block, Bottle2neck):
            conv1 = cast(nn.Conv2d, block.conv1)
            block.width = conv1.out_channels // block.scales


def _shapes(reshape: Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes before and after a reshape."""
    function = reshape.grad_fn
    return tuple(function._saved_self_sym_sizes), tuple(function._input_metadata[0].shape)


def _preserves_channels(reshape: Node) -> bool:
    """Return whether a reshape leaves the channel dimension unchanged."""
    before, after = _shapes(reshape)
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
