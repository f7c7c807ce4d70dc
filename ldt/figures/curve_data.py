"""The finished runs of studies as points of their methods' curves."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ldt.figures.comparison import Panel, Point
from ldt.runs import files
from ldt.runs.aggregate import Cell, cells, notes
from ldt.runs.run import Run, open_run, open_runs, readable

log = logging.getLogger(__name__)


def panels(folders: Sequence[Path]) -> list[Panel]:
    """One panel for every detector, data set and budget of some studies or single runs.

    Runs that differ in the seed only make a point, those that differ in the rate too a curve. A
    method with runs that differ in anything else has several, named by what differs.

    Args:
        folders: directories of studies, or of runs.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: none of the runs has finished and pruned something.
    """
    found = [cell for cell in cells(_runs(folders)) if cell.pruned]
    if not found:
        listed = ", ".join(str(folder) for folder in folders)
        raise ValueError(f"no finished run that pruned something in {listed}")
    for line in notes(found):
        log.warning(line)
    grouped: dict[tuple[str, str, str], list[Cell]] = defaultdict(list)
    for cell in found:
        grouped[cell.detector, cell.dataset, cell.budget].append(cell)
    return [_panel(members) for _, members in sorted(grouped.items())]


def _runs(folders: Iterable[Path]) -> Iterator[Run]:
    for folder in folders:
        yield from [open_run(folder)] if files.holds_run(folder) else readable(open_runs(folder))


def _panel(found: Sequence[Cell]) -> Panel:
    first = found[0]
    title = f"{first.detector}, {first.dataset}"
    methods: dict[str, list[Point]] = defaultdict(list)
    unpruned: dict[str, dict[int, Run]] = defaultdict(dict)  # each seed once
    for cell in found:
        methods[cell.label].append(_point(cell.runs))
        name = "unpruned, LDT" if cell.config.get("ldt.enabled") else "unpruned"
        unpruned[name] |= {run.row["seed"]: run for run in cell.runs}
    return Panel(
        title if first.budget == "params" else f"{title}, equal MACs",
        dict(methods),
        {name: _point(list(seeds.values()), "base_") for name, seeds in sorted(unpruned.items())},
        first.metric,
    )


def _point(runs: Sequence[Run], prefix: str = "") -> Point:
    sizes = [run.row[f"{prefix}params"] for run in runs]
    return Point(
        sum(sizes) / len(sizes) / 1e6, [run.row[prefix + run.row["metric"]] for run in runs]
    )
