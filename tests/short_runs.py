"""Real runs of seconds: twelve small scenes, one epoch a phase."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
from forked import PATIENCE, ROOT, environment
from small import composed

SCENES = (
    "dataset.train=8",
    "dataset.val=4",
    "dataset.height=64",
    "dataset.width=128",
    "dataset.scale=[128,64]",
    "dataset.workers=0",
)
TINY = (
    *SCENES,
    "recipe.epochs=1",
    "recipe.retrain_epochs=1",
    "recipe.batch_size=4",
    "prune.images=8",
    "prune.rate=0.5",
    "report.latency_runs=0",
    "report.figures=false",  # they take half of a tiny run's time
    "report.before_retraining=false",
)
DRAWN = ("report.figures=true", "report.pictures=1")


def tiny(folder: Path, *overrides: str) -> Any:
    """The configuration of a tiny run whose scenes are written below `folder`."""
    return composed(
        *TINY, "trainer=cpu", "run_name=tiny", f"dataset.cache={folder / 'cache'}", *overrides
    )


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def rows(folder: Path) -> list[dict[str, Any]]:
    """Rounds of a finished run without what differs between two equal runs."""
    clock = ("seconds", "file_bytes")
    return [
        {key: value for key, value in row.items() if key not in clock}
        for row in summary(folder)["rounds"]
    ]


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python run.py <arguments>` in a forked process."""
    return forked.run(str(ROOT / "run.py"), *arguments, cwd=cwd)


def python(
    *arguments: str, cwd: Path, timeout: float = PATIENCE
) -> subprocess.CompletedProcess[str]:
    """`python <arguments>` in an interpreter that has imported nothing, which takes seconds."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
