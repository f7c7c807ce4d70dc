"""Dotted names of modules and parameters in a model, and of keys in a configuration."""

from collections.abc import Iterable


def below(name: str, prefixes: Iterable[str]) -> bool:
    """Return whether a dotted name is one of ``prefixes`` or lies below one of them."""
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)
