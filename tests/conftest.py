"""Before any test is collected: mmcv's operators; `tests/` and `experiments/` to import from.

Tests run in several processes, one thread each, files as a whole; `-n 0` keeps them in one.
"""

import gc
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import ldt  # noqa: F401  (mmdet imports only once mmcv's operators are in place)

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "experiments")]


def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores: a third of the time of tests of commands is waiting."""
    return min((os.cpu_count() or 1) + 1, 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Spare garbage collections the imported modules: going through them is a quarter of a run."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def in_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], io.StringIO]:
    """A function that makes all output that of a terminal of some columns, without colours."""
    from rich.console import Console

    from ldt.progress import console

    def shown(width: int) -> io.StringIO:
        file = io.StringIO()
        given = {"force_terminal": True, "width": width, "color_system": None, "highlight": False}
        terminal = Console(file=file, _environ={"TERM": "xterm"}, **given)
        monkeypatch.setattr(console, "terminal", lambda: terminal)
        return file

    return shown
