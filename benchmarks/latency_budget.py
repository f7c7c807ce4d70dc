"""What a latency budget gains: realised over ideal speed-up, asked and measured latency, widths.

    python benchmarks/latency_budget.py [--detectors gfl_tiny yolox_nano] [--runs 15]

Weights are random and ranked by l1: what counts is the structure. Backbone, neck and head are cut.
*ideal* is the ratio of multiply-adds, *realised* that of the latencies (raw maps, one thread, CPU
time of the process). All networks of a detector are timed in one run, in turns, after the cuts; the
base is one of them. Tables of layers' times come from the cache folder, or are measured first.
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from typing import NamedTuple

import torch
from latency import SCOPE, built

from ldt.config import register
from ldt.criteria.methods import find_method
from ldt.detectors.adapter import Detector
from ldt.detectors.models import quiet
from ldt.evaluation.round_metrics import count_params_and_macs
from ldt.loop.pruning_round import Unpruned, check_schedule, latency_table, prune_round
from ldt.loop.schedule import PruningSchedule, default_round_to
from ldt.pruning.budget import Limits, UnreachableRateError
from ldt.runs.provenance import environment
from ldt.runtimes.latency_table import LatencyTarget
from ldt.runtimes.timing import Runtime, RuntimeName, time_in_turns

SIZES = {  # input (height, width)
    "gfl_tiny": (128, 256),
    "atss_tiny": (128, 256),
    "yolof_tiny": (128, 256),
    "yolox_nano": (416, 416),
    "yolox_s": (640, 640),
    "gfl": (416, 672),
}
PER_COST = "global_per_cost"


class Cut(NamedTuple):
    """How a detector is pruned.

    Attributes:
        budget, rate, ranking: of the schedule.
        round_to: what widths are multiples of.
        runtime: where the latency is measured.
    """

    budget: str
    rate: float
    ranking: str
    round_to: int
    runtime: RuntimeName


class Result(NamedTuple):
    """Shares of the base that are left, and what the table predicted for the latency."""

    macs: float
    latency: float
    predicted: float | None


def pruned(base: Detector, cut: Cut) -> tuple[Detector, float | None]:
    """Return a pruned copy of a detector, and the share of the latency that was predicted."""
    detector = deepcopy(base)
    schedule = PruningSchedule.one_shot(
        cut.rate,
        budget=cut.budget,
        ranking=cut.ranking,
        scope=SCOPE,
        limits=Limits(round_to=cut.round_to),
        latency=LatencyTarget(cut.runtime),
    )
    unpruned = Unpruned.of(detector, latency_table(schedule, torch.device("cpu")))
    check_schedule(detector, schedule, unpruned)
    criterion = find_method("l1").criterion
    record = prune_round(detector, criterion, [], schedule, 1, unpruned)
    if not record.latency:
        return detector, None
    return detector, record.latency["predicted_ms"] / unpruned.costs["latency"]


def measured(base: Detector, cuts: Sequence[Cut], runs: int) -> dict[Cut, Result]:
    """Prune a detector in several ways and time all of them with the base, in turns."""
    found: dict[Cut, tuple[Detector, float | None]] = {}
    for cut in cuts:
        try:
            found[cut] = pruned(base, cut)
        except UnreachableRateError as error:
            print(f"{cut}: {error}")
    macs = {cut: count_params_and_macs(each)["macs"] for cut, (each, _) in found.items()}
    whole = count_params_and_macs(base)["macs"]
    results: dict[Cut, Result] = {}
    names: list[RuntimeName] = [*dict.fromkeys(cut.runtime for cut in found)]
    for name in names:
        with ExitStack() as stack:
            runtime = Runtime(name)
            own = {cut: each for cut, (each, _) in found.items() if cut.runtime == name}
            networks = {c: stack.enter_context(runtime.opened(each)) for c, each in own.items()}
            timings = time_in_turns(
                {None: stack.enter_context(runtime.opened(base)), **networks}, runs
            )
        before = timings[None].cpu_ms
        for cut in own:
            left = timings[cut].cpu_ms / before
            results[cut] = Result(macs[cut] / whole, left, found[cut][1])
    return results


def efficiency(results: dict[Cut, Result]) -> list[str]:
    """Format realised and ideal speed-up of each cut."""
    return [
        f"{cut.runtime} | {cut.budget} {cut.rate:.0%}, {cut.ranking} | {cut.round_to or '-'} | "
        f"{1 / each.macs:.2f} | {1 / each.latency:.2f} | {each.macs / each.latency:.2f}"
        for cut, each in results.items()
    ]


def targets(results: dict[Cut, Result]) -> list[str]:
    """Format asked, predicted and measured latency, in shares of the base."""
    return [
        f"{cut.runtime} | {1 - cut.rate:.3f} | {each.predicted:.3f} | {each.latency:.3f} | "
        f"{each.latency / (1 - cut.rate) - 1:+.1%}"
        for cut, each in results.items()
        if each.predicted is not None
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ["gfl_tiny", "yolox_nano"]
    parser.add_argument("--detectors", nargs="+", choices=SIZES, default=names)
    runtimes = ["onnxruntime", "openvino"]
    parser.add_argument("--runtimes", nargs="+", default=runtimes)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.5, 0.7], help="of the MACs")
    help_ = "of the latency: with widths in steps of 16, narrow detectors reach little more"
    parser.add_argument("--latency-rates", nargs="+", type=float, default=[0.3, 0.45], help=help_)
    parser.add_argument("--runs", type=int, default=15, help="timed calls of each network")
    parser.add_argument("--widths", action="store_true", help="only compare multiples of widths")
    given = parser.parse_args()
    quiet()
    register()
    about = environment()
    print(f"{about['cpu']}, one thread, torch {about['torch']}, medians of {given.runs} calls")
    for name in given.detectors:
        torch.manual_seed(0)
        base = built(name, SIZES[name]).adapter
        cuts = [
            cut
            for runtime in given.runtimes
            for cut in (
                _widths(given.rates, runtime)
                if given.widths
                else _cuts(given.rates, given.latency_rates, runtime)
            )
        ]
        results = measured(base, cuts, given.runs)
        print("\n| detector | runtime | removed | widths | ideal | realised | realised / ideal |")
        print("|---|---|---|---|---|---|---|")
        print("\n".join(f"| {name} | {line} |" for line in efficiency(results)), flush=True)
        if lines := targets(results):
            print("\n| detector | runtime | asked | predicted | measured | off by |")
            print("|---|---|---|---|---|---|")
            print("\n".join(f"| {name} | {line} |" for line in lines), flush=True)


def _cuts(
    rates: Sequence[float], latency_rates: Sequence[float], runtime: RuntimeName
) -> list[Cut]:
    multiple = default_round_to("latency")
    without = [Cut("macs", r, how, 0, runtime) for r in rates for how in ("uniform", PER_COST)]
    return [*without, *(Cut("latency", r, PER_COST, multiple, runtime) for r in latency_rates)]


def _widths(rates: Sequence[float], runtime: RuntimeName) -> list[Cut]:
    return [Cut("macs", rate, "uniform", each, runtime) for rate in rates for each in (0, 8, 16)]


if __name__ == "__main__":
    main()
