"""The command line: `ldt <command>`, `python run.py` and the commands `python -m ldt.<name>`."""

from collections.abc import Sequence

from ldt.cli.commands import ldt
from ldt.cli.exit_codes import exit_codes

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `ldt <arguments>`; those of the process where none are given.

    Raises:
        SystemExit: with the exit code (:mod:`ldt.cli.exit_codes`) where it is not 0.
    """
    with exit_codes():
        ldt.main(arguments, prog_name="ldt", standalone_mode=False)
