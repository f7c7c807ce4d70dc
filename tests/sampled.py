"""Laws that hold for many things, each of which takes long to try."""

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], kept: int = 1) -> list[Any]:
    """Parameters of which `make test` takes the first few and `make test-all` takes all."""
    parameters = [value if isinstance(value, tuple) else (value,) for value in values]
    marks = [()] * kept + [(pytest.mark.long,)] * len(parameters)
    return [pytest.param(*p, marks=m) for p, m in zip(parameters, marks, strict=False)]
