"""Runs that are stopped, started twice, refused a disk, or sent away, in processes of their own."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import time

import forked
import pytest
import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from sampled import sampled
from short_runs import DRAWN, ROOT, TINY, command, python, rows, summary, tiny

import ldt
from ldt import experiment
from ldt.cli import main
from ldt.figures import from_runs
from ldt.figures.style import save
from ldt.loop import pruning_round
from ldt.module import DetectorModule
from ldt.runs import files
from ldt.runs.signals import interrupting

pytestmark = pytest.mark.slow
ONE = ["trainer=cpu", "method=none", "recipe.epochs=3"]


def options(folder, name, *more):
    cache, place = f"dataset.cache={folder / 'cache'}", f"hydra.run.dir={folder / name}"
    return [*TINY, cache, place, *more]


def begun(folder, name, *more):
    """A running `run.py`, with its output kept in <folder>/<name>.out."""
    arguments, out = options(folder, name, *more), folder / f"{name}.out"
    return forked.Forked([str(ROOT / "run.py"), *arguments], folder, out, out)


def wait_for(file, process):
    deadline = time.monotonic() + forked.PATIENCE
    while not file.exists():
        assert process.poll() is None, "it ended first"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_leaves_a_checkpoint_and_a_summary(tmp_path):
    process = begun(tmp_path, "run", *ONE, "recipe.epochs=200")
    folder = tmp_path / "run"
    wait_for(folder / "last.ckpt", process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, (tmp_path / "run.out").read_text()
    assert summary(folder)["status"] == "interrupted"
    assert experiment.resumable(folder) is not None
    text = (tmp_path / "run.out").read_text()
    assert "the same command resumes" in text
    assert "Traceback" not in text


def test_ctrl_c_while_a_round_begins_changes_nothing(undisturbed, tmp_path, monkeypatch):
    """It comes at the worst moment: channels are cut, nothing is saved yet."""
    config = based(undisturbed)
    with monkeypatch.context() as patch:
        check = pruning_round.check_rate

        def interrupted(*given):
            check(*given)
            raise KeyboardInterrupt

        patch.setattr(pruning_round, "check_rate", interrupted)
        with pytest.raises(SystemExit) as stopped:
            experiment.run(config, tmp_path / "run")
    assert stopped.value.code == 130
    assert summary(tmp_path / "run")["status"] == "interrupted"
    experiment.run(config, tmp_path / "run")
    assert rows(tmp_path / "run") == rows(undisturbed / "whole")


def test_of_two_processes_one_trains_and_the_other_waits(tmp_path):
    first = begun(tmp_path, "run", *ONE)
    second = begun(tmp_path, "run", *ONE)
    assert (first.wait(), second.wait()) == (0, 0)
    text = (tmp_path / "run.out").read_text()
    assert text.count("waiting for it to finish") == 1
    assert text.count("epoch 3/3  loss") == 1
    assert text.count("\nresults: ") == 2  # the other one shows what the first has found
    assert summary(tmp_path / "run")["status"] == "finished"


def test_a_full_disk_stops_a_run_and_loses_nothing(tmp_path, monkeypatch):
    config = tiny(tmp_path, *ONE)
    experiment.run(config, tmp_path / "whole")
    saves, plain = [], torch.save

    def full(content, file):
        saves.append(file)
        if len(saves) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(content, file)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"cannot write .*No space left.*free disk space"):
            experiment.run(config, folder)
    assert summary(folder)["status"] == "failed"
    assert "No space left" in summary(folder)["error"]
    ldt.load_pruned(folder / "last.ckpt")
    experiment.run(config, folder)
    assert rows(folder) == rows(tmp_path / "whole")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    done = command(*options(tmp_path, "file/run", *ONE), cwd=tmp_path)
    assert done.returncode == 2  # before any work
    assert str(tmp_path / "file/run") in done.stderr


def repeat(*folders, cwd):
    return forked.run("-m", "ldt.cli", "repeat", *map(str, folders), cwd=cwd)


def test_the_same_command_gives_the_same_numbers_and_a_run_can_be_repeated(tmp_path):
    config = ["trainer=cpu", "prune=oneshot", "report.pictures=0"]
    for name in ("one", "two"):
        done = command(*options(tmp_path, name, *config), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    done = repeat(tmp_path / "one", tmp_path / "three", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "one") == rows(tmp_path / "two") == rows(tmp_path / "three")
    one, three = (OmegaConf.load(tmp_path / name / "config.yaml") for name in ("one", "three"))
    assert three.run_name == "three"
    assert OmegaConf.merge(one, {"study": three.study, "run_name": three.run_name}) == three
    done = repeat(tmp_path / "cache", tmp_path / "x", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "give the directory of a run" in line


# Sweeps elsewhere -----------------------------------------------------------------------------


def started(*arguments, cwd):
    """`command` for joblib, whose workers hang below a process that was forked itself."""
    return python(str(ROOT / "run.py"), *arguments, cwd=cwd)


@pytest.mark.parametrize(
    ("launched", "elsewhere"),
    sampled(
        [
            (command, ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]),
            (
                command,
                ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=30", "trainer=cpu"],
            ),
            (started, ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "trainer=cpu"]),
        ],
        2,
    ),
    ids=["ddp", "submitit", "joblib"],
)
def test_the_same_sweep_runs_elsewhere(tmp_path, launched, elsewhere):
    done = launched(
        "-m",
        *TINY,
        f"dataset.cache={tmp_path / 'cache'}",
        "report.pictures=0",
        "prune=oneshot",
        "method=l1,random",
        "study=away",
        *elsewhere,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folders = sorted(file.parent for file in (tmp_path / "runs/away").glob("*/summary.json"))
    assert [folder.name.split("-")[2] for folder in folders] == ["l1", "random"]
    assert all(summary(folder)["status"] == "finished" for folder in folders)
    assert "2 finished" in done.stdout


def test_optuna_searches_towards_two_objectives(tmp_path):
    done = command(
        "-m",
        "experiment=search",
        *[key for key in TINY if not key.startswith("prune.rate")],
        f"dataset.cache={tmp_path / 'cache'}",
        "report.pictures=0",
        "prune=oneshot",
        "trainer=cpu",
        "objectives=[mAP,params]",
        "hydra.sweeper.direction=[maximize,minimize]",
        "hydra.sweeper.n_trials=2",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = OmegaConf.load(tmp_path / "runs/search/optimization_results.yaml")
    values = [solution["values"] for solution in found["solutions"]]
    params = {
        summary(file.parent)["rounds"][-1]["params"]
        for file in (tmp_path / "runs/search").glob("*/summary.json")
    }
    assert {int(value[1]) for value in values} <= params


# Signals --------------------------------------------------------------------------------------

SLURM = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "77"} | {
    f"SLURM_{name}": "0" for name in ("PROCID", "LOCALID", "NODEID")
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A SLURM job, with the commands that its `scontrol` has got."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    program, told = tmp_path / "bin/scontrol", tmp_path / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {told}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return lambda: told.read_text().splitlines() if told.exists() else []


def signalled(monkeypatch, owner, name, number, call=1):
    """Let this process get a signal in one call of a function."""
    plain, calls = getattr(owner, name), []

    def wrapped(*given, **more):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return plain(*given, **more)

    monkeypatch.setattr(owner, name, wrapped)


MOMENTS = {
    "training": (DetectorModule, "backward", 3),
    "cutting": (pruning_round, "check_rate", 1),
    "validation": (DetectorModule, "validation_step", 1),
    "waiting": (files.FileLock, "acquire", 2),  # the run's lock first, then that of its base
    "drawing": (experiment.layers, "write_inventory", 2),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    experiment.run(based(folder), folder / "whole")
    return folder


def based(folder, *more):
    return tiny(folder, "method=l1", "prune=oneshot", "base=shared", "recipe.epochs=2", *more)


@pytest.mark.parametrize("moment", sampled(MOMENTS, 3))
@pytest.mark.parametrize("number", sampled([signal.SIGUSR1, signal.SIGTERM]), ids=["USR1", "TERM"])
def test_a_signalled_job_goes_on_as_if_it_had_not_been(
    moment, number, slurm, undisturbed, tmp_path, monkeypatch
):
    config = based(undisturbed, *(DRAWN if moment == "drawing" else ()))
    before, drawn = signal.getsignal(number), []
    monkeypatch.setattr(from_runs, "draw_run", lambda _, folder, *__: drawn.append(folder))
    with monkeypatch.context() as patch:
        owner, name, call = MOMENTS[moment]
        signalled(patch, owner, name, number, call)
        with pytest.raises(SystemExit) as stopped:
            experiment.run(config, tmp_path / "s/run")
    assert stopped.value.code == 130
    assert slurm() == ["requeue 77"] * (number == signal.SIGUSR1)
    assert signal.getsignal(number) == before
    if moment != "drawing":  # the result is there already
        folders = [folder for folder in (tmp_path / "s").iterdir()]
        states = {summary(f)["status"] for f in folders if (f / "summary.json").exists()}
        assert states <= {"interrupted", "finished"}
        assert "interrupted" in states
    bases = list((tmp_path / "s").glob("base-*")) if moment == "drawing" else []
    assert drawn == bases
    experiment.run(config, tmp_path / "s/run")
    assert drawn == [*bases, *[tmp_path / "s/run"] * (moment == "drawing")]
    assert rows(tmp_path / "s/run") == rows(undisturbed / "whole")


def test_a_checkpoint_in_mid_epoch_of_an_earlier_version_does_no_harm(slurm, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"callbacks": {}}, folder / "hpc_ckpt_1.ckpt")
    experiment.run(tiny(tmp_path, "trainer=cpu", "method=none"), folder)
    assert summary(folder)["status"] == "finished"
    assert not (folder / "hpc_ckpt_1.ckpt").exists()


def test_a_queue_that_refuses_is_told(slurm, tmp_path, caplog):
    (tmp_path / "bin/scontrol").write_text("#!/bin/sh\necho disabled >&2\nexit 1\n")
    with pytest.raises(KeyboardInterrupt), interrupting():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert "SLURM job 77 cannot be requeued (disabled); submit it again" in caplog.text


# What happens to a run's directory -------------------------------------------------------------


def test_a_file_system_without_locks_holds_whole_runs(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    config = tiny(tmp_path, "trainer=cpu", "method=l1", "prune=oneshot", "base=shared")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    found = experiment.run(config, tmp_path / "study/run")
    told = caplog.text.count("a file system without locks")
    assert told == 3  # of the run, its base and the cache of the scenes
    assert experiment.run(config, tmp_path / "study/run") == found
    assert [summary(folder)["status"] for folder in (tmp_path / "study").iterdir()] == [
        "finished",
        "finished",
    ]


def test_a_finished_run_on_a_disk_that_became_read_only_is_shown(tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=99m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("no right to mount a disk")
    try:
        config = tiny(tmp_path, "trainer=cpu", "method=none", *DRAWN)
        found = experiment.run(config, disk / "study/run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert experiment.run(config, disk / "study/run") == found
        capsys.readouterr()
        main(["report", str(disk / "study"), "--format", "csv"])
        assert f"{found:.3f}"[:5] in capsys.readouterr().out
        shown = ["figures", "results", str(disk / "study/run")]
        with pytest.raises(SystemExit) as refused:
            main(shown)
        assert refused.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("is read-only")
        main([*shown, "--out", str(tmp_path / "results.png")])
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert (tmp_path / "results.png").is_file()


def test_a_directory_that_is_removed_ends_the_run_in_one_line(tmp_path, monkeypatch):
    config = tiny(tmp_path, *ONE)
    plain = DetectorModule.on_train_epoch_start

    def removed(module):
        if module.current_epoch == 1:
            shutil.rmtree(tmp_path / "run")
        plain(module)

    with monkeypatch.context() as patch:
        patch.setattr(DetectorModule, "on_train_epoch_start", removed)
        with pytest.raises(FileNotFoundError, match="run was removed during the run; the same"):
            experiment.run(config, tmp_path / "run")
    experiment.run(config, tmp_path / "run")
    assert summary(tmp_path / "run")["status"] == "finished"


def test_a_full_disk_while_drawing_keeps_the_result(tmp_path, monkeypatch):
    config = tiny(tmp_path, "trainer=cpu", "method=none", *DRAWN)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(
            from_runs, "draw_run", lambda _, folder, *__: save(Figure(), folder / "a.png")
        )
        patch.setattr(from_runs, "draw_labels_of", lambda *_: None)
        patch.setattr(Figure, "savefig", full)
        with pytest.raises(OSError, match=r"No space left on device: .*a\.png"):
            experiment.run(config, tmp_path / "run")
    found = summary(tmp_path / "run")
    assert (found["status"], found.get("drawn")) == ("finished", None)
    experiment.run(config, tmp_path / "run")
    assert summary(tmp_path / "run")["drawn"]


def test_a_summary_that_cannot_be_written_hides_no_error(tmp_path, monkeypatch, caplog):
    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "summary.json")

    def fail(*_):
        raise RuntimeError("the true reason")

    monkeypatch.setattr(files, "write_first", denied)
    monkeypatch.setattr(DetectorModule, "training_step", fail)
    with pytest.raises(RuntimeError, match="the true reason"):
        experiment.run(tiny(tmp_path, *ONE), tmp_path / "run")
    assert "cannot be recorded: [Errno 13] Permission denied: 'summary.json'" in caplog.text
