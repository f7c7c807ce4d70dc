"""What is told of software, hardware and commit."""

import subprocess
from importlib import metadata
from pathlib import Path

import ldt  # noqa: F401  (first: mmcv's operators)

# isort: split
import mmdet
import pytest
import torch

from ldt.runs.provenance import environment, git_state


def test_environment_names_what_a_number_depends_on():
    found = environment()
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert {"python", "numpy", "cpu", "cores", "threads", "gpus"} <= found.keys()
    assert all(isinstance(value, str) and value for value in found.values())


@pytest.mark.parametrize(
    ("imported", "recorded"), [("3.3.0", "mmdet"), ("3.5.1", "onedl-mmdetection")]
)
def test_of_packages_with_the_same_module_the_imported_one_is_recorded(
    imported: str, recorded: str, monkeypatch
):
    known = {"mmdet": "3.3.0", "onedl-mmdetection": "3.5.1"}
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: known.get(name) or installed(name))
    monkeypatch.setattr(mmdet, "__version__", imported)
    assert {name for name in environment() if name in known} == {recorded}


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
