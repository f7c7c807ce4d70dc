"""Imports run one way, and heavy libraries stay where they belong."""

import ast
from functools import cache
from pathlib import Path

import pytest

from ldt.config.names import below

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "ldt").rglob("*.py"), ROOT / "run.py"])
# fmt: off
LEVELS = (  # a package or module imports from its own level and from those below it
    (  # the commands, each by all of its addresses
        "run", "ldt.cli", "ldt.export", "ldt.predict",
        "ldt.figures.__main__", "ldt.report.__main__",
    ),
    ("ldt.experiment", "ldt.deployment"),
    ("ldt.report",),
    ("ldt.figures",),
    ("ldt.build",),
    ("ldt.api", "ldt.loop", "ldt.callbacks"),
    ("ldt.module",),
    ("ldt.evaluation", "ldt.data", "ldt.runtimes", "ldt.pruned"),
    ("ldt.detectors", "ldt.criteria"),
    ("ldt.pruning",),
    ("ldt.runs",),
    (
        "ldt.discriminant", "ldt.location", "ldt.objects", "ldt.recipe", "ldt.config",
        "ldt.progress",
    ),
)
ALLOWED = {
    "mmdet": (
        "ldt.detectors", "ldt.data", "ldt.evaluation", "ldt.pruned", "ldt.deployment",
        "ldt.runtimes", "ldt.pruning.dependency", "ldt.pruning.attention",
    ),
    "mmengine": (
        "ldt.api", "ldt.cli", "ldt.detectors", "ldt.module", "ldt.data", "ldt.deployment",
        "ldt.runtimes",
    ),
    "transformers": ("ldt.detectors.transformers_detector",),
    "torchvision.models": ("ldt.detectors.torchvision_detector",),
    **dict.fromkeys(("onnx", "onnxruntime", "openvino", "nncf"), ("ldt.runtimes",)),
    "click": ("ldt.cli",),
    "hydra": ("ldt.cli", "ldt.experiment", "ldt.build", "ldt.config"),
    "lightning": (
        "ldt.experiment", "ldt.build", "ldt.callbacks", "ldt.loop", "ldt.module", "ldt.data",
    ),
    "plotly": ("ldt.report",),
    "pandas": ("ldt.api", "ldt.report", "ldt.runs"),
    "wandb": ("ldt.callbacks.wandb_logger",),
    "wandb_workspaces": ("ldt.report.workspaces",),
}
# fmt: on


def name(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def level(module):
    found = [
        (len(package), index)
        for index, packages in enumerate(LEVELS)
        for package in packages
        if below(module, [package])
    ]
    assert found, f"{module} has no place in LEVELS"
    return found[0][1]


def statements(node):
    """Every import statement below a node, except those for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield from statements(child)


@cache
def imported(file):
    """Dotted names that a file imports, wherever it does so."""
    return frozenset(_imported(file))


def _imported(file):
    for statement in statements(ast.parse(file.read_text())):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
            continue
        assert statement.level == 0, f"{file}: relative import"
        for alias in statement.names:
            inner = f"{statement.module}.{alias.name}"
            path = ROOT / Path(*inner.split("."))
            is_module = path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
            yield inner if is_module else statement.module


def edges(file):
    return {found for found in imported(file) if found.startswith("ldt.")}


@pytest.mark.slow
@pytest.mark.parametrize("file", [f for f in FILES if f.name != "__init__.py"], ids=name)
def test_a_module_imports_nothing_from_above(file):
    up = [found for found in edges(file) if level(found) < level(name(file))]
    assert up == []


@pytest.mark.slow
@pytest.mark.parametrize("library", ALLOWED)
def test_a_library_is_imported_where_it_belongs(library):
    strangers = {
        name(file)
        for file in FILES
        if not below(name(file), ALLOWED[library])
        and any(below(found, [library]) for found in imported(file))
    }
    assert strangers == set()


def test_the_reader_of_imports_sees_them():
    assert {"ldt.module", "ldt.loop.pruning_round"} <= edges(ROOT / "ldt/loop/prune_retrain.py")
    found = edges(ROOT / "ldt/cli/hydra_app.py")
    assert {"ldt.config", "ldt.experiment"} <= found  # one of them in a function


@pytest.mark.slow
def test_no_cycles():
    graph = {name(file): edges(file) for file in FILES}
    done = set()
    while ready := {node for node, needs in graph.items() if node not in done and needs <= done}:
        done |= ready
    assert set(graph) - done == set()
