"""Dotted names: of modules and parameters in a model, of keys in a configuration."""

from collections.abc import Iterable


def below(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a dotted name is one of ``prefixes`` or lies below one."""
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)
