"""Run a job of a sweep in processes of its own, all of which end with the job."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ldt.cli.sweep_progress import PLACE
from ldt.experiment import record_end, result
from ldt.runs import files
from ldt.runs.refusal import Failed, Refused
from ldt.runs.signals import handling

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
OF_SWEEPS = (  # Hydra's keys that concern the sweep, not its jobs
    *("hydra.mode", "hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper"),
    *("hydra.sweep", "hydra.run"),
)


def run_apart(
    config: DictConfig, folder: Path, flags: Sequence[str] = ()
) -> float | tuple[float, ...]:
    """Run a job of a sweep as a command of its own, and end all processes that it has started.

    Lightning starts the other processes of a run by repeating the command; that of a whole sweep
    would keep them from one job to the next, in step only as long as no job fails.

    Args:
        config: the configuration of the job.
        folder: the run's directory.
        flags: Hydra's flags of the sweep that concern its jobs.

    Returns:
        As :func:`ldt.experiment.run`.

    Raises:
        SystemExit: the job was interrupted.
    """
    code = _wait([*_program(), *flags, *_overrides(), f"hydra.run.dir={folder.absolute()}"])
    if code == 130:
        sys.exit(code)
    if code == 0:
        return result(config, files.read_json(folder / files.SUMMARY)["rounds"][-1])
    if code < 0:  # no process was left to record it
        told = f"the processes were killed (signal {-code}); is there enough memory?"
        record_end(folder, {"status": "failed", "error": told})
    return result(config, {}, Refused("nan") if code == 2 else Failed("nan"))


def _program() -> list[str]:
    """Return the command of this process without its keys: a script, a module or `ldt run`."""
    import __main__

    spec = __main__.__spec__
    program = [os.path.abspath(sys.argv[0])] if spec is None else ["-m", spec.name]
    return [sys.executable, *program, *["run"] * (sys.argv[1:2] == ["run"])]


def _overrides() -> list[str]:
    given = HydraConfig.get().overrides
    own = (key for key in given.hydra if not key.lstrip("+~").startswith(OF_SWEEPS))
    return [*given.task, *own]


def _wait(command: Sequence[str]) -> int:
    """Run a command in a process group; return its exit code when none of the group is left."""
    out, err = (sys.stdout, sys.stderr) if PLACE in os.environ else (None, None)
    process = subprocess.Popen(command, start_new_session=True, stdout=out, stderr=err)

    def forward(number: int, frame: FrameType | None) -> None:
        _send(process.pid, number)

    try:
        with handling(SIGNALS, forward):
            return process.wait()
    finally:
        _send(process.pid, signal.SIGKILL)


def _send(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
