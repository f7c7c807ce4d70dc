"""Laws of the key reference: it is complete, says what is checked, and docs/keys.md is it."""

import typing

import pytest
from short_runs import ROOT
from small import composed

from ldt import config
from ldt.callbacks.ldt_loss import LDTLoss
from ldt.cli import run_help
from ldt.config import as_dict, reference
from ldt.config.keys import known_keys
from ldt.config.values import check_against_schema, check_value, checked_kind
from ldt.data.coco import CocoDataModule
from ldt.data.kitti import KittiDataModule
from ldt.data.roadscenes import RoadScenesDataModule
from ldt.loop.schedule import PruningSchedule

KEYS = [key for group in reference.groups() for key in group.keys()]  # noqa: SIM118
NODES = reference.nodes()


def kinds_of(schema):
    hints = typing.get_type_hints(schema, include_extras=True)
    return {name: checked_kind(kind) for name, kind in hints.items()}


def test_every_key_of_the_schema_is_in_it_once_for_each_data_set():
    for schema in (config.RoadScenesConfig, config.KittiConfig, config.CocoConfig):
        own = [g for g in reference.groups() if g.option is None or g.schema is schema]
        names = [key.name for group in own for key in group.keys()]  # noqa: SIM118
        known = set(known_keys(schema))
        nodes = {key for key in known if any(each.startswith(f"{key}.") for each in known)}
        assert set(names) == known - nodes
        assert len(names) == len(set(names))


def test_every_key_and_every_option_is_described():
    missing = [key.name for key in KEYS if not key.meaning]
    missing += [key.name for node in NODES for key in node.keys() if not key.meaning]  # noqa: SIM118
    for group in reference.option_groups():
        missing += [f"{group}={n}" for n, told in reference.options(group).items() if not told]
    assert missing == []


def test_the_page_is_up_to_date():
    told = "run `make docs`, or `python -m ldt.config.reference docs/keys.md`"
    assert (ROOT / "docs/keys.md").read_text(encoding="utf-8") == reference.page(), told


def test_defaults_are_allowed_and_choices_are_what_is_checked():
    for group in reference.groups():
        kinds = kinds_of(group.schema)
        for key in group.keys():  # noqa: SIM118
            kind = kinds[key.name.rpartition(".")[2]]
            if key.default != "???":
                check_value(key.name, key.default, kind)
            if typing.get_origin(kind) is typing.Literal:
                assert key.allowed == ", ".join(typing.get_args(kind))
                with pytest.raises(ValueError, match=key.allowed):
                    check_value(key.name, "surely not", kind)


@pytest.mark.parametrize(
    ("schema", "taker"),
    [
        (config.LDTConfig, LDTLoss.__init__),
        (config.PruneConfig, PruningSchedule),
        (config.RoadScenesConfig, RoadScenesDataModule),
        (config.KittiConfig, KittiDataModule),
        (config.CocoConfig, CocoDataModule),
    ],
)
def test_the_schema_allows_what_its_taker_does(schema, taker):
    """A value that is refused late, by the class, is refused early too."""
    ours, theirs = kinds_of(schema), typing.get_type_hints(taker, include_extras=True)
    limited = {n for n in ours.keys() & theirs.keys() if "Annotated" in repr(theirs[n])}
    limited |= {n for n in ours.keys() & theirs.keys() if "Literal" in repr(theirs[n])}
    limited -= {"budget"}  # the schema knows its alias
    assert limited
    assert {name: ours[name] for name in limited} == {name: theirs[name] for name in limited}


@pytest.mark.slow
def test_the_help_has_every_key_with_its_value():
    for option in ("detector=gfl_tiny", "dataset=kitti", "method=px"):
        found = composed(option, "run_name=x")
        page, plain = run_help.page(found), as_dict(found, resolve=False)
        check_against_schema(plain)
        for group, given in plain.items():
            names = [f"{group}.{key}" for key in given] if isinstance(given, dict) else [group]
            assert not [n for n in names if f"  {n}=" not in page and f"  {n}." not in page]
    assert "  method.criterion.bn=keep " in page


def test_a_class_of_another_package_and_a_comment_beside_a_value():
    (l1,) = (node for node in NODES if node.option == "method=l1")
    (key,) = l1.keys()
    assert (key.name, key.meaning, key.default) == ("method.criterion.p", "power of the norm", 1)


def test_comments_beside_a_key_or_above_it_are_its_meaning(tmp_path, monkeypatch):
    code = '''
from dataclasses import dataclass


@dataclass
class Group:
    """What it is. More."""

    a: int = 1  # beside it
    # above it,
    # in two lines
    b: int = 2

    # not of c, since a line is free

    c: int = 3
'''
    (tmp_path / "some_schema.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    from some_schema import Group  # type: ignore[import-not-found]

    group = reference.Group("group", Group)
    assert group.meaning == "What it is"
    assert [(key.name, key.meaning) for key in group.keys()] == [  # noqa: SIM118
        ("group.a", "beside it"),
        ("group.b", "above it, in two lines"),
        ("group.c", ""),
    ]
