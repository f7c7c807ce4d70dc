"""Dotted names of modules and parameters in a model, and of keys in a configuration."""

from collections.abc import Iterable
from itertools import accumulate


def below(name: str, prefixes: Iterable[str]) -> bool:
    """Return whether a dotted name is one of ``prefixes`` or lies below one of them."""
    known = frozenset(prefixes)
    return any(place in known for place in accumulate(name.split("."), "{}.{}".format))
