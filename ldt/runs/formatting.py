"""Formatting of numbers and texts for tables, figures and the terminal."""

from collections.abc import Mapping
from math import isnan
from typing import Any

NOISY = 1.25  # of a latency: its 90th percentile over its median
TILDE = (
    f"~: noisy, the 90th percentile of the calls is over {NOISY} times their median; measure again "
    "with nothing else running"
)


def printable(text: str) -> str:
    """Replace what cannot be printed: escape sequences of files would steer the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def check_printable(text: str) -> str:
    """Return a text of somebody's file if all of it can be printed.

    Raises:
        ValueError: it cannot.
    """
    if not text.isprintable():
        raise ValueError("has characters that cannot be printed")
    return text


def tilde(*rows: Mapping[str, Any], key: str = "latency_ms") -> str:
    """Return "~" if a row's 90th percentile is far above its median: others used the machine.

    Args:
        rows: of rounds or of other measurements.
        key: of the median; that of the percentile has ``_p90_ms``.
    """
    pairs = ((row.get(key), row.get(key.replace("_ms", "_p90_ms"))) for row in rows)
    return "~" * any(median and slow and slow > NOISY * median for median, slow in pairs)


def number(value: float | None, digits: int, scale: float = 1.0) -> str:
    """Format a number for a table; "-" if it is missing or NaN."""
    return "-" if value is None or isnan(value) else f"{value * scale:.{digits}f}"
