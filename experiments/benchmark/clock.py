"""How long cells of the benchmark take: measured from finished ones, else from a short probe."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmark.plan import LIGHT, Cell

from ldt.runs.files import read_rows, write_rows

TIMES = "times.csv"  # in the study's directory
EPOCH, CUT = "epoch", "cut"  # of a probe: an epoch with a training, a cut by a score


class Clock:
    """CPU seconds of cells, stored in the directory of a study.

    Args:
        study: the directory.
    """

    def __init__(self, study: Path) -> None:
        self.file = study / TIMES
        self.rows = [(row["sort"], float(row["seconds"])) for row in read_rows(self.file)]

    def add(self, sort: str, seconds: float) -> None:
        """Record how long a cell, or a part of one, took."""
        self.rows.append((sort, round(seconds, 1)))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_rows(self.file, [{"sort": sort, "seconds": seconds} for sort, seconds in self.rows])

    def measured(self, sort: str) -> float | None:
        """Return the mean of what was measured of a sort; None if nothing was."""
        found = [seconds for name, seconds in self.rows if name == sort]
        return statistics.mean(found) if found else None

    def seconds(self, cell: Cell) -> float:
        """Return the seconds of a cell: of finished ones like it, else the sum of its parts.

        Raises:
            LookupError: neither was measured.
        """
        known = self.measured(cell.sort)
        if known is not None:
            return known
        parts = [(self._epoch(cell), cell.epochs)] if cell.epochs else []
        parts += [(self._cut(cell), 1)] if cell.score else []
        total = 0.0
        for part, times in parts:
            if part is None:
                raise LookupError(f"nothing like {cell.sort} has been measured")
            total += part * times
        return total

    def _epoch(self, cell: Cell) -> float | None:
        return self.measured(f"{EPOCH} {cell.training}")

    def _cut(self, cell: Cell) -> float | None:
        light = self.measured(f"{LIGHT} {cell.training} {cell.score}")
        return light if light is not None else self.measured(f"{CUT} {cell.score}")

    def unknown(self, cells: Iterable[Cell]) -> list[Cell]:
        """Return cells whose parts nothing is known of, the first for each part."""
        found: dict[str, Cell] = {}
        for cell in cells:
            if self.measured(cell.sort) is None:
                if cell.epochs and self._epoch(cell) is None:
                    found.setdefault(f"{EPOCH} {cell.training}", cell)
                if cell.score and self._cut(cell) is None:
                    found.setdefault(f"{CUT} {cell.score}", cell)
        return list(found.values())

    def total(self, cells: Sequence[Cell]) -> float:
        """Return the seconds of cells, one after another."""
        return sum(map(self.seconds, cells))


def table(cells: Sequence[Cell], seconds: Callable[[Cell], float]) -> list[str]:
    """Return lines with the number of cells of each kind, the seconds of one, and hours."""
    kinds: dict[str, list[float]] = {}
    for cell in cells:
        kinds.setdefault(cell.kind, []).append(seconds(cell))
    lines = [f"{'kind':<10}{'cells':>7}{'seconds each':>14}{'hours':>8}"]
    for kind, own in kinds.items():
        lines.append(f"{kind:<10}{len(own):>7}{statistics.mean(own):>14.0f}{sum(own) / 3600:>8.2f}")
    total = sum(map(sum, kinds.values()))
    return [*lines, f"{'all':<10}{len(cells):>7}{'':>14}{total / 3600:>8.2f}"]
