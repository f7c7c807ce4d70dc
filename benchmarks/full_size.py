"""The paper's experiments at full size, on few real images: does every job go through?

    python benchmarks/full_size.py /data [--detectors gfl] [--experiments fig3_kitti]

/data holds `coco` and `kitti` in their usual layouts. Each job of `table1_coco` and `fig3_kitti` is
the real one (full-size detector with random weights, the experiment's data set, budget and rounds,
the paper's recipe), but takes two steps of two images in every epoch, one epoch in every phase, and
few images to score, to validate and to re-estimate batch norms. It trains, cuts, retrains and
evaluates in a process of its own; methods of an experiment share the base of their detector. A row
of the table has the seconds and the peak memory, without those of the shared base, the share of the
budget that is gone and the average precision, or the phase that failed and why.
"""

import argparse
import contextlib
import io
import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import ldt
from ldt.pruning.budget import TOLERANCE
from ldt.runs import files

DETECTORS = ("gfl", "atss", "yolox_s", "yolof")
METHODS = {  # of each experiment, with what shortens them
    "none": (),
    "hrank": (),
    "group_fisher": ("method.inner_rounds=2",),
    "group_fisher_gradual": ("method.gradual.interval=1", "method.gradual.channels=2000"),
    "chip": (),
    "px": ("method.inner_rounds=2",),
    "ldt": ("ldt=paper", "ldt.warmup_epochs=0"),  # `auto` takes more steps to estimate weights
}
EXPERIMENTS = {  # their data set, a rate of theirs and the method they have in another form
    "table1_coco": ("coco", 0.25, "group_fisher"),
    "fig3_kitti": ("kitti", 0.7, "group_fisher_gradual"),
}
FEW = (
    "detector.pretrained=false",
    "recipe.epochs=1",
    "recipe.retrain_epochs=1",
    "recipe.batch_size=2",
    "prune.images=4",
    "prune.batch_size=2",
    "dataset.workers=0",
    "dataset.val_batch_size=2",
    "trainer=cpu",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=2",
    "report.latency_runs=0",
    "report.pictures=0",
)


def job(experiment: str, detector: str, method: str, data: Path, scale: Sequence[int]) -> list[str]:
    """Return the overrides of a job."""
    dataset, rate, _ = EXPERIMENTS[experiment]
    named = [f"experiment={experiment}", f"detector={detector}", f"method={method}"]
    size = [f"dataset.scale=[{','.join(map(str, scale))}]"] if scale else []
    more = [f"prune.rate={rate}", f"dataset.root={data / dataset}"]
    return [*named, *more, *FEW, *METHODS[method], *size]


def gigabytes() -> float:
    """Peak resident memory of the process, in GiB."""
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def phase(folder: Path) -> str:
    """Return the phase in which an unfinished run has ended."""
    rounds = len(list(folder.glob("round-*.ckpt")))
    if not rounds:
        return "train"
    return "retrain, evaluate" if (folder / files.scores(rounds)).exists() else "cut"


def outcome(overrides: Sequence[str], folder: Path) -> str:
    """Run a job; return the rest of its row: memory, achieved rate, AP, and how it ended."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run = ldt.train(*overrides, folder=folder)
        last, plan = run.rounds.iloc[-1], run.summary["plan"]
        wanted = plan["rate"] if plan["rounds"] else 0.0
        if abs(last["rate"] - wanted) > TOLERANCE:
            raise RuntimeError(f"{last['rate']:.1%} of the {plan['budget']} are gone")
        if not math.isfinite(last["AP"]):
            raise RuntimeError(f"AP is {last['AP']}")
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return f"{gigabytes():.1f} | | | {phase(folder)}: {type(error).__name__}: {reason}"
    return f"{gigabytes():.1f} | {last['rate']:.1%} | {last['AP']:.3f} | ok"


def apart(overrides: Sequence[str], folder: Path) -> str:
    """Run a job in a process of its own; return its row from the seconds on."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ldt.experiment", "ldt.criteria.ldt"])
    start = time.monotonic()
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            found = pool.submit(outcome, overrides, folder).result()
        except BrokenProcessPool:  # killed, for example for its memory
            found = f" | | | {phase(folder)}: the process died"
    return f"{time.monotonic() - start:.0f} | {found}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with coco and kitti")
    parser.add_argument("--detectors", nargs="+", default=DETECTORS, choices=DETECTORS)
    parser.add_argument("--experiments", nargs="+", default=EXPERIMENTS, choices=EXPERIMENTS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument(
        "--scale", nargs=2, type=int, default=(), help="width and height; default: the experiment's"
    )
    given = parser.parse_args()
    print("| experiment | detector | method | seconds | GiB | gone | AP | outcome |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as study:
        for experiment in given.experiments:
            for detector in given.detectors:
                for method in given.methods:
                    if method == EXPERIMENTS[experiment][2]:
                        continue
                    overrides = job(experiment, detector, method, given.data, given.scale)
                    name = f"{experiment}-{detector}-{method}"
                    row = apart(overrides, Path(study) / name)
                    print(f"| {experiment} | {detector} | {method} | {row} |", flush=True)


if __name__ == "__main__":
    main()
