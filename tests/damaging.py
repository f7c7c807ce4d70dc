"""Documents with a damaged part, for tests of parsers under hypothesis."""

import json
from typing import Any

from hypothesis import strategies as st


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
