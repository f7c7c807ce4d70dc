"""Kills a real run at random moments, resumes it, and compares it with the run that was not killed.

    python tests/kills.py [--kills 50] [--seed 0] [--method ldt]

A moment is a call of one of `MOMENTS`, over all phases: training, validating, scoring, cutting,
writing a checkpoint, recording, drawing. Every run is a child of this process, which has imported
everything but computed nothing, so that a child begins at once.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from short_runs import rows, tiny

from ldt import experiment
from ldt.callbacks import checkpoint_io
from ldt.detectors.adapter import Detector
from ldt.evaluation import profiling
from ldt.figures import from_runs
from ldt.loop import pruning_round
from ldt.module import DetectorModule
from ldt.pruning.graph import PruningGraph
from ldt.runs import files

MOMENTS: dict[str, tuple[Any, str]] = {
    "training step": (DetectorModule, "training_step"),
    "backward": (DetectorModule, "backward"),
    "validation": (DetectorModule, "validation_step"),
    "counting": (profiling, "count_macs"),
    "tracing": (Detector, "trace"),
    "scoring": (Detector, "features"),
    "choosing": (pruning_round, "select_channels"),
    "cutting": (PruningGraph, "remove"),
    "record of a round": (files, "write_rows"),
    "half a checkpoint": (checkpoint_io.torch, "save"),
    "moving a file": (os, "replace"),
    "summary": (experiment, "write_json"),
    "drawing": (from_runs, "draw_run"),
}


def half_written(content: Any, file: Any) -> None:
    """What a kill in the middle of `torch.save` leaves."""
    import io

    whole = io.BytesIO()
    SAVE(content, whole)
    data = whole.getvalue()
    file.write(data[: len(data) // 2])
    file.flush()


SAVE = torch.save


def counted(moment: str, calls: list[int], kill_at: int | None) -> None:
    """Count the calls of a moment, and die in one of them."""
    owner, name = MOMENTS[moment]
    plain: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == kill_at:
            if moment == "half a checkpoint":
                half_written(*args)
            elif calls[0] % 2:  # before or after
                plain(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)

    setattr(owner, name, call)


def child(work: Callable[[], None]) -> int:
    """Run in a child; its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def reference(config: Any, folder: Path) -> dict[str, int]:
    """The run that is not killed, and how often each moment occurs in it."""
    counts = {moment: [0] for moment in MOMENTS}

    def work() -> None:
        for moment, calls in counts.items():
            counted(moment, calls, None)
        experiment.run(config, folder / "whole")
        lines = [f"{moment}\t{calls[0]}" for moment, calls in counts.items()]
        (folder / "counts").write_text("\n".join(lines))

    assert child(work) == 0, "the run fails without being killed"
    pairs = [line.split("\t") for line in (folder / "counts").read_text().splitlines()]
    return {moment: int(count) for moment, count in pairs if int(count)}


def killed_and_resumed(config: Any, folder: Path, moment: str, at: int) -> None:
    """Die in one call, begin again, and compare."""

    def die() -> None:
        counted(moment, [0], at)
        experiment.run(config, folder)

    assert child(die) == -signal.SIGKILL, "it did not come to the moment"
    assert child(lambda: float(experiment.run(config, folder))) == 0, "it does not resume"  # type: ignore[arg-type, return-value]


def differences(one: Path, two: Path) -> list[str]:
    """What differs between two finished runs: metrics, structure, weights."""
    found = [] if rows(one) == rows(two) else ["rounds"]
    for file in sorted(one.glob("round-*.ckpt")):
        first, second = (torch.load(folder / file.name, weights_only=True) for folder in (one, two))
        if first["ldt"] != second["ldt"]:
            found.append(f"{file.name}: structure")
        weights = first["state_dict"], second["state_dict"]
        if list(weights[0]) != list(weights[1]) or any(
            not torch.equal(weights[0][key], weights[1][key]) for key in weights[0]
        ):
            found.append(f"{file.name}: weights")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="ldt")
    given = parser.parse_args()
    rng = np.random.default_rng(given.seed)
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = tiny(folder, f"method={given.method}", "ldt.memory=2", "ldt.warmup_epochs=0")
        start = time.perf_counter()
        counts = reference(config, folder)
        print(f"not killed: {time.perf_counter() - start:.0f} s")
        moments = [str(m) for m in rng.permutation(list(counts))]
        for number in range(given.kills):
            moment = moments[number % len(moments)]
            at = int(rng.integers(1, counts[moment], endpoint=True))
            again = folder / str(number)
            killed_and_resumed(config, again, moment, at)
            found = differences(folder / "whole", again)
            failures += bool(found)
            outcome = ", ".join(found) or "equal"
            print(f"killed in {moment}, call {at} of {counts[moment]}: {outcome}", flush=True)
    print(f"{given.kills} kills, {failures} with a difference")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
