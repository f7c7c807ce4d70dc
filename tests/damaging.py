"""Damaged documents, for tests of parsers under hypothesis."""

import json
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TIMES = int(os.environ.get("LDT_FUZZ", "1"))  # as many examples as the gate tries


def fuzzed(examples: int) -> settings:
    """Settings under which a parser meets some examples, or `LDT_FUZZ` times as many."""
    shared = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=TIMES * examples, deadline=20_000, suppress_health_check=shared)


@st.composite
def damaged(draw: st.DrawFn, good: Any, anything: st.SearchStrategy) -> Any:
    """A good document with one part anywhere replaced by anything, or taken away."""
    content = json.loads(json.dumps(good))
    place: Any = content
    while True:
        key = draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        inner = place[key]
        if isinstance(inner, (dict, list)) and inner and draw(st.booleans()):
            place = inner
            continue
        if draw(st.booleans()) or isinstance(place, list):
            place[key] = draw(anything)
        else:
            del place[key]
        return content
