"""Quoting of paths for Hydra: spaces, brackets, umlauts, ``=``, ``#`` and ``~``."""

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig

from ldt.config import as_dict

PATHS = (
    "dataset.root", "dataset.cache", "dataset.train_ann", "dataset.train_img", "dataset.val_ann",
    "dataset.val_img", "detector.checkpoint", "detector.config", "hydra.run.dir", "hydra.sweep.dir",
)  # fmt: skip
ARGUMENT = re.compile(r"(?P<key>\+{0,2}[\w.@/]+)=(?P<value>.+)", re.DOTALL)
FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag|int|float|str|bool)\(")


def quote_paths(arguments: Sequence[str]) -> list[str]:
    """Quote paths on the command line that Hydra's grammar cannot parse.

    Values that are already quoted, functions (``choice(a,b)``), ``null`` and values that Hydra
    parses as strings are left unchanged, since the hash in a run's name is computed from the
    overrides as typed. With ``-m`` commas separate the values of a sweep, as for every key
    (``dataset.root="'/a,b'"`` is a single path with a comma); otherwise they are part of the path.
    Values of other keys are quoted if they start like a path and Hydra cannot parse them. ``~`` is
    expanded here for Hydra's output folders, which Hydra creates first, and for all other paths by
    :func:`expand_home`.

    Args:
        arguments: command-line arguments, such as ``sys.argv[1:]``.
    """
    sweep = any(argument in ("-m", "--multirun") for argument in arguments)
    return [_quoted(argument, sweep) for argument in arguments]


def expand_home(config: DictConfig) -> None:
    """Expand ``~`` in every path of the groups ``dataset`` and ``detector``, in place."""
    plain = as_dict(config, resolve=False)
    for group in ("dataset", "detector"):
        for place, value in _leaves(plain.get(group), (group,)):
            if isinstance(value, str) and value.startswith("~"):
                node: Any = config
                for key in place[:-1]:
                    node = node[key]
                node[place[-1]] = os.path.expanduser(value)


def _quoted(argument: str, sweep: bool) -> str:
    found = ARGUMENT.fullmatch(argument)
    if found is None or FUNCTION.match(found["value"]) or found["value"][0] in "'\"":
        return argument
    key, value = found["key"], found["value"]
    name = key.lstrip("+")
    if name not in PATHS and not (value.startswith(("/", "~", "./", "../"))):
        return argument
    values = value.split(",") if sweep else [value]
    if name.startswith("hydra."):
        values = [os.path.expanduser(part) for part in values]
    elif name in PATHS and value == "null":
        return argument
    parts = [_unambiguous(key, part, known=name in PATHS) for part in values]
    return f"{key}={','.join(parts)}"


def _unambiguous(key: str, value: str, known: bool) -> str:
    """Return the value, quoted if Hydra would not parse it as this string."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Quote, QuotedString, Sweep
    from hydra.errors import HydraException

    try:
        read = OverridesParser.create().parse_override(f"{key}={value}").value()
    except HydraException:
        read = None
    if isinstance(read, str) or not (known or read is None or isinstance(read, Sweep)):
        return value
    return QuotedString(value, Quote.single).with_quotes()


def _leaves(node: object, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """All leaf values below a node, with the keys that lead to them."""
    if isinstance(node, (dict, list)):
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(inner, (*place, key))
    else:
        yield place, node
