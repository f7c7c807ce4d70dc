"""Provenance of a run: software versions, hardware and commit."""

import os
import platform
import subprocess
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from ldt.runs import records
from ldt.runs.files import ENVIRONMENT, read_json, write_json

PACKAGES = (
    "torch",
    "torchvision",
    "lightning",
    "mmdet",
    "onedl-mmdetection",
    "mmcv",
    "mmcv-lite",
    "mmengine",
    "onedl-mmengine",
    "torch-pruning",
    "hydra-core",
    "numpy",
)
MODULES = {  # that several packages install: only the one whose module is imported is recorded
    "mmdet": "mmdet",
    "onedl-mmdetection": "mmdet",
    "mmengine": "mmengine",
    "onedl-mmengine": "mmengine",
}


def about(folder: Path) -> dict[str, Any]:
    """Return the provenance of a run: ``environment``, and ``git`` of a folder."""
    return {"environment": environment(), "git": git_state(folder)}


def starts(folder: Path) -> list[dict[str, Any]]:
    """Return the provenance of each start of a run; earlier versions kept that of the last one.

    Raises:
        DamagedError: they cannot be read.
    """
    file = folder / ENVIRONMENT
    found = read_json(file)
    known = found.get("starts", [found] if found else [])
    records.check(file, records.STARTS, known)
    return known


def add_start(folder: Path, now: dict[str, Any]) -> None:
    """Append the provenance of a start to those of a run; one that changes nothing is left out."""
    known = starts(folder)
    if now not in known[-1:]:
        write_json(folder / ENVIRONMENT, {"starts": [*known, now]})


def environment() -> dict[str, str]:
    """Return the versions of Python and of the imported libraries, and the hardware, as text."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        **_versions(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "gpus": ", ".join(gpus) or "none",
    }


def git_state(folder: Path) -> dict[str, str | bool]:
    """Return {"commit": full hash, "dirty": whether files differ from it or are not in it}.

    Empty if there is no git, repository or commit; never raises.
    """
    commit, status = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain")
    if commit is None or status is None:
        return {}
    return {"commit": commit, "dirty": status != ""}


def cpu_name() -> str:
    """Return the name of the processor; `platform.processor` is often empty on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if package not in MODULES or version == import_module(MODULES[package]).__version__:
            versions[package] = version
    return versions


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of git, or None if it fails."""
    # without optional locks: `git status` would otherwise write to the index of the repository
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
