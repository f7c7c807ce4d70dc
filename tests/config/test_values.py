"""Laws of values: out of range, of another kind or unknown, they are told in one way."""

import inspect
import math
import re
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from small import composed
from torch import Tensor

from ldt import config, discriminant, location
from ldt.callbacks.ldt_loss import LDTLoss
from ldt.config.values import (
    Count,
    NaturalNumber,
    NotNegative,
    Positive,
    Share,
    check_arguments,
    check_value,
    checked,
)
from ldt.criteria import measures
from ldt.criteria.ldt import LDTCriterion
from ldt.loop.schedule import PruningSchedule
from ldt.pruning.budget import Limits

NUMBERS = st.one_of(st.floats(), st.integers(-5, 5), st.booleans(), st.text(max_size=3), st.none())


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


ALLOWED = {
    Share: lambda x: is_number(x) and 0 < x < 1,
    Positive: lambda x: is_number(x) and x > 0,
    NotNegative: lambda x: is_number(x) and x >= 0,
    Count: lambda x: is_number(x) and isinstance(x, int) and x >= 1,
    NaturalNumber: lambda x: is_number(x) and isinstance(x, int) and x >= 0,
}


@pytest.mark.parametrize("kind", ALLOWED)
@given(value=NUMBERS)
def test_a_range_takes_what_lies_in_it(kind, value):
    try:
        check_value("a.b", value, kind, 7)
    except ValueError as error:
        assert not ALLOWED[kind](value)
        assert str(error).startswith(f"a.b={value!r}; allowed: a ")
        share = r"|0\.\d+" if kind is Share else ""  # of a percentage
        assert re.search(rf"\(e\.g\. a\.b=(7{share})\)$", str(error))
    else:
        assert ALLOWED[kind](value)


@pytest.mark.parametrize(
    ("value", "kind", "example", "told"),
    [
        (-3.0, Share, 0.005, "x=-3.0; allowed: a number above 0 and below 1 (e.g. x=0.005)"),
        (30, Share, 0.005, "x=30; allowed: a number above 0 and below 1 (e.g. x=0.3)"),
        ("30%", Share, 0.5, "x='30%'; allowed: a number above 0 and below 1 (e.g. x=0.3)"),
        (0, Count, 2, "x=0; allowed: a whole number of at least 1 (e.g. x=2)"),
        (-1, NotNegative, None, "x=-1; allowed: a number of at least 0"),
        ("nek", Literal["neck", "power"], None, "x='nek'; allowed: neck, power (e.g. x=neck)"),
        ("maybe", bool, True, "x='maybe'; allowed: true or false (e.g. x=true)"),
        (-1, Positive | None, None, "x=-1; allowed: a number above 0 or null"),
        (3, Path, None, "x=3; allowed: Input should be an instance of Path"),
    ],
)  # fmt: skip
def test_the_wording(value, kind, example, told):
    with pytest.raises(ValueError, match="allowed") as raised:
        check_value("x", value, kind, example)
    assert str(raised.value) == told


def test_types_that_a_configuration_cannot_hold_are_let_through():
    check_value("x", "/a/b", Path)
    check_value("x", 3, Tensor)
    check_value("x", None, Share | None)
    check_value("x", [1, 2], tuple[int, ...])


def test_a_constructor_is_checked_however_it_is_called():
    class Both:
        @checked("group")
        def __init__(self, share: Share, count: Count = 3) -> None:
            self.share, self.count = share, count

    assert (Both(0.5).count, Both(0.1, count=4).count) == (3, 4)
    for arguments, named in (((2.0,), {}), ((0.5,), {"count": 0}), ((), {"share": math.nan})):
        with pytest.raises(ValueError, match=r"group.(share|count)="):
            Both(*arguments, **named)
    with pytest.raises(ValueError, match=r"group.cuont=1: unknown key; did you mean group.count"):
        check_arguments("group", Both, {"cuont": 1})
    assert list(inspect.signature(Both).parameters) == ["share", "count"]


# One definition of each default -------------------------------------------------------------------


def defaults(call):
    return {
        name: parameter.default
        for name, parameter in inspect.signature(call).parameters.items()
        if parameter.default is not parameter.empty
    }


def test_conf_and_code_have_the_same_defaults():
    ldt = OmegaConf.to_container(composed("detector=gfl").ldt, resolve=True)
    ldt.pop("enabled")
    assert ldt.pop("background") == config.LDTConfig().background
    assert ldt == defaults(LDTLoss)
    criterion = OmegaConf.to_container(composed("detector=gfl").method.criterion, resolve=True)
    criterion.pop("_target_")
    assert criterion == defaults(LDTCriterion)
    prune, plan, limits = composed().prune, defaults(PruningSchedule), defaults(Limits)
    schema = config.PruneConfig()
    for key in ("budget", "images", "batch_size"):
        assert prune[key] == getattr(schema, key) == plan[key]
    for key in ("max_layer_rate", "min_channels"):
        assert prune[key] == getattr(schema, key) == limits[key]
    assert tuple(prune.scope) == tuple(schema.scope) == plan["scope"]
    assert config.MethodConfig().ranking == plan["ranking"]
    assert config.MethodConfig().inner_rounds == plan["inner_rounds"]


def test_the_mathematics_has_one_definition_of_each_default():
    names = {
        "phi": discriminant.PHI,
        "ridge": discriminant.RIDGE,
        "absolute": discriminant.RIDGE_ABSOLUTE,
        "a": location.ATTENTION_A,
        "b": location.ATTENTION_B,
    }
    found = [
        (name, value)
        for module in (discriminant, location, measures)
        for function in vars(module).values()
        if inspect.isfunction(function)
        for name, value in defaults(function).items()
        if name in names
    ]
    assert len(found) >= 10
    assert all(value == names[name] for name, value in found)
