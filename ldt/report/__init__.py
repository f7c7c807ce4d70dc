"""Runs told and compared: on the terminal, as a page, as tables for papers, in notebooks.

The command `ldt report runs/<study>` writes the page or prints a table.
"""

from typing import TYPE_CHECKING, Any

from ldt.report.terminal import number, print_run, print_study
from ldt.runs.differences import NOT_SET, differences
from ldt.runs.study import load_study

if TYPE_CHECKING:
    from ldt.runs.run import Run, load_run, load_runs

__all__ = [
    "NOT_SET",
    "Run",
    "differences",
    "load_run",
    "load_runs",
    "load_study",
    "number",
    "print_run",
    "print_study",
]


def __getattr__(name: str) -> Any:  # keeps a run's start free of pandas
    if name in ("Run", "load_run", "load_runs"):
        from ldt.runs import run

        return getattr(run, name)
    raise AttributeError(f"module 'ldt.report' has no attribute {name!r}")
