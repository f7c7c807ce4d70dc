"""Dotted names of modules and parameters in a model, and of keys in a configuration."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import accumulate


def below(name: str, prefixes: Iterable[str]) -> bool:
    """Return whether a dotted name is one of ``prefixes`` or lies below one of them."""
    known = frozenset(prefixes)
    return any(place in known for place in accumulate(name.split("."), "{}.{}".format))


def choices(given: str, known: Sequence[str]) -> str:
    """Return what could have been given, and which of it was perhaps meant."""
    nearest = get_close_matches(given.lower(), known, 1)
    meant = f"did you mean {nearest[0]}? " if nearest else ""
    return f"{meant}choose from {', '.join(known)}"
