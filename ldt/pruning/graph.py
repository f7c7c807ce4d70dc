"""The coupled channel groups of a model, and their removal, on top of Torch-Pruning's graph."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldt.config.names import below
from ldt.pruning.attention import embedding_width
from ldt.pruning.coupled_groups import (
    CoupledGroup,
    Member,
    equal_parts,
    excluded_layer,
    excluded_operation,
    find_partitions,
    mapping_conflict,
)
from ldt.pruning.dependency import ChannelParameter, MisreadError, Tracer, update_split_widths
from ldt.pruning.layer_types import ACTIVATIONS, CONVOLUTIONS, NORMS, Side, width_of
from ldt.pruning.torch_pruning_internals import Dependency, Group, Node, group_items, group_of
from ldt.pruning.transformer_groups import TokenSide, inner_groups, token_group
from ldt.pruning.trial import trial_failure

Forward = Callable[..., Any]  # (model, images) -> the raw output maps


class PruningGraph:
    """Find the coupled channel groups in a model's scope, and remove channels from them.

    Args:
        model: in eval mode, with gradients enabled for all parameters (tracing follows
            ``grad_fn``).
        forward: ``forward(model, images)`` returns the raw output maps.
        images: an example input [1, 3, H, W].
        scope: name prefixes; only layers below them lose filters.
        predictors: layers whose output channels are never pruned.
        traced: ``traced(model, images)``, the part of the forward that is traced, if not all of it.
            Behind it only groups of transformers are found.
        last_traced: the layers that make the traced maps. They are not pruned, or together with
            the tokens of a transformer.

    Attributes:
        model, forward, predictors, traced, last_traced: as given.
        groups: the groups that can be pruned, by name of the root layer.
        scored: the convolutions in the scope that produce the groups' channels.
        excluded: layers in the scope that cannot be pruned, with the reason: a rule excludes them,
            their trial pruning fails, or the criterion gives them no scores.
        norm_of: for a convolution, the normalisation layer that directly follows it.

    Raises:
        ValueError: the scope contains no convolution.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        images: Tensor,
        scope: Sequence[str],
        predictors: Sequence[str] = (),
        traced: Forward | None = None,
        last_traced: Sequence[str] = (),
    ) -> None:
        self.model, self.forward, self.predictors = model, forward, tuple(predictors)
        self.traced, self.last_traced = traced or forward, tuple(last_traced)
        self._example = images
        self._names = {module: name for name, module in model.named_modules()}
        self._graph = Tracer().trace(model, images, self._forward_unfrozen)
        self._names |= {
            node.module: node.module.name
            for node in self._graph.module2node.values()
            if isinstance(node.module, ChannelParameter)
        }
        self.groups: dict[str, CoupledGroup] = {}
        self.scored: dict[str, nn.Module] = {}
        self.excluded: dict[str, str] = {}
        self.norm_of = self._find_norms()
        in_scope: dict[str, nn.Module] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, CONVOLUTIONS) and below(name, scope)
        }
        if not in_scope:
            parts = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"prune.scope={list(scope)} contains no convolution; the detector's parts are: "
                f"{parts}"
            )
        self.inner = [i for i in inner_groups(model) if set(i.producers) <= set(in_scope)]
        self._add_inner_groups()
        if self.last_traced:
            self._add_token_group(in_scope, scope)
        self._find_groups(in_scope, scope)
        self._exclude_failing(list(self.groups))
        behind = "its channels are those of the whole transformer" if traced else ""
        for name in in_scope:
            if name not in self.scored:
                self.excluded.setdefault(name, behind or "not reached by tracing")

    def _add_inner_groups(self) -> None:
        """Add the groups within transformer layers, whose operations tracing would misread."""
        for inner in self.inner:
            ends = [TokenSide(name, "out") for name in inner.producers]
            ends += [TokenSide(name, "in") for name in inner.consumers]
            raw = group_of(self._graph, [self._end(end) for end in ends])
            members = self._members(raw)
            size = len(members[0].channels)
            group = CoupledGroup(inner.producers[0], size, members, raw, inner.parts)
            self.groups[group.name] = group
            self.scored.update({m.name: m.layer for m in group.producers})

    def _end(self, end: TokenSide) -> tuple[Dependency, dict[int, int]]:
        """Return how a layer's side is pruned, and the group's channel of each of its channels."""
        layer = self._layer(end.name)
        pruner = self._graph.get_pruner_of_module(layer)
        assert pruner is not None
        prune = pruner.prune_in_channels if end.side == "in" else pruner.prune_out_channels
        width = (pruner.get_in_channels if end.side == "in" else pruner.get_out_channels)(layer)
        node = self._graph.module2node.get(layer) or Node(layer, None)
        each = width // end.copies
        return Dependency(prune, prune, node, node), {i: i % each for i in range(width)}

    def _layer(self, name: str) -> nn.Module:
        """Return the layer of a name, or what stands for a parameter of that name."""
        with suppress(AttributeError):
            return self.model.get_submodule(name)
        parameter = ChannelParameter(self.model, name, dim=1)
        self._names[parameter] = name
        return parameter

    def _add_token_group(self, in_scope: dict[str, nn.Module], scope: Sequence[str]) -> None:
        """Add the group of a transformer's tokens, with the layers that make them from images."""
        sides = token_group(self.model)
        ends = [item for name in self.last_traced for item in self._last_of(name)]
        sizes = {len({*channels.values()}) for _, channels in ends}
        if not sides or sizes != {embedding_width(self.model)}:
            return
        raw = group_of(self._graph, [*ends, *map(self._end, sides)])
        members = self._members(raw)
        needed = {m.name for m in members if m.side != "in" and isinstance(m.layer, CONVOLUTIONS)}
        if any(not below(name, scope) and "." in name for name in needed):
            return  # a part of the transformer is outside of the scope
        partitions = find_partitions(members, raw)
        size = len(ends[0][1])
        group = CoupledGroup(members[0].name, size, members, raw, equal_parts(size, partitions))
        self.groups[group.name] = group
        self.scored.update({name: in_scope[name] for name in needed if name in in_scope})

    def _last_of(self, name: str) -> list[tuple[Dependency, dict[int, int]]]:
        """Return what is pruned with the channels of a layer that makes traced maps."""
        items = group_items(self._raw_group(self.model.get_submodule(name)))
        return [
            (item.dep, dict(zip(item.idxs, item.root_idxs, strict=True)))
            for item in items
            if item.dep.target.module in self._names
        ]

    def _find_groups(self, in_scope: dict[str, nn.Module], scope: Sequence[str]) -> None:
        fixed = {*self.predictors, *self.last_traced} & {*in_scope} - set(self.scored)
        # how their outputs are decoded is not traced
        self.excluded.update({name: f"its channels are predictions of {name}" for name in fixed})
        seen = fixed | set(self.scored)
        for layer in [m for m in self._graph.module2node if m in in_scope.values()]:
            if self._names[layer] in seen:
                continue
            try:
                seen |= self._add_group(self._raw_group(layer), in_scope, scope)
            except MisreadError as error:
                inside = {m.name for m in self._members(error.group) if m.side != "in"}
                inside = inside & set(in_scope) - self._within | {self._names[layer]}
                reason = excluded_operation(error.group) or str(error)
                self.excluded.update(dict.fromkeys(inside, reason))
                seen |= inside

    def _forward_unfrozen(self, model: nn.Module, images: Tensor) -> Any:
        return self.traced(model.requires_grad_(True), images)  # mmdet's eval() freezes stages

    @cached_property
    def _within(self) -> frozenset[str]:
        """The layers that produce channels within transformer layers."""
        return frozenset(name for inner in self.inner for name in inner.producers)

    def _find_norms(self) -> dict[str, str]:
        found = {}
        for module, node in self._graph.module2node.items():
            # a module that is called several times lists its neighbours once per call
            following = {output.module: output for output in node.outputs}
            if not isinstance(module, CONVOLUTIONS) or len(following) != 1:
                continue
            norm, after = following.popitem()
            if isinstance(norm, NORMS) and all(i.module is module for i in after.inputs):
                found[self._names[module]] = self._names[norm]
        return found

    def _raw_group(self, layer: nn.Module, *tried: nn.Module) -> Group:
        """Return the group of all output channels of a layer.

        Where the group holds only a part of another layer's outputs, that layer becomes the root.
        """
        pruner = self._graph.get_pruner_of_module(layer)
        assert pruner is not None
        channels = list(range(pruner.get_out_channels(layer)))
        raw = self._graph.get_pruning_group(layer, pruner.prune_out_channels, channels)
        for item in group_items(raw):
            producer = item.dep.target.module
            produces = isinstance(producer, CONVOLUTIONS) and self._side(item.dep) == "out"
            partly = produces and len(set(item.idxs)) < width_of(producer, "out")
            if partly and producer not in tried:
                return self._raw_group(producer, layer, *tried)
        return raw

    def _add_group(
        self, raw: Group, in_scope: dict[str, nn.Module], scope: Sequence[str]
    ) -> set[str]:
        """Add a group or exclude its layers; return the layers in the scope that produce it."""
        members = self._members(raw)
        root = members[0]
        size, partitions = len(set(root.roots)), find_partitions(members, raw)
        group = CoupledGroup(root.name, size, members, raw, equal_parts(size, partitions))
        inside = {m.name: m.layer for m in group.producers if m.name in in_scope}
        misread = next((name for name in inside if name in self._within), None)
        inside = {name: layer for name, layer in inside.items() if name not in self._within}
        reason = (
            (misread and f"tracing couples it with the inside of {misread}")
            or excluded_layer(group, set(self.predictors), scope)
            or excluded_operation(raw)
            or mapping_conflict(group, partitions)
        )
        if reason is None:
            self.groups[group.name] = group
            self.scored.update(inside)
        else:
            self.excluded.update(dict.fromkeys(inside, reason))
        return set(inside)

    def _members(self, raw: Group) -> tuple[Member, ...]:
        return tuple(
            Member(
                self._names[item.dep.target.module],
                item.dep.target.module,
                self._side(item.dep),
                np.asarray(item.idxs),
                np.asarray(item.root_idxs),
            )
            for item in group_items(raw)
            if item.dep.target.module in self._names
        )

    def _exclude_failing(self, names: Sequence[str]) -> None:
        """Exclude groups whose trial pruning fails (found by bisection)."""
        reason = trial_failure(self, names) if names else None
        if reason is None:
            return
        if len(names) > 1:
            self._exclude_failing(names[: len(names) // 2])
            self._exclude_failing(names[len(names) // 2 :])
            return
        self.exclude(names[0], reason)

    def exclude(self, name: str, reason: str) -> None:
        """Leave a group whole: its layers move from :attr:`scored` to :attr:`excluded`."""
        for producer in self.groups.pop(name).producers:
            if self.scored.pop(producer.name, None):
                self.excluded[producer.name] = reason

    def _side(self, dep: Dependency) -> Side:
        out = self._graph.is_out_channel_pruning_fn(dep.handler)
        inn = self._graph.is_in_channel_pruning_fn(dep.handler)
        return "both" if out and inn else "out" if out else "in"

    @cached_property
    def positions(self) -> dict[str, int]:
        """Output positions of every layer over all its calls, for one image of the example's size.

        A convolution costs ``weight.numel()`` MACs per position. For a transposed convolution the
        positions of its input are counted instead. A head that five scales share is called five
        times.
        """
        counted: dict[str, int] = {}

        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            name = self._names[module]
            counted_map = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
            channels = counted_map.shape[-1 if isinstance(module, nn.Linear) else 1]
            if isinstance(module, nn.LayerNorm):  # may be channels first or last
                channels = module.normalized_shape[-1]
            counted[name] = counted.get(name, 0) + counted_map.numel() // channels

        layers = [m for m in self._names if isinstance(m, CONVOLUTIONS + NORMS)]
        self.run([layer.register_forward_hook(count) for layer in layers])
        return counted

    @cached_property
    def products(self) -> dict[str, int]:
        """MACs of attention per output channel of the layers that make queries and values.

        They are those of one image of the example's size, over all calls.
        """
        counted: dict[str, int] = {}

        def counter(layers: Mapping[str, int]) -> Callable[..., None]:
            def count(_core: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                pairs = len(inputs[0]) * inputs[0].shape[1] * inputs[1].shape[1]
                for name, times in layers.items():
                    counted[name] = counted.get(name, 0) + times * pairs

            return count

        cores = [(i.core, i.products) for i in self.inner if i.core]
        modules = dict(self.model.named_modules())
        self.run([modules[c].register_forward_pre_hook(counter(made)) for c, made in cores])
        return counted

    @cached_property
    def feature_modules(self) -> dict[nn.Module, nn.Module]:
        """For every scored convolution, the module whose output is its feature map F^(l).

        This is the normalisation layer that follows it, if there is one.
        """
        modules = dict(self.model.named_modules())
        return {layer: modules[self.norm_of.get(name, name)] for name, layer in self.scored.items()}

    @cached_property
    def activated(self) -> frozenset[nn.Module]:
        """The convolutions of :attr:`feature_modules` whose feature map enters an activation."""
        layer_of = {module: layer for layer, module in self.feature_modules.items()}
        outputs: dict[int, tuple[nn.Module, Tensor]] = {}  # keeps the tensors: ids stay unique
        found = set()

        def record(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[id(output)] = (layer_of[module], output)

        def look_up(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if id(inputs[0]) in outputs:
                found.add(outputs[id(inputs[0])][0])

        hooks = [module.register_forward_hook(record) for module in layer_of]
        hooks += [
            module.register_forward_pre_hook(look_up)
            for module in self._names
            if isinstance(module, ACTIVATIONS)
        ]
        self.run(hooks)
        return frozenset(found)

    def unplaced_tokens(self) -> list[str]:
        """Return the groups with a linear layer whose output is tokens [N, positions, C].

        There are none where the transformer is known, and with it the places of its tokens.
        """
        if self.inner:
            return []
        tokens = set()

        def look(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.ndim == 3:
                tokens.add(module)

        linear = [layer for layer in self.scored.values() if isinstance(layer, nn.Linear)]
        if linear:
            self.run([layer.register_forward_hook(look) for layer in linear])
        return [
            name
            for name, group in self.groups.items()
            if any(member.layer in tokens for member in group.producers)
        ]

    def run(self, hooks: Sequence[RemovableHandle] = ()) -> Any:
        """Run the example through the model in eval mode, then remove the hooks.

        Returns:
            The raw output maps.
        """
        training = [module for module in self._names if module.training]
        for module in training:
            module.training = False  # not eval(): mmdet's would freeze stages
        try:
            with torch.no_grad():
                return self.forward(self.model, self._example)
        finally:
            for hook in hooks:
                hook.remove()
            for module in training:
                module.training = True

    def prunable_share(self) -> tuple[int, int]:
        """Return the number of parameters of the prunable layers in the scope, and of all."""
        sizes = {
            name: sum(p.numel() for p in module.parameters(recurse=False))
            for name, module in self.model.named_modules()
            if name in self.scored or name in self.excluded
        }
        return sum(size for name, size in sizes.items() if name in self.scored), sum(sizes.values())

    def remove(self, channels: dict[str, list[int]]) -> None:
        """Remove channels from the model, in place; the graph is outdated afterwards.

        Args:
            channels: for a group's name, the channels to remove, numbered as in the root layer.
        """
        trainable = {name: p.requires_grad for name, p in self.model.named_parameters()}
        removals: dict[tuple[nn.Module, Callable], tuple[Dependency, set[int]]] = {}
        for name, indices in channels.items():
            for item in group_items(self.groups[name].raw) if indices else ():
                layer, removed = item.dep.target.module, np.isin(item.root_idxs, indices)
                if layer in self._names:  # a layer may read several groups: prune it once for all
                    key = (layer, item.dep.handler)
                    _, idxs = removals.setdefault(key, (item.dep, set()))
                    idxs.update(np.asarray(item.idxs)[removed].tolist())
        for prune, idxs in removals.values():
            prune(sorted(idxs))
        update_split_widths(self.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trainable[name])
