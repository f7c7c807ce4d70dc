"""What a GPU is needed for: overhead of LDT, throughput, and latency of base and pruned detectors.

    python benchmarks/gpu.py [--detectors gfl atss] [--write gpu.md]
    python benchmarks/gpu.py --device cpu --detectors gfl_tiny --divide 4 --runs 30 --eager

Prints a table in markdown; what was not measured is an empty cell. Steps with and without LDT
alternate, as do the epochs of this loop and of mmengine's Runner. Detectors are pruned as in
latency.py, whose rates and inputs they have; a latency is the median of the runs after a warm-up,
one image, the network alone. A measurement needs a GPU that does nothing else: name its power mode.
"""

import argparse
import os
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TypeVar

import lightning as L
import torch
from latency import CASES, Case, built, prune
from ldt_overhead import Step, batch
from loop import now, throughput
from torch import nn

from ldt.callbacks.ldt_loss import LDTLoss
from ldt.config import register
from ldt.detectors.forward import raw_forward
from ldt.detectors.models import quiet
from ldt.evaluation.profiling import MINIMUM_RUNS, latency
from ldt.runs.provenance import environment

SMALL = Case((256, 512), 0.5, None, None)  # of detectors that are not in the paper
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}
STEPS = [f"{kind} {what}" for kind in ("fp32", "bf16") for what in ("step", "with LDT", "ratio")]
LOOPS = ["images/s", "Runner's", "ratio"]
KINDS = [f"{precision} {how}" for precision in PRECISIONS for how in ("eager", "compiled")]
QUERY = "name,driver_version,power.limit,power.draw,clocks.sm,clocks.mem,clocks.max.sm"

Cells = dict[str, str]
T = TypeVar("T")


def overhead(name: str, case: Case, given: argparse.Namespace) -> Cells:
    """Milliseconds of a training step with and without LDT, and their ratio."""
    module = built(name, case.size).train().to(given.device)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    term = LDTLoss(alpha=5e-4, beta=7.5, warmup_epochs=0)
    module.trainer = trainer
    term.setup(trainer, module, "fit")
    term.weights.steps_left = 0  # the shares are measured in few steps of an epoch
    step, data, cells = Step(module, term), batch(given.batch, case.size), {}
    for kind in ("fp32", "bf16"):
        half = torch.autocast(given.device, torch.bfloat16) if kind == "bf16" else nullcontext()
        times: dict[bool, list[float]] = {False: [], True: []}
        for index in range(given.steps + 1):
            for with_ldt, found in times.items():
                start = now()
                with half:
                    step(data, with_ldt)
                if index:  # the first is the warm-up
                    found.append(1000 * (now() - start))
        without, with_ = (statistics.median(found) for found in times.values())
        values = (f"{without:.1f}", f"{with_:.1f}", f"{with_ / without:.3f}")
        cells |= zip((f"{kind} step", f"{kind} with LDT", f"{kind} ratio"), values, strict=True)
    return cells


def loops(name: str, given: argparse.Namespace) -> Cells:
    """Images per second of this training loop and of mmengine's Runner, and their ratio."""
    trainer = "cpu" if given.device == "cpu" else "gpu"
    options = [f"detector={name}", f"trainer={trainer}", f"recipe.batch_size={given.batch}"]
    options.append("detector.pretrained=false")  # nothing is downloaded; the time is the same
    if given.train:
        options += [f"dataset.train={given.train}", "dataset.val=4"]
    ours, theirs = throughput([*options, "dataset.workers=auto"], given.epochs)
    values = (f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.3f}")
    return dict(zip(LOOPS, values, strict=True))


def latencies(name: str, case: Case, given: argparse.Namespace) -> list[tuple[str, Cells]]:
    """Milliseconds of a forward pass: of the base, of the pruned detector, and their ratio."""
    module = built(name).to(given.device)
    base = _each_kind(module.detector, case.size, given)
    prune(module, case.rate)
    cut = _each_kind(module.detector, case.size, given)
    return [
        ("base", {kind: f"{value:.2f}" for kind, value in base.items()}),
        ("pruned", {kind: f"{value:.2f}" for kind, value in cut.items()}),
        ("ratio", {kind: f"{base[kind] / cut[kind]:.2f}" for kind in base.keys() & cut.keys()}),
    ]


def _each_kind(
    detector: nn.Module, size: tuple[int, int], given: argparse.Namespace
) -> dict[str, float]:
    found = {}
    for precision, dtype in PRECISIONS.items():
        for how in ("eager",) if given.eager else ("eager", "compiled"):
            network = deepcopy(detector).to(dtype)
            if how == "compiled":
                torch.compiler.reset()
                for part in network.children():
                    part.forward = torch.compile(part.forward)
            image = torch.rand(1, 3, *size, device=given.device, dtype=dtype)
            try:
                forward = _forward_of(network, image)
                time = latency(forward, runs=given.runs, warmup=10, device=given.device)
                found[f"{precision} {how}"] = time.median_ms
            except RuntimeError as error:  # no such kernel, no compiler
                print(f"{precision} {how}: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


def _forward_of(network: nn.Module, image: torch.Tensor) -> Callable[[], object]:
    return lambda: raw_forward(network, image)


def table(columns: Sequence[str], rows: Sequence[tuple[str, Cells]]) -> str:
    """Format rows as a table in markdown; a missing cell is empty."""
    lines = [f"| detector | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in rows:
        lines.append(f"| {name} | {' | '.join(cells.get(key, '') for key in columns)} |")
    return "\n".join(lines)


def about_gpu() -> str:
    """Return what nvidia-smi says of the GPU, its power limit and its clocks; else nothing."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    pairs = zip(QUERY.split(","), said.splitlines()[0].split(", "), strict=False)
    return ", ".join(f"{key} {value}" for key, value in pairs)


def tried(measure: Callable[[], T], missing: T) -> T:
    """Return a measurement, or what stands for it after an error: the others are not lost."""
    try:
        return measure()
    except Exception:
        traceback.print_exc()
        return missing


def report(given: argparse.Namespace) -> str:
    """Measure, and return the tables."""
    steps: list[tuple[str, Cells]] = []
    speeds: list[tuple[str, Cells]] = []
    times: list[tuple[str, Cells]] = []
    for name in dict.fromkeys([*given.detectors, *CASES]):
        case = CASES.get(name, SMALL)
        case = case._replace(size=tuple(side // given.divide for side in case.size))
        wanted = name in given.detectors
        torch.manual_seed(0)
        missing: list[tuple[str, Cells]] = [(part, {}) for part in ("base", "pruned", "ratio")]
        steps.append((name, tried(partial(overhead, name, case, given), {}) if wanted else {}))
        speeds.append((name, tried(partial(loops, name, given), {}) if wanted else {}))
        parts = tried(partial(latencies, name, case, given), missing) if wanted else missing
        times += [(f"{name} {part}", cells) for part, cells in parts]
    facts = environment()
    where = about_gpu() if given.device == "cuda" else f"{facts['cpu']}, {facts['threads']} threads"
    return "\n\n".join(
        [
            f"{where or facts['gpus']}, torch {facts['torch']}, batch {given.batch}",
            f"Training step (ms):\n\n{table(STEPS, steps)}",
            f"Training loop:\n\n{table(LOOPS, speeds)}",
            f"Latency (ms), median of {given.runs}:\n\n{table(KINDS, times)}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 2 if there is no GPU and no other device is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--detectors", nargs="+", default=list(CASES))
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, default=2, help="images of a training step")
    parser.add_argument("--steps", type=int, default=20, help="training steps that are timed")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each loop")
    help_ = f"forwards that are timed, at least {MINIMUM_RUNS}"
    parser.add_argument("--runs", type=int, default=100, help=help_)
    help_ = "divides the input's sides, to try this script quickly; 1 is the paper's input"
    parser.add_argument("--divide", type=int, choices=(1, 2, 4), default=1, help=help_)
    parser.add_argument("--eager", action="store_true", help="leave out torch.compile")
    parser.add_argument("--train", type=int, help="training images of the loops")
    parser.add_argument("--write", type=Path, help="file for the tables, beside the terminal")
    given = parser.parse_args(arguments)
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # mmengine's Runner would take the GPU
    if given.device is None:
        given.device = "cuda" if torch.cuda.is_available() else None
    if given.device is None or (given.device == "cuda" and not torch.cuda.is_available()):
        print("no GPU is at hand; to try this script type --device cpu", file=sys.stderr)
        return 2
    quiet()
    register()
    text = report(given)
    print(text)
    if given.write:
        given.write.write_text(f"{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
