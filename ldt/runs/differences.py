"""Comparison of nested configurations."""

from collections.abc import Mapping
from typing import Any

NOT_SET = "(not set)"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """List the differences between two nested dicts.

    Args:
        old: plain data, possibly nested dicts.
        new: the same.

    Returns:
        (dotted key, old value, new value), sorted by key; missing values are ``(not set)``. Lists
        are compared as single values.
    """
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*old, *new}):
        there, now = old.get(key, NOT_SET), new.get(key, NOT_SET)
        if there == now and (key in old) == (key in new):
            continue
        if _nests(there, key in old, now, key in new):
            inner = differences(there if key in old else {}, now if key in new else {})
            found += [(f"{key}.{name}", *values) for name, *values in inner]
        else:
            found.append((key, there, now))
    return sorted(found, key=lambda difference: difference[0])


def _nests(there: object, has_old: bool, now: object, has_new: bool) -> bool:
    """Whether to recurse: all present values are dicts and at least one is not empty."""
    sides = [value for value, has in ((there, has_old), (now, has_new)) if has]
    return all(isinstance(value, dict) for value in sides) and any(sides)
