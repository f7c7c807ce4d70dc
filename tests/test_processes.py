"""Two processes (gloo, on the CPU) do what one does, and their runs survive a kill."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import forked
import numpy as np
import psutil
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from sampled import sampled
from short_runs import ROOT, TINY, command, python, rows

import ldt
from ldt.callbacks.lightning_internals import end_processes
from ldt.cli import job_process
from ldt.loop.schedule import PruningSchedule
from ldt.pruning.budget import TOLERANCE

pytestmark = pytest.mark.slow
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def options(folder, name, *more):
    """`run.py`'s arguments for a tiny run in <folder>/<name>."""
    cache, place = f"dataset.cache={folder / 'cache'}", f"hydra.run.dir={folder / name}"
    return [*TINY, cache, place, *more]


def finished(folder, name, *more):
    done = command(*options(folder, name, *more), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / name


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A trained base's folder, with LDT on."""
    folder = tmp_path_factory.mktemp("base")
    return finished(folder, "base", "trainer=cpu", "method=none", "ldt.enabled=true")


@pytest.mark.parametrize("method", sampled(["ldt", "group_fisher"]))
def test_scores_and_removed_channels_are_those_of_one_process(base, tmp_path, method):
    start = ["recipe.epochs=0", f"detector.checkpoint={base / 'round-0.ckpt'}", "prune=oneshot"]
    start += [f"method={method}", "method.inner_rounds=1"]
    start += ["prune.repair=lstsq", "recipe.retrain_epochs=0"]
    folders = [
        finished(tmp_path, name, *start, *more)
        for name, more in (("one", ["trainer=cpu"]), ("two", TWO))
    ]
    one, two = (dict(np.load(folder / "scores-1.npz")) for folder in folders)
    assert list(one) == list(two)
    for key, values in one.items():
        if key.startswith("removed/"):
            assert np.array_equal(values, two[key])
        else:
            np.testing.assert_allclose(values, two[key], rtol=1e-4, atol=1e-6 * values.max())
    own, other = (ldt.load_pruned(folder / "round-1.ckpt").state_dict() for folder in folders)
    assert list(own) == list(other)
    for key, value in own.items():  # the refitted weights too
        torch.testing.assert_close(value, other[key], rtol=1e-3, atol=1e-4)


def test_two_rounds_end_as_if_both_processes_had_not_been_killed(tmp_path):
    more = [*TWO, "recipe.retrain_epochs=2", "distill.neck=0.5", "distill.head=0.5"]
    whole = finished(tmp_path, "whole", *more)
    arguments, out = options(tmp_path, "killed", *more), tmp_path / "killed.out"
    process = forked.Forked([str(ROOT / "run.py"), *arguments], tmp_path, out, out)
    folder, deadline = tmp_path / "killed", time.monotonic() + forked.PATIENCE
    while not (folder / "scores-1.npz").is_file():  # the first cut
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "summary.json").exists()  # the kill came before the end
    assert not (folder / "round-2.ckpt").exists()
    finished(tmp_path, "killed", *more)
    found = rows(folder)
    assert found == rows(whole)
    plan = PruningSchedule(rate=0.5, rounds=2, base_epochs=1, retrain_epochs=2)
    rates = [row["rate"] for row in found]
    assert rates == pytest.approx([plan.removed_share(t) for t in range(3)], abs=TOLERANCE)
    ldt.load_pruned(folder / "round-2.ckpt")


def test_a_run_that_is_told_to_stop_in_a_cut_ends_as_if_it_had_not_been(tmp_path):
    """SIGTERM to the first process alone, as `kill` sends it, when the channels are chosen."""
    more = [*TWO, "method=l1", "prune=oneshot"]
    whole = finished(tmp_path, "whole", *more)
    script = tmp_path / "told.py"
    script.write_text(TOLD)
    arguments, out = options(tmp_path, "told", *more), tmp_path / "told.out"
    process = forked.Forked([str(script), *arguments], tmp_path, out, out)
    assert process.wait() == 130, out.read_text()
    assert json.loads((tmp_path / "told/summary.json").read_text()) == {"status": "interrupted"}
    assert not (tmp_path / "told/round-1.ckpt").exists()
    assert alive(tmp_path) == []
    finished(tmp_path, "told", *more)
    assert rows(tmp_path / "told") == rows(whole)
    one, two = (ldt.load_pruned(folder / "round-1.ckpt") for folder in (whole, tmp_path / "told"))
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key])


TOLD = """
import os, signal
from ldt.cli.hydra_app import main
from ldt.loop import pruning_round

check = pruning_round.check_rate

def told(*given):
    check(*given)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGTERM)

pruning_round.check_rate = told
main()
"""


# One optimizer step ------------------------------------------------------------------------------


def steps(folder, name, *more):
    """Per optimizer step of a run without pruning: its number, learning rate and images."""
    folder = folder / name
    folder.mkdir()
    recipe = ["dataset.train=10", "recipe.epochs=2", "recipe.base_batch_size=2", "method=none"]
    arguments = [str(ROOT / "tests/recorded.py"), str(folder), *recipe, *more]
    done = forked.run(*arguments, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for file in folder.glob("steps-*.json"):
        for number, rate, images in json.loads(file.read_text()):
            rates, seen = found.setdefault(number, (set(), []))
            rates.add(rate)
            seen.extend(images)
    return found


TWICE = ["trainer.accumulate_grad_batches=2"]


@pytest.mark.parametrize(("more", "parts"), sampled([([*TWO, *TWICE], 4), (TWO, 2), (TWICE, 2)]))
def test_a_step_is_the_same_however_it_is_shared(steps_alone, tmp_path, more, parts):
    shared = steps(tmp_path, "shared", *more)
    assert list(shared) == list(steps_alone) == list(range(6))  # 4, 4 and 2 images, twice
    for number, (rates, images) in steps_alone.items():
        assert shared[number][0] == rates
        assert len(rates) == 1
        assert set(shared[number][1]) == set(images)
        assert len(shared[number][1]) == max(len(images), parts)  # 2 images fill up 4 parts
    assert max(max(rates) for rates, _ in steps_alone.values()) == pytest.approx(2 * 0.003)


@pytest.fixture(scope="module")
def steps_alone(tmp_path_factory):
    return steps(tmp_path_factory.mktemp("alone"), "alone")


def test_a_batch_that_does_not_divide_is_refused_before_training(tmp_path):
    done = command(*options(tmp_path, "odd", *TWO, "recipe.batch_size=5"), cwd=tmp_path)
    assert done.returncode != 0
    assert (
        "recipe.batch_size=5 images per optimizer step cannot be split among 2 processes x "
        "trainer.accumulate_grad_batches=1; allowed: multiples of 2 (e.g. recipe.batch_size=4)"
    ) in done.stderr
    assert not list((tmp_path / "odd").glob("*.ckpt"))


# Sweeps ------------------------------------------------------------------------------------------


def alive(folder):
    """Processes that work in a folder."""
    found = []
    for process in psutil.process_iter(["cwd", "cmdline", "status"]):
        there = (process.info["cwd"] or "").startswith(str(folder))
        if there and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.info["cmdline"])
    return found


@pytest.mark.parametrize(
    ("started", "seeds"), [(command, "0,1"), (python, "0")], ids=["forked", "interpreters"]
)
def test_a_job_that_fails_in_one_process_leaves_the_next_ones_alone(
    tmp_path, monkeypatch, started, seeds
):
    """The second process alone meets an image that it cannot read, in the first job."""
    (tmp_path / "mine.py").write_text(BROKEN)
    monkeypatch.setattr(forked, "PLACES", (*forked.PLACES, str(tmp_path)))
    arguments = [*TINY, *TWO, f"dataset.cache={tmp_path / 'cache'}", "method=none"]
    arguments += ["dataset._target_=mine.Mine", f"seed={seeds}"]
    program = [] if started is command else [str(ROOT / "run.py")]
    done = started(*program, "-m", *arguments, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    failed, *others = sorted((tmp_path / "runs/default").glob("*/summary.json"))
    found = json.loads(failed.read_text())
    assert found == {"status": "failed", "error": "ValueError: the true reason"}
    assert [json.loads(file.read_text())["status"] for file in others] == ["finished"] * (
        len(seeds.split(",")) - 1
    )
    assert alive(tmp_path) == []


BROKEN = """
import os
from ldt.data.roadscenes import RoadScenesDataModule

class Mine(RoadScenesDataModule):
    def train_dataloader(self):
        if os.environ.get("LOCAL_RANK") == "1" and self.seed == 0:
            raise ValueError("the true reason")
        return super().train_dataloader()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_sweep_that_is_stopped_leaves_no_process(tmp_path, number):
    out = tmp_path / "out"
    arguments = options(tmp_path, "x", *TWO, "method=none", "recipe.epochs=500")
    arguments = [key for key in arguments if not key.startswith("hydra.run.dir")]
    process = forked.Forked([str(ROOT / "run.py"), "-m", *arguments], tmp_path, out, out)
    deadline = time.monotonic() + forked.PATIENCE
    while not list(tmp_path.glob("runs/default/*/last.ckpt")):
        assert process.poll() is None, out.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(alive(tmp_path)) >= 3  # the sweep and the two processes of its job
    process.send_signal(number)
    assert process.wait() == 130, out.read_text()
    (file,) = tmp_path.glob("runs/default/*/summary.json")
    assert json.loads(file.read_text()) == {"status": "interrupted"}
    assert alive(tmp_path) == []


def test_a_mistake_in_all_jobs_is_told_once_before_any(tmp_path):
    done = command("-m", *TINY, *TWO, "recipe.batch_size=5", "seed=0,1,2", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "recipe.batch_size=5 images per optimizer step cannot be split among 2" in line
    assert not (tmp_path / "runs").exists()


def test_a_mistake_in_one_job_leaves_the_others_alone(tmp_path):
    arguments = [*TINY, "trainer=cpu", f"dataset.cache={tmp_path / 'cache'}", "method=none"]
    done = command("-m", *arguments, "recipe.batch_size=-1,4", cwd=tmp_path)
    assert done.returncode == 1
    assert "recipe.batch_size=-1; allowed" in done.stderr
    assert "1 finished, 0 failed" in done.stdout


# Ends -------------------------------------------------------------------------------------------

STUBBORN = ["sh", "-c", "trap '' TERM INT; while :; do sleep 0.1; done"]  # ignores to be told


def test_nothing_of_a_job_outlives_it(tmp_path):
    code = f"""
import pathlib, subprocess, sys
left = subprocess.Popen({STUBBORN})
pathlib.Path("pid").write_text(str(left.pid))
sys.exit(3)
"""
    with contextlib.chdir(tmp_path):
        assert job_process._wait([sys.executable, "-c", code]) == 3
    left = int((tmp_path / "pid").read_text())
    _, alive = psutil.wait_procs([psutil.Process(left)] if psutil.pid_exists(left) else [], 10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_processes_that_wait_for_this_one_are_ended():
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    launcher.procs = [subprocess.Popen(STUBBORN)]
    end_processes(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher)))
    assert launcher.procs[0].wait(10) == -signal.SIGKILL
