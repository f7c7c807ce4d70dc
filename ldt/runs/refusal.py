"""Errors that refuse a command before any work: they end it with exit code 2 and one line."""

import contextlib
from collections.abc import Iterator

from omegaconf.errors import OmegaConfBaseException

KINDS = (  # how the checks of a configuration, of arguments and of their files speak
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
    """Mark errors of the block as refusals; they keep their types and pass on.

    Args:
        kinds: the types that are marked; none given means :data:`KINDS`.
    """
    marked = kinds or KINDS
    try:
        yield
    except marked as error:
        refused(error)
        raise


def refused(error: Exception) -> Exception:
    """Mark one error as a refusal and return it."""
    setattr(error, "refused", True)  # noqa: B010 (an attribute that no type checker knows)
    return error


def is_refusal(error: BaseException) -> bool:
    """Whether an error was raised below :func:`refusing` or marked by :func:`refused`."""
    return getattr(error, "refused", False)
