"""Reports on runs and studies: terminal tables, HTML page, tables for papers, notebook figures.

The command `ldt report runs/<study>` writes the page or prints a table.
"""

from typing import TYPE_CHECKING, Any

from ldt.report.terminal import print_run, print_study
from ldt.runs.differences import NOT_SET, differences
from ldt.runs.run import Run, open_run, open_runs
from ldt.runs.study import load_study

if TYPE_CHECKING:
    from ldt.runs.aggregate import Cell, cells, summarise

__all__ = [
    "NOT_SET",
    "Cell",
    "Run",
    "cells",
    "differences",
    "load_study",
    "open_run",
    "open_runs",
    "print_run",
    "print_study",
    "summarise",
]


def __getattr__(name: str) -> Any:  # avoids importing pandas when a run starts
    if name in ("Cell", "cells", "summarise"):
        from ldt.runs import aggregate

        return getattr(aggregate, name)
    raise AttributeError(f"module 'ldt.report' has no attribute {name!r}")
