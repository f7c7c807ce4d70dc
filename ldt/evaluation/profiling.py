"""Cost of a network: parameters, MACs and latency.

The whole project counts MACs (multiply-adds) by one convention: those of convolutions and matrix
products (one per weight and output position, without biases), plus two per element of an affine
batch, group or layer normalisation (one if it has no weight). Activations, pooling, resizing and
additions are not counted, and a head shared by five scales counts five times. This convention
reproduces the paper's Table 4 (3 classes, 832x1344: ATSS 219.7 G, GFL 223.1 G; YOLOX-S at 640x640:
13.32 G, which the table doubles to 26.64 G). With fvcore's, which counts five per element of a
group normalisation, they would be 219.8 and 223.2 G.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch
import torchvision  # noqa: F401 - registers the deformable convolution
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from ldt.runs.provenance import cpu_name

MINIMUM_RUNS = 30
MOST_PASSES, TIMED_SECONDS = 10, 2.0  # of the times of layers


@dataclass(frozen=True)
class Latency:
    """Median, first and last decile of the time of a call, and the hardware."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    threads: int
    device: str


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, trainable or not; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(
    model: nn.Module, forward: Callable[[Tensor], object], shape: tuple[int, int, int, int]
) -> int:
    """Return the MACs of one forward pass in eval mode, by the convention of this module.

    For a model on the device "meta", nothing is computed.

    Args:
        model: is in eval mode during this; determines device and dtype of the input.
        forward: called once with zeros, for example `detector._forward`.
        shape: (N, C, H, W) of the input.

    Raises:
        ValueError: `shape` does not have four positive sizes.
    """
    return _count(model, forward, shape).get_total_flops() // 2


def macs_by_module(
    model: nn.Module, forward: Callable[[Tensor], object], shape: tuple[int, int, int, int]
) -> dict[str, int]:
    """Return the MACs by module name, including those of the module's children.

    Modules without MACs are omitted; "" is the whole model.
    """
    counts = _count(model, forward, shape).get_flop_counts()
    root = type(model).__name__
    return {
        "" if name == "Global" else name.removeprefix(f"{root}."): sum(by_operator.values()) // 2
        for name, by_operator in counts.items()
    }


def _count(
    model: nn.Module, forward: Callable[[Tensor], object], shape: tuple[int, int, int, int]
) -> FlopCounterMode:
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(
            f"shape={shape} must have four positive sizes (N, C, H, W), e.g. (1, 3, 640, 640)"
        )
    tensors = chain(model.parameters(), model.buffers())
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    counter = FlopCounterMode(display=False, custom_mapping=_additional_formulas())
    # per module: a detector in training mode may have frozen layers in eval mode
    training = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)  # the counter fails at views of parameters with gradients
    try:
        with torch.no_grad(), counter:
            forward(torch.zeros(shape, dtype=like.dtype, device=like.device))
    finally:
        for module, mode in training:
            module.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)
    return counter


def latency(
    forward: Callable[[], object],
    *,
    runs: int = MINIMUM_RUNS,
    warmup: int = 5,
    device: torch.device | str,
) -> Latency:
    """Time `forward` under `torch.inference_mode`.

    Args:
        forward: one inference; the model must be in eval mode.
        runs: number of timed calls.
        warmup: number of untimed calls before.
        device: device of `forward`; CUDA is synchronised before each time measurement.

    Raises:
        ValueError: `runs` is below 30 or `warmup` below 1.
    """
    if runs < MINIMUM_RUNS or warmup < 1:
        raise ValueError(
            f"runs={runs}, warmup={warmup}: the latency is the median of at least {MINIMUM_RUNS} "
            f"runs after at least one for warm-up; use runs={MINIMUM_RUNS}, warmup=5"
        )
    device = torch.device(device)
    with torch.inference_mode():
        for _ in range(warmup):
            forward()
        times = [_milliseconds(forward, device) for _ in range(runs)]
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Latency(
        median_ms=statistics.median(times),
        p10_ms=deciles[0],
        p90_ms=deciles[-1],
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
    )


def latency_by_module(
    model: nn.Module, forward: Callable[[Tensor], object], shape: tuple[int, int, int, int]
) -> dict[str, float]:
    """Return the time in ms inside each module with parameters of its own, by name.

    Each is the median over some passes in eval mode of the sum over a module's calls. What a module
    waits for, such as memory of the one before, is not told apart: the times are a rough guide.
    """
    tensors = chain(model.parameters(), model.buffers())
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    image = torch.zeros(shape, dtype=like.dtype, device=like.device)
    passes: list[dict[str, float]] = []
    training = [(module, module.training) for module in model.modules()]
    hooks = []
    model.eval()
    try:
        for name, module in model.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                hooks += _timing_hooks(module, name, passes, image.device)
        end = time.perf_counter() + TIMED_SECONDS
        with torch.inference_mode():
            while len(passes) <= MOST_PASSES and (len(passes) < 2 or time.perf_counter() < end):
                passes.append(defaultdict(float))
                forward(image)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training:
            module.training = mode
    timed = passes[1:]  # the first one warms up
    return {name: statistics.median(one[name] for one in timed) for name in timed[0]}


def _timing_hooks(
    module: nn.Module, name: str, passes: list[dict[str, float]], device: torch.device
) -> list[RemovableHandle]:
    """Add the time of each call of a module to the last pass."""
    started: list[float] = []

    def begin(*_: object) -> None:
        started.append(_now(device))

    def end(*_: object) -> None:
        passes[-1][name] += 1000 * (_now(device) - started.pop())

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]


def _now(device: torch.device) -> float:
    """Return the time in seconds, with synchronisation of CUDA, which is asynchronous."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _additional_formulas() -> dict:
    """Return formulas for operators that `FlopCounterMode` does not count by itself."""
    aten = torch.ops.aten
    formulas = dict.fromkeys(
        (
            aten.native_batch_norm,
            aten.cudnn_batch_norm,
            aten.miopen_batch_norm,
            aten._native_batch_norm_legit_no_training,
            aten.native_group_norm,
        ),
        _norm_flops,
    )
    deformable = torch.ops.torchvision.deform_conv2d
    return formulas | {aten.native_layer_norm: _layer_norm_flops, deformable: _deformable_flops}


def _deformable_flops(
    _input_shape: torch.Size, weight_shape: torch.Size, *_: object, out_shape: torch.Size
) -> int:
    """Count as for any convolution; interpolation is not counted, as in resizing."""
    return 2 * out_shape[0] * prod(out_shape[2:]) * prod(weight_shape)


def _norm_flops(
    input_shape: torch.Size, weight_shape: object, *_: object, out_shape: object
) -> int:
    return 2 * prod(input_shape) * (1 if weight_shape is None else 2)


def _layer_norm_flops(
    input_shape: torch.Size,
    _normalised: object,
    weight_shape: object,
    *_: object,
    out_shape: object,
) -> int:
    return _norm_flops(input_shape, weight_shape, out_shape=out_shape)


def _milliseconds(forward: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call."""
    start = _now(device)
    forward()
    return 1000 * (_now(device) - start)
