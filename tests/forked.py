"""Commands in processes forked from one that has imported everything: none waits for imports.

Each has its own arguments, working directory, environment, output and exit code. A test of what a
command imports, or of a module that must be found, starts an interpreter: `short_runs.python`.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATIENCE = 900  # seconds after which a process counts as hanging, on a slow and busy machine
CONTEXT = multiprocessing.get_context("forkserver")


def environment() -> dict[str, str]:
    """The environment of every command: one thread, and this checkout's `ldt`."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start_server() -> None:
    """Start the process that others are forked from, unless it runs; it ends with the tests."""
    CONTEXT.set_forkserver_preload(["everything"])
    with _changed(PYTHONPATH=f"{ROOT}:{Path(__file__).parent}", OMP_NUM_THREADS="1"):
        forkserver.ensure_running()


class Forked:
    """A running command, with the methods of `subprocess.Popen`; it leads its own process group.

    Args:
        arguments: a script and its arguments, or ``-m``, a module and its arguments.
        cwd: the folder it starts in.
        out: the file that its stdout is appended to.
        err: the same for stderr.
    """

    def __init__(self, arguments: Sequence[str], cwd: Path, out: Path, err: Path) -> None:
        start_server()
        self.arguments = list(arguments)
        given = (self.arguments, cwd, environment(), out, err)
        self._process: Any = CONTEXT.Process(target=_work, args=given)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = PATIENCE) -> int:
        """Give the exit code, negative for a signal."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        code = Forked(arguments, cwd, out, err).wait()
        return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())


@contextmanager
def _changed(**variables: str) -> Iterator[None]:
    """Change the environment for a while."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _work(
    arguments: list[str],
    cwd: Path,
    variables: Mapping[str, str],
    out: Path,
    err: Path,
) -> None:
    """Become the command, in a forked process."""
    os.setsid()
    atexit._clear()  # the server's: W&B would remove a temporary folder that all of them share
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    multiprocessing.set_start_method(None, force=True)  # not this process's, but the default
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    for stream, path in ((1, out), (2, err)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), stream)
    script = arguments[0]
    start = cwd if script == "-m" else Path(script).parent
    ours = {str(ROOT / "tests"), str(ROOT / "experiments"), str(ROOT)}
    sys.path[:] = [str(start), str(ROOT), *(path for path in sys.path if path not in ours)]
    try:
        if script == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()
