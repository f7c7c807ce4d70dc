"""Metrics of every round: parameters, MACs and latency."""

from collections.abc import Mapping
from typing import Any

from ldt.detectors.adapter import Detector
from ldt.detectors.forward import eval_with_gradients
from ldt.evaluation import profiling

RATES = ("params_rate", "multiply_adds_rate")


def count_params_and_macs(detector: Detector) -> dict[str, int]:
    """Return the parameters (``params``) and the MACs (``macs``) of one image of the input size."""
    shape = (1, 3, *detector.input_size)
    return {
        "params": profiling.count_parameters(detector.model),
        "macs": profiling.count_macs(detector.model, detector.raw_maps, shape),
    }


def measure_latency(detector: Detector, runs: int) -> dict[str, Any]:
    """Return the median latency of a forward in ms, its deciles, and the hardware."""
    image = detector.example()
    with eval_with_gradients(detector.model):
        latency = profiling.latency(
            lambda: detector.raw_maps(image), runs=runs, device=image.device
        )
    return {
        "latency_ms": round(latency.median_ms, 3),
        "latency_p10_ms": round(latency.p10_ms, 3),
        "latency_p90_ms": round(latency.p90_ms, 3),
        "threads": latency.threads,
        "device": latency.device,
    }


def format_round(row: Mapping[str, Any], size: tuple[int, int]) -> str:
    """Format a round's row for the log; ``size`` is the input's (height, width)."""
    nan = float("nan")
    name = f"round {row['round']}" if row["round"] else "base"
    params, macs = (f" (-{row[key]:.1%})" * (row["round"] > 0) for key in RATES)
    return (
        f"{name}: AP {row.get('AP', nan):.3f}, mAP {row.get('mAP', nan):.3f}, "
        f"{row['params'] / 1e6:.3f} M parameters{params}, "
        f"{row['multiply_adds'] / 1e9:.3f} G MACs at {size[0]}x{size[1]}{macs}"
    )


def format_cut(
    before: Mapping[str, int],
    after: Mapping[str, int],
    row: Mapping[str, Any],
    counts: Mapping[str, float],
) -> str:
    """Format what a cut has removed, for the log.

    Args:
        before: output channels of each layer before the cut.
        after: the same after it.
        row: the row of the round before.
        counts: parameters and MACs after the cut.
    """
    narrower = sum(width < before[name] for name, width in after.items())
    params, macs = counts["params"] / row["params"], counts["macs"] / row["multiply_adds"]
    return (
        f"{narrower} of {len(before)} layers have fewer channels, {sum(before.values()):,} -> "
        f"{sum(after.values()):,} in all; parameters {row['params'] / 1e6:.3f} M -> "
        f"{counts['params'] / 1e6:.3f} M ({params - 1:+.1%}), MACs "
        f"{row['multiply_adds'] / 1e9:.3f} G -> {counts['macs'] / 1e9:.3f} G ({macs - 1:+.1%})"
    )
