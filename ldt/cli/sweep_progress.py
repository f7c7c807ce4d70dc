"""The jobs of a sweep while they run: one table that renews itself, or a line for each of them."""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, Any

from ldt.progress.display import clock, display

if TYPE_CHECKING:
    from rich.console import RenderableType

log = logging.getLogger(__name__)
LEFT_FREE = 12  # lines of the terminal that the table leaves to others
WAITING, RUNNING, FINISHED, FAILED, REFUSED = "waiting", "running", "finished", "failed", "refused"
STYLES = {RUNNING: "bold", FINISHED: "green", FAILED: "red", REFUSED: "red"}


@dataclass
class SweepJob:
    """A job of a sweep.

    Attributes:
        cell: its overrides that other jobs do not share.
        state: one of the constants of this module.
        result: its headline metric, or its objectives.
        started: time of its beginning in seconds.
        seconds: how long it took.
    """

    cell: str
    state: str = WAITING
    result: Any = None
    started: float = 0.0
    seconds: float = 0.0


def cells(batch: Sequence[Sequence[str]]) -> list[str]:
    """Return of every job the overrides that tell it from the others."""
    shared = set.intersection(*(set(job) for job in batch)) if len(batch) > 1 else set()
    return [" ".join(key for key in job if key not in shared) for job in batch]


class SweepProgress:
    """The jobs that run one after another in this process, and those that other processes run.

    Attributes:
        jobs: in their order.
    """

    def __init__(self) -> None:
        self.jobs: list[SweepJob] = []

    def add(self, batch: Sequence[Sequence[str]]) -> None:
        """Add the jobs of a batch."""
        self.jobs += [SweepJob(cell) for cell in cells(batch)]

    def start(self, number: int) -> None:
        """Begin a job, counted from 0."""
        if number >= len(self.jobs):
            return
        job = self.jobs[number]
        job.state, job.started = RUNNING, time.monotonic()
        log.info("job %d of %d: %s", number + 1, len(self.jobs), job.cell)

    def end(self, number: int, state: str, result: Any) -> None:
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

    def seconds_left(self) -> float | None:
        """Estimate the time that is left; None before a job has ended."""
        ended = [job.seconds for job in self.jobs if job.state == FINISHED]
        if not ended:
            return None
        mean = sum(ended) / len(ended)
        waiting = sum(job.state == WAITING for job in self.jobs)
        return waiting * mean + sum(
            self._left(job, mean) for job in self.jobs if job.state == RUNNING
        )

    def _left(self, job: SweepJob, mean: float) -> float:
        steps = display().steps
        left = steps.seconds_left() if steps is not None else None
        return max(0.0, mean - (time.monotonic() - job.started)) if left is None else left

    def draw(self) -> "RenderableType":
        """Draw the table: as many jobs around the current one as there is room for."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

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
                Text(job.cell),
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
        steps = display().steps
        left = steps.seconds_left() if steps is not None else None
        return clock(time.monotonic() - job.started), "" if left is None else clock(left)

    def _window(self) -> tuple[int, int]:
        """Return the first job that is shown, and the one after the last."""
        room = max(3, os.get_terminal_size().lines - LEFT_FREE) if os.isatty(1) else len(self.jobs)
        running = (i for i, job in enumerate(self.jobs) if job.state in (RUNNING, WAITING))
        now = next(running, len(self.jobs))
        first = max(0, min(now - room // 2, len(self.jobs) - room))
        return first, min(first + room, len(self.jobs))


def shown(result: Any) -> str:
    """Format the result of a job."""
    values = result if isinstance(result, tuple) else (result,)
    return ", ".join(_number(value) for value in values if isinstance(value, float | int))


def _number(value: float) -> str:
    if isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
