"""PX, path exclusion: the spectrum of the neural tangent kernel (Iurada et al., CVPR 2024)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldt.criteria.base import Criterion, Target
from ldt.pruning.graph import PruningGraph
from ldt.pruning.layer_types import ACTIVATIONS, CONVOLUTIONS, NORMS

Forward = Callable[..., Tensor]


class PXCriterion(Criterion):
    """A channel is worth the part that its filters' weights have in an upper bound of the NTK.

    R = sum of z1 * z2 over images and outputs, where z1 is the network with all weights 1 and the
    activations' gates as recorded on the image, applied to x^2; and z2 is the network with squared
    weights and no activations, applied to ones. A weight's score is |dR/d(theta^2) theta^2|.

    PX prunes single weights. This is a structured adaptation of it: a channel's score is the sum
    over the weights of the filters that produce it. Further readings:

    - Outputs are the predictors' maps; what a head makes of them (scales, exponentials) is left
      out. A layer that is called several times takes part once per call.
    - Normalisation counts as a weight per channel, weight^2/variance in z2 and 1 in z1. For batch
      norms this is the same as fusing them into the convolutions; other norms, whose variance
      depends on the image, count with weight^2. Biases begin no path and are left out.
    - The gate of a smooth activation (SiLU) is 1 where its input is positive. Max-pooling takes the
      maximum in both networks.
    - The original removes weights in 100 steps with an exponential schedule, scoring anew each
      time: ``method.inner_rounds``. No layer is removed whole: ``prune.max_layer_rate``.

    Everything is computed in float64: products of fan-ins over a hundred layers do not fit float32.
    """

    def __init__(self) -> None:
        self._scores: dict[nn.Module, Tensor] = {}

    def channel_scores(self, layer: nn.Module) -> Tensor:
        """Summed scores of a filter's weights."""
        return self._scores[layer]

    def collect(self, target: Target, graph: PruningGraph, batches: Iterable[Any]) -> None:
        """Run both auxiliary networks; z2 sees no data, so once per input size."""
        summed: dict[torch.Size, list[Tensor]] = {}
        for batch in batches:
            for images in batch.images.split(4):  # recorded gates take a byte per activation
                found = [z.sum(0, keepdim=True) for z in _counted_paths(graph, images)]
                known = summed.get(images.shape[2:])
                summed[images.shape[2:]] = (
                    found if known is None else [a + b for a, b in zip(known, found, strict=True)]
                )
        squares: dict[nn.Module, Tensor] = {
            layer: layer.weight.detach().double().square().requires_grad_()
            for layer in graph.model.modules()
            if isinstance(layer, CONVOLUTIONS)
        }
        example = next(iter(squares.values()))
        for shape, z1 in summed.items():
            ones = torch.ones(1, 3, *shape, dtype=torch.double, device=example.device)
            z2 = _outputs(graph, _weighted(graph, squares), ones)
            torch.stack([(a * b).sum() for a, b in zip(z1, z2, strict=True)]).sum().backward()
        self._scores = {
            layer: _per_filter(layer, squares[layer]) for layer in graph.feature_modules
        }


def _per_filter(layer: nn.Module, squares: Tensor) -> Tensor:
    if squares.grad is None:
        squares.grad = torch.zeros_like(squares)  # no path through this layer
    filters = int(isinstance(layer, nn.ConvTranspose2d))
    scores = (squares.grad * squares.detach()).abs()
    return scores.transpose(0, filters).flatten(1).sum(1)


@torch.no_grad()
def _counted_paths(graph: PruningGraph, images: Tensor) -> list[Tensor]:
    """The predictors' maps of z1, the network that counts the active paths from each pixel."""
    gates: dict[nn.Module, list[Tensor]] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        gates.setdefault(module, []).append(inputs[0] > 0)

    activations = [m for m in graph.model.modules() if isinstance(m, ACTIVATIONS)]
    hooks = [module.register_forward_pre_hook(record) for module in activations]
    try:
        graph.forward(graph.model, images)
    finally:
        for hook in hooks:
            hook.remove()
    forwards: dict[nn.Module, Forward] = {}
    for module in graph.model.modules():
        if isinstance(module, CONVOLUTIONS):
            forwards[module] = _summing(module)
        elif isinstance(module, NORMS):
            forwards[module] = _same
        elif module in gates:
            forwards[module] = _gated(iter(gates[module]))
    return _outputs(graph, forwards, images.double().square())


def _weighted(graph: PruningGraph, squares: Mapping[nn.Module, Tensor]) -> dict[nn.Module, Forward]:
    """The forwards of z2, the network that weighs paths by their squared weights."""
    forwards: dict[nn.Module, Forward] = {}
    for module in graph.model.modules():
        if module in squares:
            forwards[module] = _convolving(module, squares[module])
        elif isinstance(module, NORMS):
            forwards[module] = _scaling(module)
        elif isinstance(module, ACTIVATIONS):
            forwards[module] = _same
    return forwards


def _same(x: Tensor) -> Tensor:
    return x.clone()  # what follows may work in place


def _gated(gates: Iterator[Tensor]) -> Forward:
    return lambda x: x * next(gates)


def _summing(layer: Any) -> Forward:
    """A layer whose weights are all 1: its filters are equal, so one is computed and repeated."""
    if isinstance(layer, nn.Linear):
        return lambda x: x.sum(-1, keepdim=True).repeat_interleave(layer.out_features, -1)

    def forward(x: Tensor) -> Tensor:
        summed = x.unflatten(1, (layer.groups, -1)).sum(2)
        ones = x.new_ones(layer.groups, 1, *layer.kernel_size)
        found = _convolution(layer, summed, ones)
        return found.repeat_interleave(layer.out_channels // layer.groups, 1)

    return forward


def _convolving(layer: Any, weight: Tensor) -> Forward:
    if isinstance(layer, nn.Linear):
        return lambda x: F.linear(x, weight)
    return lambda x: _convolution(layer, x, weight)


def _convolution(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The layer with another weight and without its bias."""
    stride, padding, dilation = layer.stride, layer.padding, layer.dilation
    if isinstance(layer, nn.ConvTranspose2d):
        extra = layer.output_padding
        return F.conv_transpose2d(x, weight, None, stride, padding, extra, layer.groups, dilation)
    return F.conv2d(x, weight, None, stride, padding, dilation, layer.groups)


def _scaling(norm: Any) -> Forward:
    scale = torch.ones(1, dtype=torch.double)
    if norm.weight is not None:
        scale = norm.weight.detach().double().square()
    if getattr(norm, "running_var", None) is not None:
        scale = scale.to(norm.running_var.device) / (norm.running_var.double() + norm.eps)
    last = isinstance(norm, nn.LayerNorm)  # whose channels stand last

    def forward(x: Tensor) -> Tensor:
        return x * scale.to(x.device) if last else x * scale.to(x.device).view(-1, 1, 1)

    return forward


def _outputs(graph: PruningGraph, forwards: dict[nn.Module, Forward], x: Tensor) -> list[Tensor]:
    """The predictors' maps for x when modules do this instead of their own forward."""
    outputs: list[Tensor] = []
    predictors = [graph.model.get_submodule(name) for name in graph.predictors]

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs.append(output)

    hooks = [predictor.register_forward_hook(keep) for predictor in predictors]
    try:
        with replaced(forwards):
            graph.forward(graph.model, x)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


@contextmanager
def replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Within it, modules compute something else; their hooks still run."""
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
