"""Interface of pruning criteria: their input, and scores per channel."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch_pruning.pruner import importance
from torch_pruning.pruner.importance import Importance

from ldt.objects import Objects
from ldt.pruning.graph import PruningGraph
from ldt.pruning.layer_types import ACTIVATIONS
from ldt.pruning.tokens import Places
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

    def of_image(self, index: int) -> "Batch":
        """Return one image as a batch of its own."""
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


class NoScoresError(ValueError):
    """Raised by a criterion that cannot score a group; the message says why.

    The group is not pruned, and its layers are listed among the excluded ones. An importance of
    Torch-Pruning that returns None has the same effect.
    """


class Criterion(Importance):
    """Score the channels of coupled groups: a Torch-Pruning importance with data statistics.

    :meth:`collect` processes calibration batches once per round; then :meth:`channel_scores`
    returns one score per output channel of a layer, or raises :class:`NoScoresError`. A group's
    scores are summed over its layers.

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
        """Return one score per output channel of a convolution, low for the least useful, 1-D.

        Raises:
            NoScoresError: it has none; the other layers of its group decide, if they have scores.
        """
        raise NotImplementedError

    def __call__(self, group: Group) -> Tensor:
        """Return the scores of a Torch-Pruning group, summed over its layers: [root channels]."""
        return self.sum_over_layers(group, self.channel_scores)

    def sum_over_layers(self, group: Group, values: Callable[[nn.Module], Tensor]) -> Tensor:
        """Sum the values of the output channels of a group's scored layers: [root channels]."""
        scored, items = set(self.layers.values()), group_items(group)
        reasons: list[NoScoresError] = []
        summed = 0
        total = torch.zeros(len(set(items[0].root_idxs)), dtype=torch.float64)
        for item in items:
            layer = item.dep.target.module
            if layer in scored and prunes_outputs(group, item.dep):
                try:
                    own = values(layer).detach().double().cpu()
                except NoScoresError as error:
                    reasons.append(error)
                    continue
                summed += 1
                total.index_add_(0, torch.as_tensor(item.root_idxs), own[list(item.idxs)])
        if reasons and not summed:
            raise reasons[0]
        return total


class GroupCriterion(Criterion):
    """Score whole groups instead of layers.

    Attributes:
        scores: per root layer of a group, one score per channel; set by :meth:`collect`.
    """

    scores: Mapping[nn.Module, Tensor] = {}

    def __call__(self, group: Group) -> Tensor:
        """Return the scores of a Torch-Pruning group: [root channels]."""
        return self.channel_scores(group_items(group)[0].dep.target.module)

    def channel_scores(self, layer: nn.Module) -> Tensor:
        """Return the scores of the group that has this layer as its root."""
        if layer not in self.scores:
            raise NoScoresError(f"{type(self).__name__} does not reach its channels")
        return self.scores[layer]


INSTEAD = {  # importances of Torch-Pruning that lack gradients or activations here
    importance.GroupTaylorImportance: "method=taylor",
    importance.GroupHessianImportance: "method=obd",
    importance.OBDCImportance: "method=obd",
    importance.ActivationImportance: "method=chip or method=hrank",
}


def check_importance(criterion: Importance | None) -> None:
    """Raise ValueError for an importance of Torch-Pruning that is not computed from weights."""
    for kind, instead in INSTEAD.items():
        if isinstance(criterion, kind):
            raise ValueError(
                f"{type(criterion).__name__} needs gradients or activations that Torch-Pruning "
                f"leaves to its caller; importances of weights alone are allowed, or {instead}"
            )


def score_groups(
    criterion: Importance, target: Target, graph: PruningGraph, batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """Return the scores of every group, by a criterion of ours or one of Torch-Pruning.

    Groups without scores are excluded from the graph.

    Raises:
        ValueError: no group has scores, or :func:`check_importance` does not allow the criterion.
    """
    check_importance(criterion)
    if isinstance(criterion, Criterion):
        for name in graph.unplaced_tokens():
            graph.exclude(name, "its output is tokens, not maps, which criteria score")
        criterion.layers = graph.scored
        criterion.collect(target, graph, batches)
    scores, reasons = {}, {}
    for name, group in graph.groups.items():
        try:
            own = criterion(group.raw)
        except NoScoresError as error:
            own, reasons[name] = None, str(error)
        if own is None:
            reasons.setdefault(name, f"{type(criterion).__name__} gives it no scores")
        else:
            scores[name] = own[: group.size].detach().double().cpu()  # the first of tied channels
    if not scores:
        listed = "; ".join(sorted(set(reasons.values())))
        raise ValueError(f"{type(criterion).__name__} scores no group of layers at all: {listed}")
    for name, reason in reasons.items():
        graph.exclude(name, reason)
    return scores


ForwardHook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]
GradientCallback = Callable[[nn.Module, Tensor, Tensor, bool], None]
MapCallback = Callable[[nn.Module, Tensor, bool], None]


@contextmanager
def feature_gradients(
    model: nn.Module, feature_modules: dict[nn.Module, nn.Module], callback: GradientCallback
) -> Iterator[None]:
    """Call ``callback(layer, F, dz/dF, located)`` in backward passes, once per map of a call.

    Args:
        model: that the layers belong to.
        feature_modules: :attr:`ldt.pruning.graph.PruningGraph.feature_modules`, or some of them.
        callback: gets the layer, its feature map and the gradient, both [N, C, h, w], and whether
            the map has positions (:meth:`ldt.pruning.tokens.Places.maps`).
    """
    places = Places()

    def hook_of(layer: nn.Module) -> ForwardHook:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            value = output.detach()
            maps = places.maps(value)

            def called(gradient: Tensor) -> None:
                sizes = [m.shape[2] * m.shape[3] for m, _ in maps]
                parts = [gradient]
                if value.ndim == 3:
                    tokens = gradient.reshape(len(maps[0][0]), -1, gradient.shape[2])
                    parts = [part.transpose(1, 2) for part in tokens.split(sizes, 1)]
                for (own, located), part in zip(maps, parts, strict=True):
                    callback(layer, own, part.reshape(own.shape), located)

            output.register_hook(called)
            return output.clone()  # later layers may work in place (ReLU, residual sums)

        return hook

    hooks = [m.register_forward_hook(hook_of(layer)) for layer, m in feature_modules.items()]
    try:
        with places.recorded(model):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def visit_maps(graph: PruningGraph, batches: Iterable[Batch], callback: MapCallback) -> int:
    """Call ``callback(layer, X, located)`` once per batch and map of each scored layer's call.

    X, [N, C, h, w], is the output of the activation module that directly follows the layer and its
    normalisation; if there is none (the last convolution of a residual branch), it is the map
    before any activation. ``located`` tells whether it has positions, as that of queries has not.

    Returns:
        The number of images.
    """
    has_activation = graph.activated
    pending: dict[int, tuple[nn.Module, Tensor]] = {}  # keeps the tensors: ids stay unique
    places = Places()

    def tell(layer: nn.Module, output: Tensor) -> None:
        for own, located in places.maps(output):
            callback(layer, own, located)

    def hook_of(layer: nn.Module) -> ForwardHook:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if layer in has_activation:
                pending[id(output)] = (layer, output)
            else:
                tell(layer, output)

        return hook

    def activated(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if id(inputs[0]) in pending:
            tell(pending.pop(id(inputs[0]))[0], output)

    hooks = [m.register_forward_hook(hook_of(layer)) for layer, m in graph.feature_modules.items()]
    hooks += [
        module.register_forward_hook(activated)
        for module in graph.model.modules()
        if isinstance(module, ACTIVATIONS)
    ]
    images = 0
    try:
        with places.recorded(graph.model):
            for batch in batches:
                graph.forward(graph.model, batch.images)
                images += len(batch.images)
    finally:
        for hook in hooks:
            hook.remove()
    return images
