"""The wheel: complete, and at work outside of the checkout."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from forked import PATIENCE
from short_runs import ROOT, TINY

PARTS = {"ldt": "ldt", "conf": "ldt/conf", "hydra_plugins": "hydra_plugins"}  # and where they go


def called(*arguments, cwd):
    """A command without what this process has in its environment from the checkout."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, arguments)), cwd=cwd, env=kept | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the checkout: building leaves files in the folder."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    caches = shutil.ignore_patterns("__pycache__")
    for part in PARTS:
        shutil.copytree(ROOT / part, copy / part, ignore=caches)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = (sys.executable, "-m", "pip")
    called(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", copy, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `bin` of a new environment: the wheel, beside this environment's packages.

    A path in a .pth file is searched, but the .pth files there are not read: no editable install
    of the checkout comes along.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    called(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    packages = Path(torch.__file__).parents[1]
    (site / "packages.pth").write_text(f"{packages}\n")
    return folder / "bin"


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_checkout_in_its_place(wheel):
    kinds = {".py", ".yaml", ".html", ".css", ".js", ".txt"}
    expected = {
        f"{place}/{file.relative_to(ROOT / part).as_posix()}"
        for part, place in PARTS.items()
        for file in (ROOT / part).rglob("*")
        if file.suffix in kinds
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected  # what is missing belongs to `packages` in pyproject.toml
    assert "ldt/conf/hydra/sweeper/grids.yaml" in names


@pytest.mark.slow
def test_help_works_outside_of_the_checkout(installed, tmp_path):
    assert "ldt report runs/default" in called(installed / "ldt", "--help", cwd=tmp_path)
    told = " ".join(called(installed / "ldt", "run", "--help", cwd=tmp_path).split())
    assert "atss_tiny ATSS for a laptop" in told
    assert "prune.rate=0.7 " in told
    assert "version 0." in called(installed / "ldt", "--version", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


FILES = """
import sys, ldt
assert "torch" not in sys.modules
from ldt.config import conf_dir
import hydra_plugins.ldt_grids as grids
print(ldt.__file__, conf_dir(), grids.__file__, callable(ldt.load_pruned), sep="\\n", flush=True)
from ldt.criteria.methods import find_method
find_method("ldt")
from ldt.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_code_and_configurations_come_from_the_wheel_and_a_sweep_runs(installed, tmp_path):
    """In one process: importing everything takes longer than the sweep."""
    shown = called(
        installed / "python", "-c", FILES,
        "run", "-m", "hydra/sweeper=grids", *TINY, "trainer=cpu", "method=l1",
        "prune=oneshot", "run_name=tiny", f"dataset.cache={tmp_path / 'cache'}", cwd=tmp_path,
    )  # fmt: skip
    *files, has_api = shown.splitlines()[:4]
    assert all(Path(file).is_relative_to(installed.parent) for file in files)
    assert has_api == "True"
    assert (tmp_path / "runs/default/tiny/round-1.ckpt").is_file()
    assert (tmp_path / "runs/default/tiny/run.log").is_file()
    table = called(
        installed / "ldt", "report", "runs/default", "--format", "markdown", cwd=tmp_path
    )
    assert table.startswith("| dataset |")
