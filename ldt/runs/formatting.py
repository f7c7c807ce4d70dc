"""Formatting of numbers and texts for tables, figures and the terminal."""

from collections.abc import Mapping
from math import isnan, nan
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


def speed_up(row: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """Return the base's latency over a round's; NaN unless both were timed on one machine."""
    place = ("threads", "device")
    if not row.get("latency_ms") or not base.get("latency_ms"):
        return nan
    if [row.get(key) for key in place] != [base.get(key) for key in place]:
        return nan
    return base["latency_ms"] / row["latency_ms"]


def number(value: float | None, digits: int, scale: float = 1.0, sign: bool = False) -> str:
    """Format a number for a table; "-" if it is missing or NaN.

    Args:
        value: in base units.
        digits: after the point.
        scale: factor to the shown unit.
        sign: whether positive numbers have a sign too.
    """
    if value is None or isnan(value):
        return "-"
    return f"{value * scale:{'+' * sign}.{digits}f}"
