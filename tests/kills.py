"""Kills a real run at random moments, resumes it, and compares it with the run that was not killed.

    python tests/kills.py [--kills 50] [--seed 0] [--method ldt] [--wandb] [--shared]

A moment is a call of one of `MOMENTS`, over all phases: generating the data, training, validating,
scoring, cutting, writing a checkpoint, recording, drawing, writing W&B's files (offline). With
`--shared` a second job waits for the base that the killed one trains. Every run is a child of this
process, which has imported everything but computed nothing, so that a child begins at once.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from short_runs import DRAWN, rows, tiny

from ldt import experiment
from ldt.callbacks import checkpoint_io, wandb_logger
from ldt.data import roadscenes_generator
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
    "a picture": (from_runs, "save"),
    "generating": (roadscenes_generator, "_save"),
    "beginning a W&B run": (wandb_logger, "_begin"),
    "logging to W&B": (wandb_logger.WandbRun, "log_metrics"),
    "W&B's result": (wandb_logger.WandbRun, "_log_result"),
}

DRAWING = ("drawing", "a picture", "moving a file")  # calls of these occur in figures


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


def child(work: Callable[[], object]) -> int:
    """Run in a child; its exit code, negative for a signal."""
    return ended(begun(work))


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def begun(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def reference(configs: dict[str, Any], study: Path) -> dict[str, int]:
    """The jobs of a study that are not killed; how often each moment occurs in the first one."""
    drawn = calls_in(configs["one"], study)
    found = calls_in(plain(configs["one"]), study.with_name("plain"))
    for name in [name for name in configs if name != "one"]:
        assert child(partial(run, configs[name], study, name)) == 0, "it fails without being killed"
    counts = {moment: (drawn if moment in DRAWING else found)[moment] for moment in MOMENTS}
    return {moment: count for moment, count in counts.items() if count}


def calls_in(config: Any, study: Path) -> dict[str, int]:
    """Run a job to its end; how often each moment occurs in it."""
    counts = {moment: [0] for moment in MOMENTS}
    file = study.with_suffix(".counts")

    def work() -> None:
        for moment, calls in counts.items():
            counted(moment, calls, None)
        run(config, study, "one")
        file.write_text(json.dumps({moment: calls[0] for moment, calls in counts.items()}))

    assert child(work) == 0, "it fails without being killed"
    return json.loads(file.read_text())


def run(config: Any, study: Path, name: str) -> None:
    """Run a job, with a cache of the study's own."""
    own = config.copy()
    own.dataset.cache = str(study.with_suffix(".cache"))
    experiment.run(own, study / name)


def killed_and_resumed(given: dict[str, Any], study: Path, moment: str, at: int) -> None:
    """Die in one call of the first job, while others wait for its base, and begin it again.

    Figures take more time than all else: they are left out where nothing of them is killed.
    """
    configs = given if moment in DRAWING else {name: plain(job) for name, job in given.items()}

    def die() -> None:
        counted(moment, [0], at)
        run(configs["one"], study, "one")

    first = begun(die)
    others = [name for name in configs if name != "one"]
    while others and not list(study.glob("base-*/.lock")):
        time.sleep(0.01)
    waiting = [begun(partial(run, configs[name], study, name)) for name in others]
    assert ended(first) == -signal.SIGKILL, "it did not come to the moment"
    assert [ended(pid) for pid in waiting] == [0] * len(waiting), "the others do not go on"
    assert child(partial(run, configs["one"], study, "one")) == 0, "it does not resume"
    left = [file.name for file in study.rglob(f"{files.DRAFT}*")]
    left += [file.name for file in study.with_suffix(".cache").glob(".roadscenes*-*-*[!k]")]
    assert left == [], f"drafts are left: {left}"


def plain(config: Any) -> Any:
    """The same job without figures."""
    job = config.copy()
    job.report.figures = False
    return job


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


def configurations(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The jobs of a study: the one that is killed first."""
    options = [
        f"method={given.method}",
        "ldt.memory=2",
        "ldt.warmup_epochs=0",
        "prune.rounds=2",
        "method.inner_rounds=2",
        "report.before_retraining=true",
        *DRAWN,
    ]
    if given.wandb:
        for kind in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR", "ARTIFACT_DIR"):
            os.environ[f"WANDB_{kind}"] = name = str(folder / "wandb" / kind)
            os.makedirs(name)
        options += ["logger=wandb", "logger.mode=offline"]
    if not given.shared:
        return {"one": tiny(folder, *options)}
    return {
        "one": tiny(folder, *options, "base=shared"),
        "two": tiny(folder, *options, "base=shared", "prune.rate=0.3"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="ldt")
    parser.add_argument("--wandb", action="store_true")
    parser.add_argument("--shared", action="store_true")
    given = parser.parse_args()
    rng = np.random.default_rng(given.seed)
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        configs = configurations(folder, given)
        start = time.perf_counter()
        counts = reference(configs, folder / "whole")
        print(f"not killed: {time.perf_counter() - start:.0f} s")
        moments = [str(m) for m in rng.permutation(list(counts))]
        for number in range(given.kills):
            moment = moments[number % len(moments)]
            at = int(rng.integers(1, counts[moment], endpoint=True))
            again = folder / str(number)
            killed_and_resumed(configs, again, moment, at)
            found = [
                f"{job}: {text}"
                for job in configs
                for text in differences(folder / "whole" / job, again / job)
            ]
            failures += bool(found)
            outcome = ", ".join(found) or "equal"
            print(f"killed in {moment}, call {at} of {counts[moment]}: {outcome}", flush=True)
    print(f"{given.kills} kills, {failures} with a difference")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
