"""Numbers as tables and figures show them."""

from math import isnan


def number(value: float | None, digits: int, scale: float = 1.0) -> str:
    """Return a number for a table; "-" where nothing was measured."""
    return "-" if value is None or isnan(value) else f"{value * scale:.{digits}f}"
