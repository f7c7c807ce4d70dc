"""What a pruning criterion is given and what it gives back."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch_pruning.pruner.importance import Importance

from ldt.objects import Objects
from ldt.pruning.graph import PruningGraph
from ldt.pruning.layer_types import ACTIVATIONS
from ldt.pruning.torch_pruning_internals import prunes_outputs


class Batch(Protocol):
    """Images ready for the network, with their labelled objects."""

    images: Tensor  # [N, 3, H, W]
    objects: Objects


class Target(Protocol):
    """What a criterion may ask of the detector; three lines make a small network one."""

    @property
    def model(self) -> nn.Module:
        """The network that is pruned."""
        ...

    def features(self, batch: Any) -> Sequence[Tensor]:
        """The neck's output maps [N, C, h, w], one per scale."""
        ...

    def detection_loss(self, batch: Any) -> Tensor:
        """The detector's own training loss, a scalar."""
        ...


class Criterion(Importance):
    """Scores the channels of a coupled group: a Torch-Pruning importance with statistics.

    :meth:`collect` looks at calibration batches once a round; :meth:`channel_scores` then gives
    one score per output channel of a layer. A coupled group's score is the sum over its layers.

    Attributes:
        layers: the convolutions that are scored, by name; set before :meth:`collect`.
        notes: numbers about the scores, set by :meth:`collect`, that belong in a round's record.
    """

    layers: Mapping[str, nn.Module] = {}
    notes: Mapping[str, float] = {}

    def collect(self, target: Target, graph: PruningGraph, batches: Iterable[Any]) -> None:
        """Gather statistics; called in eval mode with gradients on for all parameters.

        Args:
            target: the detector.
            graph: its coupled groups.
            batches: calibration batches; may be iterated more than once.
        """
        raise NotImplementedError

    def channel_scores(self, layer: nn.Module) -> Tensor:
        """One score per output channel of a convolution, the least useful lowest, 1-D."""
        raise NotImplementedError

    def __call__(self, group: Any) -> Tensor:
        """The summed scores of a Torch-Pruning group's layers, [channels of its root]."""
        scored = set(self.layers.values())
        total = torch.zeros(len(set(group[0].root_idxs)), dtype=torch.float64)
        for item in group.items:
            layer = item.dep.target.module
            makes = prunes_outputs(group, item.dep)
            if makes and layer in scored:
                scores = self.channel_scores(layer).detach().double().cpu()
                total.index_add_(0, torch.as_tensor(item.root_idxs), scores[list(item.idxs)])
        return total


def score_groups(
    criterion: Importance, target: Target, graph: PruningGraph, batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Scores of every group, with a criterion of ours or any importance of Torch-Pruning."""
    if isinstance(criterion, Criterion):
        criterion.layers = graph.scored
        criterion.collect(target, graph, batches)
    scores = {}
    for name, group in graph.groups.items():
        found = criterion(group.raw)
        if found is None:
            raise ValueError(f"{type(criterion).__name__} gives no scores for the group {name!r}")
        scores[name] = found[: group.size].detach().double().cpu()  # of tied channels the first
    return scores


Receive = Callable[[nn.Module, Tensor, Tensor], None]
ReceiveMap = Callable[[nn.Module, Tensor], None]


@contextmanager
def feature_gradients(points: dict[nn.Module, nn.Module], receive: Receive) -> Iterator[None]:
    """Within it, every backward calls ``receive(layer, F, dz/dF)``, once per call of the layer.

    Args:
        points: :attr:`ldt.pruning.graph.PruningGraph.feature_modules`, or some of them.
        receive: gets the convolution, its feature map and the gradient, both [N, C, h, w].
    """

    def tap(layer: nn.Module) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            value = output.detach()
            output.register_hook(lambda gradient: receive(layer, value, gradient))
            return output.clone()  # what follows may work in place (ReLU, residual sums)

        return hook

    hooks = [point.register_forward_hook(tap(layer)) for layer, point in points.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def visit_maps(graph: PruningGraph, batches: Iterable[Any], receive: ReceiveMap) -> int:
    """Call ``receive(layer, X)`` once per batch and call of each scored layer.

    X, [N, C, h, w], is the map behind the activation module that directly follows the layer and its
    normalisation; where none does (the last convolution of a residual branch), before any. Returns
    the number of images.
    """
    in_two_steps = graph.activated
    waiting: dict[int, tuple[nn.Module, Tensor]] = {}  # holds the maps, so that ids stay theirs

    def tap(layer: nn.Module) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if layer in in_two_steps:
                waiting[id(output)] = (layer, output)
            else:
                receive(layer, output)

        return hook

    def activated(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if id(inputs[0]) in waiting:
            receive(waiting.pop(id(inputs[0]))[0], output)

    hooks = [
        point.register_forward_hook(tap(layer)) for layer, point in graph.feature_modules.items()
    ]
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
