"""PX, path exclusion: the spectrum of the neural tangent kernel (Iurada et al., CVPR 2024)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldt.config.values import checked
from ldt.criteria.base import Batch, Criterion, NoScoresError, Target
from ldt.pruning.graph import PruningGraph
from ldt.pruning.hooks import outputs_of
from ldt.pruning.layer_types import ACTIVATIONS, CONVOLUTIONS, NORMS
from ldt.pruning.torch_pruning_internals import Group

Forward = Callable[..., Tensor]
Convolution = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
Norms = Literal["keep", "fuse"]
Aggregate = Literal["mean", "sum"]
Norm = nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm


class PXCriterion(Criterion):
    """Channel importance = contribution of its filters' weights to an upper bound of the NTK.

    R = sum of z1 * z2 over images and outputs, where z1 is the network with all weights 1 and the
    activations' gates as recorded on the image, applied to x^2; and z2 is the network with squared
    weights and no activations, applied to ones. A weight's score is |dR/d(theta^2) theta^2|.

    PX prunes single weights. This is a structured variant: a channel's score is the mean over the
    weights of the filters that produce it. Further choices:

    - Outputs are the predictors' maps; the head's decoding (scales, exponentials) is omitted. A
      layer that is called several times contributes once per call.
    - Biases of convolutions start no path and are omitted.
    - The gate of a smooth activation (SiLU) is 1 where its input is positive. Max-pooling is the
      maximum in both networks.
    - The paper removes weights in 100 steps on an exponential schedule and scores before each:
      ``method.inner_rounds``. No layer is removed entirely: ``prune.max_layer_rate``.

    Everything is computed in float64: products of fan-ins over a hundred layers overflow float32.

    Args:
        bn: ``keep``, as in the authors' code: norms stay in both networks with their weights and
            biases and with the statistics of their input (a batch of at most 4 images), and the
            predictors keep their weights and biases. ``fuse``, the paper's formula: a norm is a
            weight per channel, 1 in z1 and weight^2/variance in z2, which equals fusing batch norms
            into the convolutions (for other norms, whose variance depends on the image, it is
            weight^2).
        aggregate: ``mean`` or ``sum`` over a channel's weights. With ``bn=fuse``, the scores of
            every layer that all paths cross have the same sum, so a global ranking of sums takes
            the widest layers first.
    """

    @checked("method.criterion")
    def __init__(self, bn: Norms = "keep", aggregate: Aggregate = "mean") -> None:
        self.bn: Norms = bn
        self.aggregate: Aggregate = aggregate
        self._scores: dict[nn.Module, Tensor] = {}

    def __call__(self, group: Group) -> Tensor:
        """Return the scores of a Torch-Pruning group: [root channels]."""
        total = super().__call__(group)
        if self.aggregate == "sum":
            return total
        return total / self.sum_over_layers(group, _weights_per_filter)

    def channel_scores(self, layer: nn.Module) -> Tensor:
        """Return the summed scores of each filter's weights."""
        if layer not in self._scores:
            raise NoScoresError("PX follows no paths through attention")
        return self._scores[layer]

    def collect(self, target: Target, graph: PruningGraph, batches: Iterable[Batch]) -> None:
        """Run both auxiliary networks; z2 does not depend on data and runs once per input size."""
        kept = _kept_forwards(graph) if self.bn == "keep" else {}
        summed: dict[torch.Size, list[Tensor]] = {}
        for batch in batches:
            for images in batch.images.split(4):  # recorded gates take a byte per activation
                z1 = [z.sum(0, keepdim=True) for z in _active_paths(graph, images, kept)]
                before = summed.get(images.shape[2:])
                summed[images.shape[2:]] = (
                    z1 if before is None else [a + b for a, b in zip(before, z1, strict=True)]
                )
        squares: dict[nn.Module, Tensor] = {
            layer: layer.weight.detach().double().square().requires_grad_()
            for layer in graph.model.modules()
            if isinstance(layer, CONVOLUTIONS)
        }
        device = next(iter(squares.values())).device
        for shape, z1 in summed.items():
            ones = torch.ones(1, 3, *shape, dtype=torch.double, device=device)
            z2 = _outputs(graph, _squared_weight_forwards(graph, squares) | kept, ones)
            torch.stack([(a * b).sum() for a, b in zip(z1, z2, strict=True)]).sum().backward()
        self._scores = {}
        attending = {
            graph.model.get_submodule(n) for i in graph.inner if i.core for n in i.producers
        }
        for layer in graph.feature_modules:
            weight = squares[layer]
            behind = graph.traced is not graph.forward and weight.grad is None
            if behind or layer in attending:
                continue
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            self._scores[layer] = _per_filter(layer, (gradient * weight.detach()).abs())


def _weights_per_filter(layer: nn.Module) -> Tensor:
    return _per_filter(layer, torch.ones_like(cast(Tensor, layer.weight)))


def _per_filter(layer: nn.Module, values: Tensor) -> Tensor:
    """Sum values of a layer's weights over each filter."""
    filter_dim = int(isinstance(layer, nn.ConvTranspose2d))
    return values.transpose(0, filter_dim).flatten(1).sum(1)


@torch.no_grad()
def _active_paths(
    graph: PruningGraph, images: Tensor, kept: dict[nn.Module, Forward]
) -> list[Tensor]:
    """Return the predictors' maps of z1, which counts the active paths from each pixel."""
    gates: dict[nn.Module, list[Tensor]] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        gates.setdefault(module, []).append(inputs[0] > 0)

    activations = [m for m in graph.model.modules() if isinstance(m, ACTIVATIONS)]
    hooks = [module.register_forward_pre_hook(record) for module in activations]
    try:
        graph.traced(graph.model, images)
    finally:
        for hook in hooks:
            hook.remove()
    forwards: dict[nn.Module, Forward] = {}
    for module in graph.model.modules():
        if isinstance(module, CONVOLUTIONS):
            forwards[module] = _with_unit_weights(cast(Convolution, module))
        elif isinstance(module, NORMS):
            forwards[module] = _identity
        elif module in gates:
            forwards[module] = _gated(iter(gates[module]))
    return _outputs(graph, forwards | kept, images.double().square())


def _squared_weight_forwards(
    graph: PruningGraph, squares: Mapping[nn.Module, Tensor]
) -> dict[nn.Module, Forward]:
    """Return the forwards of z2, which weights paths by their squared weights."""
    forwards: dict[nn.Module, Forward] = {}
    for module in graph.model.modules():
        if module in squares:
            forwards[module] = _with_weight(cast(Convolution, module), squares[module])
        elif isinstance(module, NORMS):
            forwards[module] = _channel_scale(module)
        elif isinstance(module, ACTIVATIONS):
            forwards[module] = _identity
    return forwards


def _kept_forwards(graph: PruningGraph) -> dict[nn.Module, Forward]:
    """Return the forwards of the modules that both networks keep with ``bn=keep``."""
    forwards: dict[nn.Module, Forward] = {}
    for module in graph.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            forwards[module] = _with_own_statistics(module)
        elif isinstance(module, NORMS):
            forwards[module] = deepcopy(module).double().requires_grad_(False).forward
    for name in (*graph.predictors, *graph.last_traced):
        layer = cast(Convolution, graph.model.get_submodule(name))
        bias = None if layer.bias is None else layer.bias.detach().double()
        forwards[layer] = _with_weight(layer, layer.weight.detach().double(), bias)
    return forwards


def _with_own_statistics(norm: nn.modules.batchnorm._BatchNorm) -> Forward:
    """Return a batch norm in training mode, which a map of one position has no variance in."""
    weight, bias = (None if p is None else p.detach().double() for p in (norm.weight, norm.bias))

    def forward(x: Tensor) -> Tensor:
        alone = x.numel() == x.shape[1]
        together = x.expand(2, *x.shape[1:]) if alone else x
        return F.batch_norm(together, None, None, weight, bias, True, 0.0, norm.eps)[: len(x)]

    return forward


def _identity(x: Tensor) -> Tensor:
    return x.clone()  # later layers may work in place


def _gated(gates: Iterator[Tensor]) -> Forward:
    return lambda x: x * next(gates)


def _with_unit_weights(layer: Convolution) -> Forward:
    """Return the layer with all weights 1: its filters are equal, so one is computed per group."""
    if isinstance(layer, nn.Linear):
        return lambda x: x.sum(-1, keepdim=True).repeat_interleave(layer.out_features, -1)

    def forward(x: Tensor) -> Tensor:
        summed = x.unflatten(1, (layer.groups, -1)).sum(2)
        ones = x.new_ones(layer.groups, 1, *layer.kernel_size)
        return _convolve(layer, summed, ones).repeat_interleave(
            layer.out_channels // layer.groups, 1
        )

    return forward


def _with_weight(layer: Convolution, weight: Tensor, bias: Tensor | None = None) -> Forward:
    if isinstance(layer, nn.Linear):
        return lambda x: F.linear(x, weight, bias)
    return lambda x: _convolve(layer, x, weight, bias)


def _convolve(
    layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Apply the layer with another weight and bias."""
    stride, padding, dilation = layer.stride, layer.padding, layer.dilation
    if isinstance(layer, nn.ConvTranspose2d):
        padding, extra = cast(tuple[int, ...], padding), layer.output_padding
        return F.conv_transpose2d(x, weight, bias, stride, padding, extra, layer.groups, dilation)
    return F.conv2d(x, weight, bias, stride, padding, dilation, layer.groups)


def _channel_scale(norm: Norm) -> Forward:
    scale = torch.ones(1, dtype=torch.double)
    if norm.weight is not None:
        scale = norm.weight.detach().double().square()
    variance: Tensor | None = getattr(norm, "running_var", None)
    if variance is not None:
        scale = scale.to(variance.device) / (variance.double() + norm.eps)
    channels_last = isinstance(norm, nn.LayerNorm)

    def forward(x: Tensor) -> Tensor:
        return x * scale.to(x.device).view(-1 if channels_last else (-1, 1, 1))

    return forward


def _outputs(graph: PruningGraph, forwards: dict[nn.Module, Forward], x: Tensor) -> list[Tensor]:
    """Return the predictors' maps for input x with the forwards of some modules replaced."""
    predictors = [
        graph.model.get_submodule(name) for name in (*graph.predictors, *graph.last_traced)
    ]
    with outputs_of(predictors) as outputs, replaced_forwards(forwards):
        graph.traced(graph.model, x)
    return outputs


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Replace the forwards of modules within the context; their hooks still run."""
    own = {m: m.__dict__["forward"] for m in forwards if "forward" in m.__dict__}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module in forwards:
            del module.__dict__["forward"]
            if module in own:
                module.__dict__["forward"] = own[module]
