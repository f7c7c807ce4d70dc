"""What every configuration key means and allows, for `ldt run --help` and docs/keys.md.

Read from what defines it: the schema with its comments, the comments of the options in ``conf/``,
and the docstrings of the classes that take the other keys. These are read, not imported, so that
help comes at once. ``python -m ldt.config.reference docs/keys.md`` writes the page.
"""

import ast
import builtins
import dataclasses
import inspect
import io
import itertools
import re
import sys
import tokenize
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

from ldt.config import DATASETS, Config, DatasetConfig, conf_dir, kinds
from ldt.config.values import checked_kind, described, typed

GRADUAL = "ldt.loop.gradual_masking.GradualPruning"  # takes the keys of method.gradual
NAMES = {**vars(builtins), **vars(typing), **vars(kinds)}  # in annotations


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        name: dotted.
        meaning: in a phrase.
        allowed: the values; empty where any is, or where the meaning tells.
        default: of the schema or the class; :data:`omegaconf.MISSING` without one.
    """

    name: str
    meaning: str
    allowed: str
    default: object


@dataclass(frozen=True)
class Group:
    """The keys of a dataclass of the schema.

    Attributes:
        name: as in ``name=option``; empty for the keys of no group.
        schema: the dataclass.
        option: the option that has these keys; None for all.
    """

    name: str
    schema: type
    option: str | None = None

    @property
    def meaning(self) -> str:
        """What the keys are about, in a sentence."""
        return sentence(inspect.getdoc(self.schema) or "")

    def keys(self) -> list[Key]:
        """Return the keys that the dataclass itself declares, without groups and nodes."""
        hints = typing.get_type_hints(self.schema, include_extras=True)
        comments = _comments(self.schema)
        return [
            Key(
                f"{self.name}.{item.name}".lstrip("."),
                comments.get(item.name, ""),
                described(checked_kind(hints[item.name])),
                _default(item),
            )
            for item in dataclasses.fields(self.schema)
            if item.name in vars(self.schema)["__annotations__"]
            and not _is_group(self.schema, item)
        ]


def groups() -> list[Group]:
    """Return the groups of the schema; first the keys that belong to none."""
    return [
        *_groups_of("", Config),
        Group("dataset", DatasetConfig),
        *(Group("dataset", schema, option) for option, schema in DATASETS.items()),
    ]


def _groups_of(name: str, schema: type) -> Iterator[Group]:
    """Yield the keys of a dataclass, then those of its dataclasses."""
    yield Group(name, schema)
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(item.type):
            yield from _groups_of(f"{name}.{item.name}".lstrip("."), typing.cast(type, item.type))


def options(group: str) -> dict[str, str]:
    """Return the options of a group, a folder of ``conf/``, with their first sentences."""
    found = sorted((conf_dir() / group).glob("*.yaml"))
    return {file.stem: sentence(_heading(file.read_text(encoding="utf-8"))) for file in found}


def option_groups() -> list[str]:
    """Return the names of all groups that have options."""
    folders = {file.parent for file in conf_dir().glob("*/**/*.yaml")}
    return sorted(folder.relative_to(conf_dir()).as_posix() for folder in folders)


@dataclass(frozen=True)
class Node:
    """A node of an option whose keys are arguments of a class.

    Attributes:
        option: such as ``method=ldt``.
        where: such as ``method.criterion``.
        target: the class.
    """

    option: str
    where: str
    target: str

    def keys(self) -> list[Key]:
        """Return the keys that the option gives, with their values in it."""
        file, given = _option(self.option)
        for part in self.where.split(".")[1:]:
            given = given[part]
        names = [name for name in given if not name.startswith("_")]
        arguments = class_keys(self.where, self.target, names)
        beside = dict(re.findall(r"^ *(\w+):[^#\n]*# (.*)$", file, re.MULTILINE))
        return [
            dataclasses.replace(
                key,
                meaning=key.meaning or beside.get(name, ""),
                default=given.get(name),
            )
            for name, key in zip(names, arguments, strict=True)
        ]


def nodes() -> list[Node]:
    """Return the nodes of all options whose keys become arguments, but those of data sets."""
    found = []
    for group, where in (("method", "method.criterion"), ("logger", "logger")):
        for name in options(group):
            option = f"{group}={name}"
            _, plain = _option(option)
            inner = plain.get("criterion") if group == "method" else plain
            if inner and "_target_" in inner:
                found.append(Node(option, where, inner["_target_"]))
            if "gradual" in plain:
                found.append(Node(option, "method.gradual", GRADUAL))
    return found


def class_keys(where: str, target: str, names: Iterable[str]) -> list[Key]:
    """Return keys that become arguments of a class, without meanings if it is another package's.

    Args:
        where: the node of the configuration, such as ``method.criterion``.
        target: the class as in ``_target_``.
        names: the arguments.
    """
    told: dict[str, str] = {}
    kinds_of: dict[str, Any] = {}
    if target.startswith("ldt."):
        module, _, name = target.rpartition(".")
        file = Path(str(files("ldt"))).joinpath(*module.split(".")[1:]).with_suffix(".py")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        (node,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
        told, known = _arguments(ast.get_docstring(node) or ""), {**NAMES, **_literals(tree)}
        for init in node.body:
            if isinstance(init, ast.FunctionDef) and init.name == "__init__":
                kinds_of = {a.arg: _evaluated(a.annotation, known) for a in init.args.args}
    return [
        Key(f"{where}.{name}", told.get(name, ""), described(kinds_of.get(name, Any)), MISSING)
        for name in names
    ]


def sentence(text: str) -> str:
    """Return the first sentence of a text without its full stop."""
    text = " ".join(text.split())
    return re.split(r"\.(?= [A-Z`]|$)", text, maxsplit=1)[0].replace("``", "`")


def _is_group(schema: type, item: "dataclasses.Field[Any]") -> bool:
    return dataclasses.is_dataclass(item.type) or (schema is Config and item.name == "dataset")


def _option(option: str) -> tuple[str, dict[str, Any]]:
    """Return the text and the content of an option's file."""
    group, _, name = option.partition("=")
    text = (conf_dir() / group / f"{name}.yaml").read_text(encoding="utf-8")
    return text, yaml.safe_load(text) or {}


def _default(item: "dataclasses.Field[Any]") -> object:
    return item.default_factory() if callable(item.default_factory) else item.default


def _comments(schema: type) -> dict[str, str]:
    """Comments of the fields of a dataclass: beside them, else on the lines above."""
    code = Path(inspect.getfile(schema)).read_text(encoding="utf-8")
    (node,) = (
        node
        for node in ast.parse(code).body
        if isinstance(node, ast.ClassDef) and node.name == schema.__name__
    )
    comments, found = _comment_lines(code), {}
    for field in node.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        lines = range(field.lineno, (field.end_lineno or field.lineno) + 1)
        beside = [comments[line][0] for line in lines if line in comments]
        above: list[str] = []
        line = field.lineno - 1
        while not beside and line in comments and comments[line][1]:
            above.insert(0, comments[line][0])
            line -= 1
        found[field.target.id] = " ".join(beside or above)
    return found


@cache
def _comment_lines(code: str) -> dict[int, tuple[str, bool]]:
    """Comment of each line that has one, and whether the line has nothing else."""
    return {
        token.start[0]: (token.string.lstrip("# "), not token.line[: token.start[1]].strip())
        for token in tokenize.generate_tokens(io.StringIO(code).readline)
        if token.type == tokenize.COMMENT
    }


def _heading(text: str) -> str:
    """Return the comment at the top of a yaml file, up to a line of code."""
    lines = text.removeprefix("# @package _global_\n").splitlines()
    above = itertools.takewhile(lambda line: re.match("# ?\\S", line), lines)
    return " ".join(line.lstrip("# ") for line in above).rstrip(":")


def _arguments(doc: str) -> dict[str, str]:
    """Return the descriptions below ``Args:`` of a docstring in Google's convention."""
    _, _, rest = doc.partition("\nArgs:\n")
    section = re.split(r"\n(?=\S)", rest, maxsplit=1)[0]
    entries = re.findall(r"^    (\w[\w, ]*): (.*(?:\n     .*)*)", section, re.MULTILINE)
    return {
        name: " ".join(told.split()).rstrip(".")
        for names, told in entries
        for name in names.split(", ")
    }


def _literals(tree: ast.Module) -> dict[str, Any]:
    """Names that a module gives to choices, such as ``Source = Literal["neck", "power"]``."""
    return {
        target.id: _evaluated(node.value, NAMES)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript)
        for target in node.targets
        if isinstance(target, ast.Name) and ast.unparse(node.value).startswith("Literal[")
    }


def _evaluated(annotation: ast.expr | None, names: Mapping[str, Any]) -> Any:
    """Evaluate an annotation of ours; Any if it has other names."""
    try:
        return eval(ast.unparse(annotation), dict(names)) if annotation else Any
    except (NameError, AttributeError):
        return Any


# The page ---------------------------------------------------------------------------------------

INTRO = """\
# Keys

Every key of `ldt run` (and `python run.py`), with its meaning, the values that it takes and its
default. `key=value` sets it; a value outside of these is refused in a line before anything is
built. Options change the defaults (*by option*: they alone give a value). `ldt run --help` shows
the values as composed, with options too: `ldt run detector=yolox_nano --help`. Lists are typed as
`[a,b]`, nothing as `null`.

<!-- Written by `python -m ldt.config.reference docs/keys.md`; edit what it reads instead. -->
"""


def page() -> str:
    """Return docs/keys.md."""
    parts = [INTRO]
    seen: set[str] = set()
    for group in sorted(groups(), key=lambda group: group.name):
        if group.name not in seen:
            seen.add(group.name)
            parts.append(f"## `{group.name}`\n" if group.name else "## Of the run\n")
            if group.name:
                parts += [f"{_cell(group.meaning)}.\n", *_options_table(group.name)]
        if group.option:
            parts.append(f"### Of `{group.name}={group.option}`\n")
        parts.append(_table(group.keys()))
        if group.name == "method":
            parts += _class_tables("method=")
    parts += ["## `logger`\n", *_options_table("logger"), *_class_tables("logger=")]
    for name in option_groups():
        if name not in seen | {"logger"}:
            parts += [f"## `{name}`\n", *_options_table(name)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def _options_table(group: str) -> Iterator[str]:
    if found := options(group) if group else {}:
        yield "| option | what |\n|---|---|"
        yield "\n".join(f"| `{group}={name}` | {_cell(told)} |" for name, told in found.items())
        yield ""


def _class_tables(prefix: str) -> Iterator[str]:
    for option, found in itertools.groupby(nodes(), lambda node: node.option):
        keys = list(itertools.chain.from_iterable(node.keys() for node in found))
        if option.startswith(prefix) and keys:
            yield f"### Of `{option}`\n"
            yield _table(keys)


def _table(keys: Iterable[Key]) -> str:
    rows = ["| key | what | allowed | default |", "|---|---|---|---|"]
    for key in keys:
        default = "*by option*" if key.default == MISSING else f"`{typed(key.default)}`"
        cells = [f"`{key.name}`", _cell(key.meaning), _cell(key.allowed), default]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    text = re.sub(r":\w+:`[\w.]*?(\w+)`", r"`\1`", text.replace("``", "`"))
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
