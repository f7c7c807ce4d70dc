"""What a network costs: parameters, multiply-adds, latency, bytes.

One convention for multiply-adds in the whole project: those of convolutions and matrix products
(one per weight and output position, biases free), plus two per element that passes an affine batch,
group or layer normalisation (one if it has no weight). Activations, pooling, resizing and additions
are free, and a head shared by five scales counts five times. By this rule the paper's Table 4 comes
out (3 classes, 832x1344: ATSS 219.7 G, GFL 223.1 G; YOLOX-S at 640x640: 13.32 G, which the table
doubles to 26.64 G). By fvcore's, five per element of a group normalisation, 219.8 and 223.2 G do.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch
import torchvision  # noqa: F401 - registers the deformable convolution
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldt.runs.provenance import cpu_name

MINIMUM_RUNS = 30


@dataclass(frozen=True)
class Latency:
    """Median, first and last decile of the time of a call, and what they were measured on."""

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
    """Return the multiply-adds of one forward in eval mode, by the convention of this module.

    A model on the device "meta" is counted without computing anything.

    Args:
        model: put into eval mode meanwhile; names the device and type of the input.
        forward: called once with zeros, for example `detector._forward`.
        shape: (N, C, H, W) of the input.

    Raises:
        ValueError: when `shape` does not have four positive sizes.
    """
    return _counted(model, forward, shape).get_total_flops() // 2


def macs_by_module(
    model: nn.Module, forward: Callable[[Tensor], object], shape: tuple[int, int, int, int]
) -> dict[str, int]:
    """Return the same by module name; a module's share holds its children's.

    Modules that compute nothing are left out; "" is the whole model.
    """
    counts = _counted(model, forward, shape).get_flop_counts()
    root = type(model).__name__
    return {
        "" if name == "Global" else name.removeprefix(f"{root}."): sum(found.values()) // 2
        for name, found in counts.items()
    }


def _counted(
    model: nn.Module, forward: Callable[[Tensor], object], shape: tuple[int, int, int, int]
) -> FlopCounterMode:
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"shape={shape}: need four positive sizes (N, C, H, W): (1, 3, 640, 640)")
    tensors = chain(model.parameters(), model.buffers())
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    counter = FlopCounterMode(display=False, custom_mapping=_further_rules())
    # module by module: a detector in training mode may well hold frozen layers in eval mode
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), counter:
            forward(torch.zeros(shape, dtype=like.dtype, device=like.device))
    finally:
        for module, mode in training:
            module.training = mode
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
        forward: one inference; put the model into eval mode before.
        runs: how many calls are timed.
        warmup: how many calls come before, untimed.
        device: where `forward` computes; a CUDA device is waited for before each look at the clock.

    Raises:
        ValueError: when `runs` is below 30 or `warmup` below 1.
    """
    if runs < MINIMUM_RUNS or warmup < 1:
        raise ValueError(
            f"runs={runs}, warmup={warmup}: a latency is the median of at least {MINIMUM_RUNS} "
            f"runs after at least one to warm up; use runs={MINIMUM_RUNS}, warmup=5"
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


def _further_rules() -> dict:
    """Return rules for `FlopCounterMode`, which counts none of these by itself."""
    aten = torch.ops.aten
    rules = dict.fromkeys(
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
    return rules | {aten.native_layer_norm: _layer_norm_flops, deformable: _deformable_flops}


def _deformable_flops(
    _input_shape: torch.Size, weight_shape: torch.Size, *_: object, out_shape: torch.Size
) -> int:
    """As of any convolution: sampling between the pixels is free, as resizing is."""
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
    """Return the time of one call; CUDA works on after a call returns, so it is waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    forward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)
