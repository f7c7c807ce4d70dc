"""Command-line interface: `ldt <command>`, `python run.py` and `python -m ldt.<name>`."""

from collections.abc import Sequence

from ldt.cli.commands import ldt
from ldt.cli.exit_codes import exit_codes

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `ldt <arguments>`; default: the arguments of the process.

    Raises:
        SystemExit: with a nonzero exit code (:mod:`ldt.cli.exit_codes`).
    """
    with exit_codes():
        ldt.main(arguments, prog_name="ldt", standalone_mode=False)
