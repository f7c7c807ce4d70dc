"""Sweeps over unions of grids; few tables of the paper are one full Cartesian product."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override


def jobs(
    params: Mapping[str, object], grids: Sequence[Mapping[str, object]], given: Sequence[str]
) -> list[list[str]]:
    """Return the overrides of every job of a sweep, without duplicates, in the order of the grids.

    Args:
        params: swept keys with their values, ``{"prune.rate": "0.5,0.7"}``, added to every grid.
        grids: each is expanded to the product of its values; no grids means one empty grid.
        given: overrides of the command line. A value listed by some grids is run in those only,
            any other value in all grids; a grid without a value left for a key is dropped.

    Returns:
        A list of overrides for each job.
    """
    tables = [_values(f"{k}={v}" for k, v in {**params, **grid}.items()) for grid in grids or [{}]]
    for key, wanted in _values(given).items():
        listed = {value for table in tables for value in table.get(key, ())}
        for table in tables:
            own = table.get(key, ())
            table[key] = [value for value in wanted if value in own or value not in listed]
        tables = [table for table in tables if table[key]]
    found = (job for table in tables for job in product(*map(_written, table.items())))
    return [list(job) for job in dict.fromkeys(found)]


def parse(overrides: Iterable[str]) -> list[Override]:
    """Parse overrides as Hydra does."""
    return OverridesParser.create().parse_overrides(list(overrides))


def _values(overrides: Iterable[str]) -> dict[str, list[str]]:
    """Return the values of each key; the last override of a key wins."""
    found = {}
    for override in parse(overrides):
        values = (
            list(override.sweep_string_iterator())
            if override.is_sweep_override()
            else [override.get_value_element_as_str()]
        )
        found[override.get_key_element()] = values
    return found


def _written(item: tuple[str, list[str]]) -> list[str]:
    key, values = item
    return [f"{key}={value}" for value in values]
