"""Number formatting for tables and figures."""

from math import isnan


def number(value: float | None, digits: int, scale: float = 1.0) -> str:
    """Format a number for a table; "-" if it is missing or NaN."""
    return "-" if value is None or isnan(value) else f"{value * scale:.{digits}f}"
