"""The jobs of a sweep while they run: one table that renews itself, or a line for each of them."""

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ldt.progress.console import print_lines
from ldt.progress.display import clock, display
from ldt.runs.files import read_json, write_json

if TYPE_CHECKING:
    from rich.console import RenderableType

log = logging.getLogger(__name__)
PLACE = "LDT_SWEEP"  # environment variable: the process of a sweep, and where jobs report
LEFT_FREE = 12  # lines of the terminal that the table leaves to others
WAITING, RUNNING, FINISHED, FAILED, REFUSED = "waiting", "running", "finished", "failed", "refused"
STYLES = {RUNNING: "bold", FINISHED: "green", FAILED: "red", REFUSED: "red"}


@dataclass
class SweepJob:
    """A job of a sweep.

    Attributes:
        label: its overrides that other jobs do not share.
        state: one of the constants of this module.
        result: its headline metric, or its objectives.
        started: time of its beginning in seconds.
        seconds: how long it took.
        left: estimate of the time left, of a job of another process.
    """

    label: str
    state: str = WAITING
    result: object = None
    started: float = 0.0
    seconds: float = 0.0
    left: float | None = None


def labels(batch: Sequence[Sequence[str]]) -> list[str]:
    """Return the overrides of each job that tell it from the others."""
    shared = set.intersection(*(set(job) for job in batch)) if len(batch) > 1 else set()
    return [" ".join(key for key in job if key not in shared) for job in batch]


class SweepProgress:
    """The jobs that run one after another in this process, and those that other processes run.

    Args:
        place: the folder where other processes report their jobs (:class:`JobReport`).

    Attributes:
        jobs: in their order.
    """

    def __init__(self, place: Path | None = None) -> None:
        self.jobs: list[SweepJob] = []
        self.place = place
        self._printed: dict[int, int] = {}  # lines of stderr by job

    def add(self, batch: Sequence[Sequence[str]]) -> None:
        """Add the jobs of a batch."""
        self.jobs += [SweepJob(label) for label in labels(batch)]

    def start(self, number: int) -> None:
        """Begin a job, counted from 0."""
        if number >= len(self.jobs):
            return
        job = self.jobs[number]
        job.state, job.started = RUNNING, time.monotonic()
        log.info("job %d of %d: %s", number + 1, len(self.jobs), job.label)

    def end(self, number: int, state: str, result: object) -> None:
        """End a job, counted from 0."""
        if number >= len(self.jobs):
            return
        job = self.jobs[number]
        job.state, job.result = state, result
        job.seconds = time.monotonic() - job.started
        left = self.seconds_left()
        log.info(
            "job %d of %d %s: %s  %s%s",
            number + 1,
            len(self.jobs),
            state,
            shown(result),
            clock(job.seconds),
            f"; about {clock(left)} left for the sweep" if left else "",
        )

    def read(self) -> None:
        """Read what other processes have reported, and print their errors."""
        for number, job in enumerate(self.jobs if self.place is not None else ()):
            if job.state in (WAITING, RUNNING) and (told := _told(self.place, number)):
                now = time.monotonic()
                job.started = now if job.state == WAITING else job.started
                job.state, job.left, job.result = told["state"], told["left"], told["result"]
                job.seconds = now - job.started
                self._print_errors(number)

    def _print_errors(self, number: int) -> None:
        assert self.place is not None
        file, known = self.place / f"{number}.err", self._printed.get(number, 0)
        with contextlib.suppress(OSError):
            lines = file.read_text(encoding="utf-8").splitlines()
            self._printed[number] = len(lines)
            for line in lines[known:]:
                print_lines(line)

    def close(self) -> None:
        """Remove what other processes have reported."""
        if self.place is not None:
            self.read()
            shutil.rmtree(self.place, ignore_errors=True)
            os.environ.pop(PLACE, None)

    def seconds_left(self) -> float | None:
        """Estimate the time that is left; None before a job has ended."""
        ended = [job.seconds for job in self.jobs if job.state == FINISHED]
        if not ended:
            return None
        mean = sum(ended) / len(ended)
        running = [self._left_of(job, mean) for job in self.jobs if job.state == RUNNING]
        waiting = sum(job.state == WAITING for job in self.jobs)
        return (waiting * mean + sum(running)) / max(1, len(running))

    def _left_of(self, job: SweepJob, mean: float) -> float:
        left = self._estimate(job)
        return max(0.0, mean - (time.monotonic() - job.started)) if left is None else left

    def _estimate(self, job: SweepJob) -> float | None:
        if self.place is not None:
            return job.left
        steps = display().steps
        return steps.seconds_left() if steps is not None else None

    def draw(self) -> "RenderableType":
        """Draw the table: as many jobs around the current one as there is room for."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        self.read()
        ended = sum(job.state not in (WAITING, RUNNING) for job in self.jobs)
        left = self.seconds_left()
        title = f"{ended} of {len(self.jobs)} jobs ended"
        title += f", about {clock(left)} left" if left else ""
        table = Table(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            title=title,
            title_justify="left",
            title_style="",
        )
        table.add_column("", justify="right", no_wrap=True)
        table.add_column("job", overflow="ellipsis", no_wrap=True, ratio=1)
        table.add_column("state", no_wrap=True)
        for name in ("result", "time", "left"):
            table.add_column(name, justify="right", no_wrap=True)
        first, last = self._window()
        for number in range(first, last):
            job = self.jobs[number]
            table.add_row(
                str(number + 1),
                Text(job.label),
                Text(job.state, style=STYLES.get(job.state, "dim")),
                shown(job.result) if job.result is not None else "",
                *self._times(job),
            )
        return table

    def _times(self, job: SweepJob) -> tuple[str, str]:
        if job.state == WAITING:
            return "", ""
        if job.state != RUNNING:
            return clock(job.seconds), ""
        left = self._estimate(job)
        return clock(time.monotonic() - job.started), "" if left is None else clock(left)

    def _window(self) -> tuple[int, int]:
        """Return the first job that is shown, and the one after the last."""
        room = max(3, os.get_terminal_size().lines - LEFT_FREE) if os.isatty(1) else len(self.jobs)
        running = (i for i, job in enumerate(self.jobs) if job.state in (RUNNING, WAITING))
        now = next(running, len(self.jobs))
        first = max(0, min(now - room // 2, len(self.jobs) - room))
        return first, min(first + room, len(self.jobs))


def shown(result: object) -> str:
    """Format the result of a job."""
    values = result if isinstance(result, tuple) else (result,)
    return ", ".join(_number(value) for value in values if isinstance(value, float | int))


def _number(value: float) -> str:
    if isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


class JobReport:
    """Report the state of a job to the process that shows the table of its sweep.

    In a terminal the job itself prints nothing: its log has all, and the sweep prints its errors.

    Args:
        place: the folder for reports.
        number: of the job, from 0.
    """

    def __init__(self, place: Path, number: int) -> None:
        self.place, self.number = place, number
        self._over = threading.Event()
        self._streams: tuple[TextIO, TextIO] | None = None

    def begin(self) -> None:
        """Begin the job."""
        self.place.mkdir(parents=True, exist_ok=True)
        if sys.stdout.isatty():
            self._streams = sys.stdout, sys.stderr
            sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
            sys.stderr = (self.place / f"{self.number}.err").open("a", encoding="utf-8")
        self._write(RUNNING, None)
        threading.Thread(target=self._beat, daemon=True).start()

    def end(self, state: str, result: object) -> None:
        """End the job."""
        self._over.set()
        if self._streams is not None:
            for stream in (sys.stdout, sys.stderr):
                stream.close()
            sys.stdout, sys.stderr = self._streams
        self._write(state, result)

    def _beat(self) -> None:
        while not self._over.wait(1):
            self._write(RUNNING, None)

    def _write(self, state: str, result: object) -> None:
        steps = display().steps
        left = steps.seconds_left() if steps is not None else None
        told = {"state": state, "left": left, "result": result}
        with contextlib.suppress(OSError):  # the sweep has ended
            write_json(self.place / f"{self.number}.json", told)


def _told(place: Path | None, number: int) -> dict[str, Any]:
    assert place is not None
    try:
        return read_json(place / f"{number}.json")
    except (OSError, ValueError):
        return {}


def report_of(number: int) -> JobReport | None:
    """Return the report of a job of a sweep; None if no other process asks for it."""
    asked = os.environ.get(PLACE, "")
    process, _, place = asked.partition(":")
    return JobReport(Path(place), number) if asked and process != str(os.getpid()) else None


def ask_for_reports(study: Path) -> Path:
    """Ask the jobs of other processes to report; return the folder where they will."""
    place = study.absolute() / f".sweep-{os.getpid()}"
    os.environ[PLACE] = f"{os.getpid()}:{place}"
    return place
