"""Files are whole or as they were, and what killed processes leave is removed."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure

from ldt.callbacks.checkpoint_io import AtomicCheckpointIO
from ldt.cli.commands import ldt as commands
from ldt.figures.style import save
from ldt.loop.round_record import RoundRecord
from ldt.runs import files, provenance
from ldt.runs.refusal import is_refusal


def record(path):
    found = RoundRecord()
    found.scores["a"], found.kept["a"] = np.ones(3), np.arange(3)
    found.save(path)


WRITERS = {  # by the name of a file: what writes it
    "table.csv": lambda path: files.write_rows(path, [{"a": 1}]),
    "about.json": lambda path: files.write_json(path, {"a": 1}),
    "figure.png": lambda path: save(Figure(), path),
    "figure.svg": lambda path: save(Figure(), path),
    "scores-1.npz": record,
    "last.ckpt": lambda path: AtomicCheckpointIO().save_checkpoint({"a": torch.ones(3)}, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_replaced_as_a_whole_or_not_at_all(name, tmp_path, monkeypatch):
    file = tmp_path / name
    file.write_bytes(b"before")
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "fsync", full)  # all is written, but the disk is full
        with pytest.raises(OSError, match=rf"No space left on device.*{name}|{name}.*No space"):
            WRITERS[name](file)
    assert {found.name: found.read_bytes() for found in tmp_path.iterdir()} == {name: b"before"}
    WRITERS[name](file)
    assert file.read_bytes() != b"before"
    assert {found.name for found in tmp_path.iterdir()} - {files.PREVIOUS} == {name}


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    pid = os.fork()
    if pid == 0:
        with files.writing(tmp_path / "summary.json") as draft:
            draft.write_text("{")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (tmp_path / "pictures").mkdir()
    left = [".draft-1-last.ckpt", ".last.ckpt.4711", "pictures/.draft-2-a.png", "hpc_ckpt_1.ckpt"]
    kept = ["last.ckpt", "last.ckpt.previous", "pictures/a.png", "interrupted.ckpt"]
    for name in left + kept:
        (tmp_path / name).touch()
    assert len(list(tmp_path.glob(".draft-*"))) == 2
    with files.alone(tmp_path):
        found = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}
    assert found == {*kept, files.LOCK}


def test_of_several_writers_the_first_is_kept(tmp_path):
    file = tmp_path / "summary.json"
    with ThreadPoolExecutor(1) as pool:
        list(pool.map(lambda number: files.write_first(file, {"rank": number}), range(4)))
    assert files.read_json(file) == {"rank": 0}
    assert [found.name for found in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("number", files.NO_LOCKS, ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_told_and_used(number, tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    with files.alone(tmp_path):  # leaves its file, which holds no lock
        pass
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with files.alone(tmp_path):
        assert not files.held(tmp_path)
    assert caplog.text.count("a file system without locks") == 1


@pytest.fixture
def read_only(tmp_path):
    """A function that makes a folder read-only, as on a disk that is mounted so."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("no right to mount a disk")
    yield lambda: subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True) and folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_a_read_only_disk_is_enough_for_a_finished_run(status, read_only, tmp_path):
    files.write_json(tmp_path / "disk/summary.json", {"status": status})
    read_only()
    if status == "finished":
        with files.alone(tmp_path / "disk"):
            return
    with pytest.raises(OSError, match=r"Read-only.*disk") as raised, files.alone(tmp_path / "disk"):
        pass
    assert is_refusal(raised.value)


def test_every_start_is_recorded_that_differs_from_the_one_before(tmp_path):
    one, two = ({"environment": {"torch": version}, "git": {}} for version in "12")
    files.write_json(tmp_path / files.ENVIRONMENT, one)  # as earlier versions did
    assert provenance.starts(tmp_path) == [one]
    for start in (one, two, two, one):
        provenance.add_start(tmp_path, start)
    assert provenance.starts(tmp_path) == [one, two, one]
    assert provenance.starts(tmp_path / "nothing") == []


# ldt forget -----------------------------------------------------------------------------------


def forget(study, *options, **more):
    done = CliRunner().invoke(commands, ["forget", str(study), "--failed", *options], **more)
    return done.exit_code, done.output


def test_failed_runs_are_shown_and_removed_and_no_others(tmp_path):
    summaries = {
        "finished": {"status": "finished"},
        "failed": {"status": "failed", "error": "ValueError: no\x1b]0;title\x07\nmore"},
        "busy": {"status": "failed", "error": "earlier"},
        "stopped": {"status": "interrupted"},
        "damaged": None,
    }
    for name, summary in summaries.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(summary) if summary else "{")
    with files.alone(tmp_path / "busy"):
        for options, more, left in (
            ([], {"input": "n\n"}, set(summaries)),
            ([], {"input": "y\n"}, set(summaries) - {"failed"}),
        ):
            code, told = forget(tmp_path, *options, **more)
            assert "failed  ValueError: no\N{REPLACEMENT CHARACTER}]0;title" in told
            assert "\x1b" not in told
            assert {folder.name for folder in tmp_path.iterdir()} == left
            assert code == 0
        assert forget(tmp_path, "--yes") == (0, "removed: 0 runs\n")
    assert forget(tmp_path, "--yes") == (0, "busy  earlier\nremoved: 1 runs\n")


def test_without_a_study_nothing_is_forgotten(tmp_path):
    done = CliRunner().invoke(commands, ["forget", str(tmp_path / "no"), "--failed"])
    assert isinstance(done.exception, FileNotFoundError)
    assert is_refusal(done.exception)
    assert not Path(tmp_path / "no").exists()
