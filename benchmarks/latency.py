"""CPU latency ratio (base over pruned) of the paper's full-size detectors, compared with Table 4.

    python benchmarks/latency.py [--detectors gfl atss] [--runs 30] [--divide 1]

Weights are random: what counts is the structure. 70 % of the parameters go (YOLOX-S: 75 %), of
backbone, neck and head, ranked by l1 with the same share from each layer, which removes at least
the multiply-adds that the table reports. "ideal" is the ratio of multiply-adds: the latency ratio
of a machine whose time goes by these alone. Only the network is timed, as in the table; without
decoding and suppression. A measurement needs a machine that does nothing else.
"""

import argparse
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn
from torch_pruning.pruner.importance import GroupMagnitudeImportance

from ldt.config import register
from ldt.criteria.base import score_groups
from ldt.detectors.forward import eval_with_gradients, raw_forward
from ldt.detectors.models import model_config, quiet
from ldt.evaluation.profiling import (
    MINIMUM_RUNS,
    count_macs,
    count_parameters,
    latency,
)
from ldt.module import DetectorModule
from ldt.pruning.budget import TOLERANCE, select_channels
from ldt.pruning.costs import CostModel
from ldt.runs.provenance import environment

CONF = str(Path(__file__).parents[1] / "conf")
CLASSES = ("Car", "Pedestrian", "Cyclist")
SCOPE = ("backbone", "neck", "bbox_head")


class Case(NamedTuple):
    """Input (height, width), share of the parameters that goes, and what Table 4 has."""

    size: tuple[int, int]
    rate: float
    ratio: float | None  # latency, base over pruned
    ideal: float | None  # FLOPs, base over pruned


CASES = {
    "gfl": Case((832, 1344), 0.70, 1.53, 222.94 / 113.25),
    "atss": Case((832, 1344), 0.70, 1.57, 219.56 / 128.28),
    "yolox_s": Case((640, 640), 0.75, 1.52, 26.65 / 10.10),
    "yolof": Case((832, 1344), 0.70, None, None),
}


def built(name: str, size: tuple[int, int] = (128, 128)) -> DetectorModule:
    """Build the paper's detector with random weights, in eval mode."""
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("config", overrides=[f"detector={name}", "run_name=latency"])
    detector: Any = OmegaConf.to_container(config.detector, resolve=True)
    recipe: Any = OmegaConf.to_container(config.recipe, resolve=True)
    model = model_config(detector["config"], detector["options"], len(CLASSES), pretrained=False)
    return DetectorModule(model, CLASSES, recipe, size).eval()


def prune(module: DetectorModule, rate: float) -> None:
    """Remove a share of all parameters."""
    whole = count_parameters(module.detector)
    with eval_with_gradients(module.detector):
        graph = module.adapter.trace(SCOPE)
        scores = score_groups(GroupMagnitudeImportance(p=1), module.adapter, graph, [])
        rule: Any = {"costs": CostModel(graph, "params"), "tolerance": TOLERANCE * whole}
        graph.remove(select_channels(graph, scores, save=rate * whole, ranking="uniform", **rule))


class Cost(NamedTuple):
    parameters: int
    multiply_adds: int
    milliseconds: float


def cost(detector: nn.Module, size: tuple[int, int], runs: int) -> Cost:
    """Measure the cost of a forward pass of one image."""
    image, empty = torch.rand(1, 3, *size), deepcopy(detector).to("meta")
    work = count_macs(empty, lambda x: raw_forward(empty, x), (1, 3, *size))
    time = latency(lambda: raw_forward(detector, image), runs=runs, device="cpu")
    return Cost(count_parameters(detector), work, time.median_ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--detectors", nargs="+", choices=CASES, default=list(CASES))
    help_ = f"forwards that are timed, at least {MINIMUM_RUNS}"
    parser.add_argument("--runs", type=int, default=MINIMUM_RUNS, help=help_)
    help_ = "divides the input's sides, to try this script quickly; 1 is the paper's input"
    parser.add_argument("--divide", type=int, choices=(1, 2, 4), default=1, help=help_)
    given = parser.parse_args()
    quiet()
    register()
    about = environment()
    print(f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, batch 1")
    print(
        "detector      input   parameters   multiply-adds      latency (ms)  ratio  ideal  Table 4"
    )
    for name in given.detectors:
        torch.manual_seed(0)
        case, module = CASES[name], built(name)
        size = (case.size[0] // given.divide, case.size[1] // given.divide)
        base = cost(module.detector, size, given.runs)
        prune(module, case.rate)
        cut = cost(module.detector, size, given.runs)
        print(row(name, case, size, base, cut), flush=True)


def row(name: str, case: Case, size: tuple[int, int], base: Cost, cut: Cost) -> str:
    """Format a detector's line of the table."""
    parameters = f"{base.parameters / 1e6:5.2f} > {cut.parameters / 1e6:5.2f} M"
    work = f"{base.multiply_adds / 1e9:6.2f} > {cut.multiply_adds / 1e9:6.2f} G"
    time = f"{base.milliseconds:7.1f} > {cut.milliseconds:7.1f}"
    ratio, ideal = base.milliseconds / cut.milliseconds, base.multiply_adds / cut.multiply_adds
    table = f"{case.ratio} (ideal {case.ideal:.2f})" if case.ratio and case.ideal else "-"
    where = f"{size[0]}x{size[1]}"
    return f"{name:9s} {where:>9s} {parameters} {work} {time}  {ratio:5.2f}  {ideal:5.2f}  {table}"


if __name__ == "__main__":
    main()
