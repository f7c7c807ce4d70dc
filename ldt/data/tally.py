"""Counts of what a data set leaves out or changes, with an example of each."""

import logging
from dataclasses import dataclass, field
from typing import NamedTuple

from ldt.runs.formatting import printable

log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """How often something was found, its first example, and whether users expect it."""

    count: int
    example: str
    expected: bool


@dataclass
class Tally:
    """Findings in the files of a data set, counted.

    Example:
        >>> tally = Tally()
        >>> tally.add("boxes outside of their image, left out", "annotation 7 of a.jpg")
        >>> tally.lines()
        ['boxes outside of their image, left out: 1 (the first: annotation 7 of a.jpg)']
    """

    entries: dict[str, Entry] = field(default_factory=dict)

    def add(self, what: str, example: str, expected: bool = False) -> None:
        """Count one finding; those of other classes, for example, are expected."""
        known = self.entries.get(what)
        self.entries[what] = (
            Entry(1, printable(example), expected)
            if known is None
            else known._replace(count=known.count + 1)
        )

    def lines(self, expected: bool = False) -> list[str]:
        """Describe the findings that are, or are not, expected."""
        return [
            f"{what}: {entry.count} (the first: {entry.example})"
            for what, entry in self.entries.items()
            if entry.expected == expected
        ]

    def log(self, where: object) -> None:
        """Warn about findings that are not expected.

        Args:
            where: the file or folder.
        """
        for line in self.lines():
            log.warning("%s: %s", where, line)
