"""What is told of software, hardware and commit."""

import subprocess
from pathlib import Path

import torch

from ldt.runs.provenance import environment, git_state


def test_environment_names_what_a_number_depends_on():
    found = environment()
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert {"python", "numpy", "mmdet", "cpu", "cores", "threads", "gpus"} <= found.keys()
    assert all(isinstance(value, str) and value for value in found.values())


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_git_state_follows_the_repository(tmp_path: Path):
    assert git_state(tmp_path / "nowhere") == git_state(tmp_path) == {}
    git(tmp_path, "init")
    assert git_state(tmp_path) == {}
    git(tmp_path, "commit", "--allow-empty", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "new.py").write_text("")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_git_state_without_git(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path.cwd()) == {}
