"""Validation of values against types with ranges and choices, with uniform error messages."""

import contextlib
import functools
import inspect
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Ge, Gt, Le, Lt
from omegaconf import MISSING
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from ldt.config import Config, DatasetConfig
from ldt.config.keys import DATASETS, check_names, dataset_schema
from ldt.config.kinds import Count, NaturalNumber, NotNegative, Positive, Seed, Share

__all__ = [  # the types too: an annotation and its check are imported together
    "Count",
    "NaturalNumber",
    "NotNegative",
    "Positive",
    "Seed",
    "Share",
    "allowed",
    "check_against_schema",
    "check_arguments",
    "check_fields",
    "check_value",
    "check_values",
    "checked",
    "checked_kind",
    "described",
    "typed",
]

NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
BOUNDS = {Gt: ("gt", "above"), Ge: ("ge", "of at least"), Lt: ("lt", "below"), Le: ("le", "up to")}
PLAIN = re.compile(r"([A-Za-z0-9_.:/%+-]|\$\{[\w.]+\})+")  # a text that needs no quotes
EXAMPLES = (0.5, 1)  # of numbers without a default
F = TypeVar("F", bound=Callable[..., Any])


def check_value(key: str, value: object, kind: Any, example: object = None) -> None:
    """Check a value against a type with its range or choices.

    Args:
        key: dotted config key for the message.
        value: the given value; strings are not converted to numbers, nor booleans to integers.
        kind: a type such as `Share` or a ``Literal``; types unknown to pydantic accept any value.
        example: an allowed value for the message.

    Raises:
        ValueError: the value is not allowed; names key, value, allowed values and an example.
    """
    try:
        adapter = TypeAdapter(kind)
    except PydanticSchemaGenerationError:
        return
    try:
        adapter.validate_python(value, strict=isinstance(value, (bool, int, float, str)))
    except ValidationError as error:
        if _is_path(adapter, value):
            return
        told = described(kind) or error.errors()[0]["msg"]
        end = _shown(key, value, kind, example)
        raise ValueError(f"{key}={value!r}; allowed: {told}{end}") from error


def allowed(key: str, value: object) -> str:
    """Return what a key of the schema may be, in words, with an example; empty without words.

    Args:
        key: dotted, perhaps of an item of a list.
        value: what was given.
    """
    key = key.partition("[")[0]
    *groups, name = key.split(".")
    schemas: list[type] = [Config]
    for group in groups:
        kinds = [get_type_hints(schema).get(group) for schema in schemas]
        schemas = [kind for kind in kinds if is_dataclass(kind) and isinstance(kind, type)]
        if group == "dataset":
            schemas += DATASETS.values()
    for schema in schemas:
        for item in fields(schema):
            kind = get_type_hints(schema, include_extras=True)[item.name]
            if item.name == name and (told := described(checked_kind(kind))):
                return told + _shown(key, value, checked_kind(kind), _example(item, kind))
    return ""


def _shown(key: str, value: object, kind: Any, example: object) -> str:
    """Return what to type for a key: the share that a percentage means, else the example."""
    choices = _choices(kind)
    example = choices[0] if example is None and choices else example
    with contextlib.suppress(ValueError):  # no number, or no share is allowed
        share = float(str(value).strip().removesuffix("%")) / 100
        # 1.5 is hardly a percentage
        if 0.02 <= share < 1 and any(limit in (Lt(1), Le(1)) for limit in get_args(kind)):
            example = share
    return "" if example is None else f" (e.g. {key}={typed(example)})"


def check_against_schema(config: Mapping[str, Any]) -> None:
    """Check the values of a configuration that the schema gives a range or choices.

    Args:
        config: plain data; missing values and interpolations are left out.

    Raises:
        ValueError: see :func:`check_value`.
    """
    _check_group(config, Config, "", dataset_schema(config) or DatasetConfig)


def _check_group(given: Mapping[str, Any], schema: type, prefix: str, dataset: type) -> None:
    limited, plain = get_type_hints(schema, include_extras=True), get_type_hints(schema)
    for item in fields(schema):
        value, kind = given.get(item.name, "???"), limited[item.name]
        if f"{prefix}{item.name}" == "dataset":
            kind = dataset
        if is_dataclass(kind):
            inner = value if isinstance(value, Mapping) else {}
            _check_group(inner, cast(type, kind), f"{prefix}{item.name}.", dataset)
        elif kind != plain[item.name] and not _is_open(value):
            check_value(f"{prefix}{item.name}", value, checked_kind(kind), _example(item, kind))


def _is_open(value: object) -> bool:
    """Whether a value is missing or an interpolation."""
    return isinstance(value, str) and (value == "???" or "${" in value)


def _example(item: Field[Any], kind: object) -> object:
    """Return an allowed value of a key for messages: its default, or a number."""
    default = item.default_factory() if callable(item.default_factory) else item.default
    if default not in (MISSING, None, []):
        return default
    adapter = TypeAdapter(checked_kind(kind))
    for value in EXAMPLES:
        with contextlib.suppress(ValidationError):
            return adapter.validate_python(value, strict=True)
    return None


def checked_kind(kind: object) -> Any:
    """Return what the schema allows: the second argument of ``Annotated`` where that is a type."""
    if get_origin(kind) is Annotated:
        return next((limit for limit in get_args(kind)[1:] if get_origin(limit)), kind)
    if get_origin(kind) in (Union, UnionType):
        return Union[tuple(map(checked_kind, get_args(kind)))]  # noqa: UP007 (made at run time)
    return kind


def check_values(**values: tuple[object, Any, object]) -> None:
    """Check the arguments of a function, each given as (value, type, example).

    Raises:
        ValueError: see :func:`check_value`.
    """
    for name, (value, kind, example) in values.items():
        check_value(name, value, kind, repr(example))


def check_arguments(
    where: str,
    call: Callable[..., Any],
    given: Mapping[str, Any],
    also: Iterable[str] = (),
    not_these: Iterable[str] = (),
) -> None:
    """Check keys of the configuration that become the arguments of a class or function.

    Args:
        where: the group of the keys, such as ``method.criterion``.
        call: the class or function.
        given: the keys and their values; those of Hydra (``_target_``) are ignored.
        also: additional allowed keys.
        not_these: arguments that are not set by the configuration.

    Raises:
        ValueError: an argument is unknown or of the wrong type.
    """
    function = inspect.unwrap(call.__init__ if inspect.isclass(call) else call)
    parameters = {k: p for k, p in inspect.signature(call).parameters.items() if k not in not_these}
    given = {k: v for k, v in given.items() if not k.startswith("_") and k not in also}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = [k for k in given if k not in not_these] if takes_all else []
    check_names(where, given, [*parameters, *named])
    hints = _hints(function)
    for name in given.keys() & parameters.keys() & hints.keys():
        default = parameters[name].default
        example = None if default is inspect.Parameter.empty else default
        check_value(f"{where}.{name}", given[name], hints[name], example)


def checked(where: str) -> Callable[[F], F]:
    """Decorate a constructor to check its arguments against their annotations."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            check_arguments(where, function, {k: v for k, v in given.items() if k != "self"})
            return function(*args, **kwargs)

        return cast(F, call)

    return decorate


def check_fields(
    instance: object, keys: Mapping[str, str], examples: Mapping[str, Any] | None = None
) -> None:
    """Check the fields of a dataclass against their annotations.

    Args:
        instance: instance of the dataclass.
        keys: config key of each field to check.
        examples: allowed values for fields without a default.
    """
    hints = get_type_hints(type(instance), include_extras=True)
    for name, key in keys.items():
        example = (examples or {}).get(name, getattr(type(instance), name, None))
        check_value(key, getattr(instance, name), hints[name], example)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of a function; empty if they cannot be evaluated."""
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError):
        return {}


def _choices(kind: object) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def described(kind: object) -> str:
    """Describe the allowed values of a type; empty if it has no words for them."""
    if choices := _choices(kind):
        return ", ".join(map(typed, choices))
    if get_origin(kind) in (Union, UnionType):
        parts = ["null" if one is type(None) else described(one) for one in get_args(kind)]
        return " or ".join(parts) if all(parts) else ""
    if get_origin(kind) in (list, tuple, Sequence) and get_args(kind)[-1] is not Ellipsis:
        parts = {described(one) for one in get_args(kind)}
        count = f"{len(get_args(kind))} values" if get_origin(kind) is tuple else "a list"
        return f"{count}, each {parts.pop()}" if len(parts) == 1 and all(parts) else ""
    base, *limits = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    bounds = [
        f"{word} {typed(getattr(limit, name))}"
        for limit in limits
        for kind_, (name, word) in BOUNDS.items()
        if isinstance(limit, kind_)
    ]
    return " ".join(filter(None, [NOUNS.get(base, ""), " and ".join(bounds)]))


def typed(value: object) -> str:
    """Format a value as typed on the command line."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_item, value))}]"
    if isinstance(value, float) and float(short := f"{value:g}") == value:
        return short
    return str(value)


def _item(value: object) -> str:
    """Format an item of a list, quoted if it has signs that Hydra would not take for its own."""
    if not isinstance(value, str) or PLAIN.fullmatch(value):
        return typed(value)
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{quoted}"'


def assigned(key: str, value: object) -> str:
    """Format ``key=value`` as typed in a shell, quoted where it is necessary."""
    text = f"{key}={typed(value)}"
    return shlex.quote(text) if '"' in text else text


def _is_path(adapter: TypeAdapter[Any], value: object) -> bool:
    """Whether the value is a string for a parameter of type path."""
    try:
        return isinstance(adapter.validate_python(value), os.PathLike)
    except ValidationError:
        return False
