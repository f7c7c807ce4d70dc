"""The console: one for all that is printed, and a log handler that does not break a display."""

import logging
import os
import sys
import textwrap
import time
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 200  # characters if the output is not a terminal, so that nothing is truncated
FILE_ONLY: dict[str, Any] = {"file_only": True}  # `extra` of records that a display shows itself
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # in this order, as for Lightning
CONSOLE_ONLY: dict[str, Any] = {"console_only": True}  # not for the log file of a run
printed = 0.0  # time of the last line of a log, in seconds
waiting: list[str] | None = None  # lines of a log that wait for others to be printed first


def rank() -> int:
    """Return the number of this process among those of a run."""
    return next((int(os.environ[key]) for key in RANKS if os.environ.get(key)), 0)


@cache
def terminal() -> "Console":
    """Return the console that displays and all that is printed share."""
    from rich.console import Console

    return Console(highlight=False)


def console() -> "Console":
    """Return the console, one that truncates nothing if the output is not a terminal."""
    if terminal().is_terminal:
        return terminal()
    from rich.console import Console

    return Console(highlight=False, width=PLAIN_WIDTH)


def print_lines(text: str) -> None:
    """Print text, in a terminal wrapped between words; paths remain in one piece."""
    out = console()
    if out.is_terminal:
        text = "\n".join(_wrapped(line, out.width) for line in text.splitlines())
    out.print(text, markup=False, emoji=False, soft_wrap=True)


def _wrapped(line: str, width: int) -> str:
    """Wrap a line of the log; what follows is below the message, not below the time."""
    time, gap, message = line.partition("  ")
    indent = " " * (len(time + gap) if message and time.strip() else len(line) - len(line.lstrip()))
    longest = max(map(len, line.split()), default=0)
    if len(indent) + longest > width:  # a path, which the terminal breaks where it must
        return line
    return textwrap.fill(
        line.expandtabs(),
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        drop_whitespace=True,
    )


class ConsoleHandler(logging.StreamHandler):
    """Print log records on stdout, above the display in progress; those of the first process.

    Args:
        stream: not used; Hydra's logging configuration has it.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        if getattr(record, "file_only", False) or (rank() and record.levelno < logging.ERROR):
            return
        global printed
        printed = time.monotonic()
        try:
            text = self.format(record)
            if waiting is not None:
                waiting.append(text)
            else:
                print_lines(text)
        except Exception:
            self.handleError(record)


class LogFile(logging.FileHandler):
    """The log file of a run, without lines that concern the console alone."""

    def filter(self, record: logging.LogRecord) -> bool | logging.LogRecord:
        """Tell whether a record belongs to the file."""
        return not getattr(record, "console_only", False) and super().filter(record)
