"""Marking of user errors found before any work: exit code 2 and a one-line message."""

import contextlib
from collections.abc import Iterator, Mapping

from omegaconf.errors import OmegaConfBaseException

from ldt.runs.formatting import printable

KINDS = (  # raised by checks of configurations, arguments and files
    ValueError,
    OmegaConfBaseException,
    ImportError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


class Failed(float):
    """NaN as the result of a job of a sweep that failed."""


class Refused(Failed):
    """NaN as the result of a job of a sweep that was refused before any work."""


@contextlib.contextmanager
def refusing(*kinds: type[Exception]) -> Iterator[None]:
    """Mark exceptions raised in the block as refusals and re-raise them unchanged.

    Args:
        kinds: exception types to mark; default: :data:`KINDS`.
    """
    marked = kinds or KINDS
    try:
        yield
    except marked as error:
        refused(error)
        raise


def refused(error: Exception) -> Exception:
    """Mark an exception as a refusal and return it."""
    setattr(error, "refused", True)  # noqa: B010 (an attribute that no type checker knows)
    return error


def one_line(message: object, most: int = 2000) -> str:
    """Return a message, or that of an exception, without line breaks and control characters.

    Args:
        message: the message.
        most: characters of it that are kept; names in a stranger's file may have any length.
    """
    text = printable(" ".join(str(message).split()))
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


@contextlib.contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Replace keys of the configuration by what the caller calls them, in messages of the block.

    Args:
        names: what to call each key.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        for key in sorted(names, key=len, reverse=True):
            text = text.replace(key, names[key])
        error.args = (text,)
        raise


def is_refusal(error: BaseException) -> bool:
    """Whether an exception was marked by :func:`refusing` or :func:`refused`."""
    return getattr(error, "refused", False)
