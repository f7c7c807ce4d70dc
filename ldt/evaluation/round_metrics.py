"""What is measured of every round: size, multiply-adds, latency."""

from collections.abc import Mapping
from typing import Any

from ldt.detectors.forward import eval_with_gradients, raw_forward
from ldt.evaluation import profiling
from ldt.module import DetectorModule


def count_params_and_macs(module: DetectorModule) -> dict[str, int]:
    """Parameters (``params``), and multiply-adds (``macs``) of one image of the input size."""
    shape = (1, 3, module.input_size[0], module.input_size[1])
    return {
        "params": profiling.count_parameters(module.detector),
        "macs": profiling.count_macs(
            module.detector, lambda x: raw_forward(module.detector, x), shape
        ),
    }


def measure_latency(module: DetectorModule, runs: int) -> dict[str, Any]:
    """Median latency of a forward in ms, its deciles, and where it was measured."""
    image = module.example()
    with eval_with_gradients(module.detector):
        found = profiling.latency(
            lambda: raw_forward(module.detector, image), runs=runs, device=image.device
        )
    return {
        "latency_ms": round(found.median_ms, 3),
        "latency_p10_ms": round(found.p10_ms, 3),
        "latency_p90_ms": round(found.p90_ms, 3),
        "threads": found.threads,
        "device": found.device,
    }


def format_round(row: Mapping[str, Any], size: tuple[int, int]) -> str:
    """A round's row as a line of the log; ``size`` is the input's (height, width)."""
    nan = float("nan")
    return (
        f"round {row['round']}: AP {row.get('AP', nan):.3f}, mAP {row.get('mAP', nan):.3f}, "
        f"{row['params'] / 1e6:.2f} M parameters (-{row['params_rate']:.1%}), "
        f"{row['multiply_adds'] / 1e9:.2f} GMACs at {size[0]}x{size[1]} "
        f"(-{row['multiply_adds_rate']:.1%})"
    )
