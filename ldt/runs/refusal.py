"""Marking of user errors found before any work: exit code 2 and a one-line message."""

import contextlib
from collections.abc import Iterator

from omegaconf.errors import OmegaConfBaseException

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


def is_refusal(error: BaseException) -> bool:
    """Whether an exception was marked by :func:`refusing` or :func:`refused`."""
    return getattr(error, "refused", False)
