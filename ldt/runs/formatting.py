"""Formatting of numbers and texts for tables, figures and the terminal."""

from math import isnan


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


def number(value: float | None, digits: int, scale: float = 1.0) -> str:
    """Format a number for a table; "-" if it is missing or NaN."""
    return "-" if value is None or isnan(value) else f"{value * scale:.{digits}f}"
