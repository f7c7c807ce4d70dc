"""The display of a run in progress: lines that renew themselves, or lines of a log."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from ldt.progress import console as consoles
from ldt.progress.console import print_lines, rank
from ldt.progress.steps import DRAW, MEASURE, SCORE, Step, Steps

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

log = logging.getLogger(__name__)
T = TypeVar("T")
ANNOUNCED = (MEASURE, SCORE, DRAW)  # steps of which a log has no other line for a while
FRAMES = 2  # per second
AT_FIRST = 1.0  # seconds before the first line of a log
SILENCE = 5.0  # seconds without a line of a log, at least
GROWTH = 0.1  # or this share of a step's time so far: a long step has few lines


class Display:
    """What is shown while something is running, in a terminal or in a log.

    Attributes:
        steps: those of the run in progress.
        status: what is being done while there are no steps yet.
        note: a further word on the current step.
        above: draws what is shown above the steps, such as the table of a sweep.
    """

    def __init__(self) -> None:
        self.steps: Steps | None = None
        self.status = self.note = ""
        self.above: Callable[[], RenderableType] | None = None
        self.depth = 0
        self._live: Live | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    # Start and end --------------------------------------------------------------------------

    def open(self) -> None:
        """Start to show what there is."""
        if self._live is not None or self._thread is not None:
            return
        if consoles.terminal().is_interactive:
            from rich.live import Live

            self._live = Live(
                console=consoles.terminal(),
                get_renderable=self.draw,
                refresh_per_second=FRAMES,
                transient=True,
            )
            self._live.start(refresh=True)
        else:
            self._over.clear()
            consoles.printed = time.monotonic() + AT_FIRST - SILENCE
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Remove what is shown."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()
        if self._thread is not None:
            self._over.set()
            self._thread = None

    def forget(self) -> None:
        """Show nothing in a forked process: its parent does."""
        if self._live is not None:
            sys.stdout = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
            sys.stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
        self.__init__()

    def _beat(self) -> None:
        """Write a line where none has been written for long."""
        while not self._over.wait(SILENCE / 10):
            if (line := self.line()) and self._is_due():
                consoles.printed = time.monotonic()  # also where nothing prints what is logged
                log.info(line, extra=None if self.steps else consoles.CONSOLE_ONLY)

    def _is_due(self) -> bool:
        step = self.steps.current if self.steps is not None else None
        now = time.monotonic()
        so_far = 0.0 if step is None or step.started is None else now - step.started
        return now - consoles.printed >= max(SILENCE, GROWTH * so_far)

    # What is shown --------------------------------------------------------------------------

    def line(self) -> str:
        """Return where the run is, as a line of a log."""
        if self.steps is None or self.steps.current is None:
            return self.status
        parts = [self.steps.label(), epoch_of(self.steps.current), self.note, self._time()]
        return "  ".join(part for part in parts if part)

    def _time(self) -> str:
        assert self.steps is not None
        return f"{self.steps.share():.0%}{_left(self.steps)}"

    def draw(self) -> RenderableType:
        """Draw the lines of a terminal."""
        from rich.console import Group

        parts: list[RenderableType] = []
        if self.above is not None:
            parts.append(self.above())
        if self.steps is None or self.steps.current is None:
            if self.status:
                parts.append(_spinning(self.status))
        else:
            parts += [_bars(self.steps, self.note), _outline(self.steps)]
        return Group(*parts)


def _spinning(text: str) -> RenderableType:
    from rich.text import Text

    dots = "." * (1 + int(time.monotonic() * FRAMES) % 3)
    return Text(f"{text} {dots}", no_wrap=True, overflow="ellipsis")


def _bars(steps: Steps, note: str) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    step = steps.current
    assert step is not None
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(no_wrap=True)
    known = bool(step.images)
    table.add_row(
        Text(steps.label(), style="bold"),
        ProgressBar(step.images if known else None, min(step.done, step.images or 0.0)),
        Text("  ".join(part for part in (epoch_of(step), note or _pace(steps)) if part)),
    )
    times = f"{clock(steps.seconds())}{_left(steps)}"
    table.add_row(
        Text(f"step {steps.number} of {len(steps.all)}"), ProgressBar(1.0, steps.share()), times
    )
    return table


def _outline(steps: Steps) -> RenderableType:
    """Name all steps, those of other rounds than the current one as one."""
    from rich.text import Text

    now, names = steps.current, []
    assert now is not None
    for step in steps.all:
        past = steps.all.index(step) < steps.number - 1
        style = "bold" if step is now else ("dim" if past else "")
        name = step.name if step.round in (0, now.round) else f"round {step.round}"
        if name not in [shown for shown, _ in names[-1:]]:
            names.append((f"[{name}]" if step is now else name, style))
    text = Text(no_wrap=True, overflow="ellipsis")
    for i, (name, style) in enumerate(names):
        text.append(" > " * (i > 0), style="dim")
        text.append(name, style=style)
    return text


def epoch_of(step: Step) -> str:
    """Return the epoch of a step of training, empty for others."""
    if not step.is_training or not step.epoch:
        return ""
    return f"epoch {step.epoch}/{step.epochs}" if step.epochs else f"epoch {step.epoch}"


def _left(steps: Steps) -> str:
    seconds = steps.seconds_left()
    return f", about {clock(seconds)} left" if seconds and round(seconds) else ""


def _pace(steps: Steps) -> str:
    step = steps.current
    assert step is not None
    if step.started is None or (images := step.done - step.before) <= 0:
        return ""
    return f"{images / max(1e-9, steps.clock() - step.started):.3g} images/s"


def clock(seconds: float) -> str:
    """Format a duration: ``2:10``, ``1:02:10``, ``27:00:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# One display for a process ----------------------------------------------------------------------

_display = Display()
os.register_at_fork(after_in_child=lambda: _display.forget())


@contextlib.contextmanager
def running(text: str = "") -> Iterator[None]:
    """Show what is running in the block; of blocks in one another the inner one is shown.

    Only the first of several processes shows anything.

    Args:
        text: what is being done until there are steps.
    """
    here = _display
    before = (here.steps, here.status, here.note)
    here.steps, here.status, here.note = None, text, ""
    here.depth += 1
    if not rank():
        here.open()
    try:
        yield
    finally:
        here.depth -= 1
        here.steps, here.status, here.note = before
        if not here.depth:
            here.close()


def track(items: Sequence[T], text: str) -> Iterator[T]:
    """Yield items, showing how many of them have begun: ``timing layers 3/40``."""
    with running():
        for place, item in enumerate(items, 1):
            status(f"{text} {place}/{len(items)}")
            yield item


def pause() -> None:
    """Show nothing until the end of the outermost block."""
    _display.close()


def status(text: str) -> None:
    """Say what is being done before the steps of a run are known."""
    _display.status = text


def show(steps: Steps) -> None:
    """Show the steps of a run."""
    _display.steps = steps


def begin(name: str, round_: int = 0) -> Step | None:
    """Begin a step of the run in progress (:mod:`ldt.progress.steps`)."""
    _display.note = ""
    if _display.steps is None:
        return None
    known = _display.steps.current
    step = _display.steps.begin(name, round_)
    if step is not known and name in ANNOUNCED:
        say(_display.line())
    return step


def advance(images: float) -> None:
    """Count processed images of the current step."""
    if _display.steps is not None and _display.steps.current is not None:
        _display.steps.current.done += images


def current_steps() -> Steps | None:
    """Return the steps of the run in progress."""
    return _display.steps


def left() -> str:
    """Return the estimate of the time left, to end a line with; empty if there is none."""
    return _left(_display.steps) if _display.steps is not None else ""


def note(text: str) -> None:
    """Add a word on the current step."""
    _display.note = text


def say(text: str) -> None:
    """Log a line of which a display in a terminal shows the same: there it is for the file only."""
    log.info(text, extra=consoles.FILE_ONLY if _display._live is not None else None)


def display() -> Display:
    """Return the display of this process."""
    return _display


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Print what is logged in the block at its end: after what it prints itself."""
    before = consoles.waiting
    consoles.waiting = [] if before is None else before
    try:
        yield
    finally:
        lines, consoles.waiting = consoles.waiting, before
        if before is None:
            for line in lines or []:
                print_lines(line)
