"""Exit codes of all commands.

- 0: success.
- 1: failure while running. Errors from ldt's own checks and from the operating system are printed
  as one line on stderr, any other error with its traceback.
- 2: invalid arguments or configuration, reported before any work in one line on stderr.
- 130: interrupted with Ctrl-C.

With HYDRA_FULL_ERROR=1 in the environment all errors are printed with a traceback.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import click

from ldt.runs.refusal import is_refusal, one_line

FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR") == "1"


@contextlib.contextmanager
def exit_codes(told: Callable[[Exception], str] = str) -> Iterator[None]:
    """Convert an exception raised in the block to an exit code.

    Args:
        told: formats an exception as a message for users.

    Raises:
        SystemExit: the block raised an exception.
    """
    try:
        yield
    except (KeyboardInterrupt, click.Abort):
        _end(130, "interrupted")
    except click.UsageError as error:
        shown = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        _end(2, error.format_message().rstrip(".") + shown)
    except Exception as error:
        if FULL_ERROR:
            traceback.print_exc()
        if is_refusal(error):
            _end(2, told(error))
        if _is_explained(error):
            _end(1, told(error))
        if not FULL_ERROR:
            traceback.print_exc()
        sys.exit(1)


def _is_explained(error: Exception) -> bool:
    """Whether the message suffices without traceback: it is from ldt or the operating system."""
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    names = (raised_in, type(error).__module__)  # torch raises our errors of a loader's processes
    ours = any(name.partition(".")[0] == "ldt" for name in names)
    return (ours and isinstance(error, (ValueError, ImportError))) or isinstance(error, OSError)


def _end(code: int, message: str) -> NoReturn:
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    sys.exit(code)
