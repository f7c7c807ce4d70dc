"""Which channels are coupled, and cutting them: a plain view of Torch-Pruning's graph."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ldt.pruning.coupled_groups import (
    CoupledGroup,
    Member,
    cells_of,
    fixed_operation,
    misfit,
    obstacle,
    tied_roots,
)
from ldt.pruning.dependency import Part, Tracer, resize_parts
from ldt.pruning.layer_types import ACTIVATIONS, CONVOLUTIONS, NORMS, width_of
from ldt.pruning.names import below
from ldt.pruning.trial import failure

Forward = Callable[..., Any]  # (model, images) -> the raw output maps


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
            root_of = tied_roots(raw)
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
        size, cells = len(set(root.roots)), cells_of(members, raw)
        parts = math.lcm(*(cell.count for cell in cells if not cell.even))
        group = CoupledGroup(root.name, size, members, raw, parts)
        inside = {m.name: m.layer for m in group.makers if m.name in in_scope}
        reason = obstacle(group, never, scope) or fixed_operation(raw) or misfit(group, cells)
        if reason is None:
            self.groups[group.name] = group
            self.scored.update(inside)
        else:
            self.excluded.update(dict.fromkeys(inside, reason))
        return set(inside)

    def _sift(self, names: Sequence[str]) -> None:
        """Leave whole what a trial shows to be unsafe, halving down to the groups at fault."""
        reason = failure(self, names) if names else None
        if reason is None:
            return
        if len(names) > 1:
            self._sift(names[: len(names) // 2])
            self._sift(names[len(names) // 2 :])
            return
        for maker in self.groups.pop(names[0]).makers:
            if self.scored.pop(maker.name, None):
                self.excluded[maker.name] = reason

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
        self.run([layer.register_forward_hook(count) for layer in layers])
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
        self.run(hooks)
        return frozenset(found)

    def run(self, hooks: Sequence[Any] = ()) -> Any:
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
