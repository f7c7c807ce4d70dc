"""Commands in processes forked from one that has imported everything: none waits for imports.

Each has its own arguments, working directory, environment, output and exit code. The interpreters
that it starts itself, as Lightning does for a second GPU, are forked too. A test of what a command
imports, or of a module that must be found, starts an interpreter: `short_runs.python`.
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
from multiprocessing import forkserver, process
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
PLACES = (str(ROOT),)  # where commands find modules first
PATIENCE = 900  # seconds after which a process counts as hanging, on a slow and busy machine
CONTEXT = multiprocessing.get_context("forkserver")
OURS = {"", str(ROOT / "tests"), str(ROOT / "experiments"), str(ROOT)}
INSTALLED = [path for path in sys.path if path not in OURS]  # the server's, where it matters


def environment() -> dict[str, str]:
    """The environment of every command: one thread, and this checkout's `ldt`."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(PLACES)}


def start_server() -> None:
    """Start the process that others are forked from, unless it runs; it ends with the tests."""
    CONTEXT.set_forkserver_preload(["everything", __name__])
    with _changed(PYTHONPATH=f"{ROOT}:{Path(__file__).parent}", OMP_NUM_THREADS="1"):
        forkserver.ensure_running()


class Started:
    """A process of the server, with the methods of `subprocess.Popen`.

    Args:
        arguments: a script and its arguments, or ``-m``, a module and its arguments.
        cwd: the folder it starts in.
        variables: its environment.
        streams: the files that become its stdout and stderr.
        group: the process group that it joins; 0: one of its own.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        cwd: str | Path,
        variables: Mapping[str, str],
        streams: Sequence[int],
        group: int,
    ) -> None:
        self.args = list(arguments)
        outputs = [Connection(os.dup(stream), readable=False) for stream in streams]
        waiting, ready = CONTEXT.Pipe(duplex=False)
        given = (self.args, cwd, dict(variables), outputs, group, ready)
        self._process: Any = CONTEXT.Process(target=_work, args=given)
        with mock.patch.dict(sys.modules, __main__=ModuleType("__main__")):  # else imported there
            self._process.start()
        process._children.discard(self._process)  # waited for at the exit else
        ready.close()
        waiting.poll(None)  # until it is in its group, or has ended

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Give the exit code, negative for a signal."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forked(Started):
    """A running command of a test, which leads its own process group.

    Args:
        arguments: as those of `Started`.
        cwd: the folder it starts in.
        out: the file that its stdout is appended to.
        err: the same for stderr.
    """

    def __init__(self, arguments: Sequence[str], cwd: Path, out: Path, err: Path) -> None:
        start_server()
        with out.open("ab") as one, err.open("ab") as two:
            super().__init__(arguments, cwd, environment(), (one.fileno(), two.fileno()), 0)

    def wait(self, timeout: float | None = PATIENCE) -> int:
        """Give the exit code, negative for a signal; end all of the group that takes too long."""
        try:
            return super().wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            raise


class Popen(subprocess.Popen):
    """What commands start processes with: a script or module of this Python is forked too."""

    def __new__(cls, args: Any, **options: Any) -> Any:
        command = [part for part in args if part != "-u"] if isinstance(args, list) else []
        plain = options.pop("shell", False) is False
        ours = command[:1] == [sys.executable] and command[1:2] != ["-c"]
        if not (plain and ours and options.keys() <= FORKED):
            return super().__new__(cls)
        streams = [
            fallback if file is None else file.fileno()
            for fallback, file in ((1, options.get("stdout")), (2, options.get("stderr")))
        ]
        own = options.get("start_new_session", False)
        given = options.get("cwd") or os.getcwd(), options.get("env") or os.environ
        return Started(command[1:], *given, streams, 0 if own else os.getpgrp())


FORKED = {"cwd", "env", "stdout", "stderr", "start_new_session", "encoding"}


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
    cwd: str | Path,
    variables: Mapping[str, str],
    outputs: Sequence[Connection],
    group: int,
    ready: Connection,
) -> None:
    """Become the command, in a forked process."""
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    os.setpgid(0, group)
    ready.close()
    atexit._clear()  # the server's: W&B would remove a temporary folder that all of them share
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    multiprocessing.set_start_method(None, force=True)  # not this process's, but the default
    forkserver._forkserver.ensure_running = lambda: None  # this process would start another one
    subprocess.Popen = Popen
    os.environ.clear()
    os.environ.update(variables)
    rank_zero_only.rank = _get_rank() or 0  # from these variables, as when it is imported
    os.chdir(cwd)
    for stream, output in zip((1, 2), outputs, strict=True):
        os.dup2(output.fileno(), stream)
        output.close()
    script = arguments[0]
    start = cwd if script == "-m" else Path(script).parent
    sys.path[:] = [str(start), *variables.get("PYTHONPATH", "").split(":"), *INSTALLED]
    try:
        if script == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()
