"""Interface of pruning criteria: their input, and scores per channel."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch_pruning.pruner.importance import Importance

from ldt.objects import Objects
from ldt.pruning.graph import PruningGraph
from ldt.pruning.layer_types import ACTIVATIONS
from ldt.pruning.torch_pruning_internals import Group, group_items, prunes_outputs


class Batch(Protocol):
    """A batch ready for the network."""

    @property
    def images(self) -> Tensor:
        """Normalised images [N, 3, H, W]."""
        ...

    @property
    def objects(self) -> Objects:
        """Ground-truth objects, in pixels of the images."""
        ...


class Target(Protocol):
    """Interface of the detector for criteria."""

    @property
    def model(self) -> nn.Module:
        """The network to prune."""
        ...

    def features(self, batch: Any) -> Sequence[Tensor]:
        """Return the neck's feature maps [N, C, h, w], one per scale."""
        ...

    def detection_loss(self, batch: Any) -> Tensor:
        """Return the detector's training loss, a scalar."""
        ...


class Criterion(Importance):
    """Score the channels of coupled groups: a Torch-Pruning importance with data statistics.

    :meth:`collect` processes calibration batches once per round; then :meth:`channel_scores`
    returns one score per output channel of a layer. A group's scores are summed over its layers.

    Attributes:
        layers: the convolutions to score, by name; set before :meth:`collect`.
        notes: numbers about the scores for the round's record; set by :meth:`collect`.
    """

    layers: Mapping[str, nn.Module] = {}
    notes: Mapping[str, float] = {}

    def collect(self, target: Target, graph: PruningGraph, batches: Iterable[Batch]) -> None:
        """Collect statistics; called in eval mode with gradients for all parameters.

        Args:
            target: the detector.
            graph: its coupled groups.
            batches: calibration batches; may be iterated more than once.
        """
        raise NotImplementedError

    def channel_scores(self, layer: nn.Module) -> Tensor:
        """Return one score per output channel of a convolution, low for the least useful, 1-D."""
        raise NotImplementedError

    def __call__(self, group: Group) -> Tensor:
        """Return the scores of a Torch-Pruning group, summed over its layers: [root channels]."""
        scored, items = set(self.layers.values()), group_items(group)
        total = torch.zeros(len(set(items[0].root_idxs)), dtype=torch.float64)
        for item in items:
            layer = item.dep.target.module
            if layer in scored and prunes_outputs(group, item.dep):
                scores = self.channel_scores(layer).detach().double().cpu()
                total.index_add_(0, torch.as_tensor(item.root_idxs), scores[list(item.idxs)])
        return total


def score_groups(
    criterion: Importance, target: Target, graph: PruningGraph, batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """Return the scores of every group, by a criterion of ours or one of Torch-Pruning."""
    if isinstance(criterion, Criterion):
        criterion.layers = graph.scored
        criterion.collect(target, graph, batches)
    scores = {}
    for name, group in graph.groups.items():
        own = criterion(group.raw)
        if own is None:
            raise ValueError(f"{type(criterion).__name__} returns no scores for the group {name!r}")
        scores[name] = own[: group.size].detach().double().cpu()  # the first of tied channels
    return scores


ForwardHook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]
GradientCallback = Callable[[nn.Module, Tensor, Tensor], None]
MapCallback = Callable[[nn.Module, Tensor], None]


@contextmanager
def feature_gradients(
    feature_modules: dict[nn.Module, nn.Module], callback: GradientCallback
) -> Iterator[None]:
    """Call ``callback(layer, F, dz/dF)`` in every backward pass, once per call of the layer.

    Args:
        feature_modules: :attr:`ldt.pruning.graph.PruningGraph.feature_modules`, or some of them.
        callback: gets the convolution, its feature map and the gradient, both [N, C, h, w].
    """

    def hook_of(layer: nn.Module) -> ForwardHook:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            value = output.detach()
            output.register_hook(lambda gradient: callback(layer, value, gradient))
            return output.clone()  # later layers may work in place (ReLU, residual sums)

        return hook

    hooks = [m.register_forward_hook(hook_of(layer)) for layer, m in feature_modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def visit_maps(graph: PruningGraph, batches: Iterable[Batch], callback: MapCallback) -> int:
    """Call ``callback(layer, X)`` once per batch and call of each scored layer.

    X, [N, C, h, w], is the output of the activation module that directly follows the layer and its
    normalisation; if there is none (the last convolution of a residual branch), it is the map
    before any activation.

    Returns:
        The number of images.
    """
    has_activation = graph.activated
    pending: dict[int, tuple[nn.Module, Tensor]] = {}  # keeps the tensors: ids stay unique

    def hook_of(layer: nn.Module) -> ForwardHook:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if layer in has_activation:
                pending[id(output)] = (layer, output)
            else:
                callback(layer, output)

        return hook

    def activated(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if id(inputs[0]) in pending:
            callback(pending.pop(id(inputs[0]))[0], output)

    hooks = [m.register_forward_hook(hook_of(layer)) for layer, m in graph.feature_modules.items()]
    hooks += [
        module.register_forward_hook(activated)
        for module in graph.model.modules()
        if isinstance(module, ACTIVATIONS)
    ]
    images = 0
    try:
        for batch in batches:
            graph.forward(graph.model, batch.images)
            images += len(batch.images)
    finally:
        for hook in hooks:
            hook.remove()
    return images
