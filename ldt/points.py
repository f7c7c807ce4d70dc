"""The finished runs of studies as points of their methods' curves."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldt.config import DETAILS, LABELS
from ldt.figures.comparison import Panel, Point
from ldt.names import below
from ldt.report import differences, load_study
from ldt.runs import load_config

# what runs of one curve may differ in
FREE = (*LABELS, *DETAILS, "base", "report", "trainer", "prune.rate")
Row = Mapping[str, Any]


def panels(folders: Sequence[Path]) -> list[Panel]:
    """One panel for every detector and data set of some studies or single runs.

    Runs that differ in the seed only make a point, those that differ in the rate too a curve. A
    method with runs that differ in anything else has several, named by what differs.

    Args:
        folders: directories of studies, or of runs.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: none of the runs has finished and pruned something.
    """
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in _rows(folders):
        found[row["detector"], row["dataset"]].append(row)
    if not found:
        listed = ", ".join(str(folder) for folder in folders)
        raise ValueError(f"no finished run that pruned something in {listed}")
    return [
        Panel(f"{detector}, {dataset}", _methods(rows), _unpruned(rows), rows[0]["metric"])
        for (detector, dataset), rows in sorted(found.items())
    ]


def _rows(folders: Iterable[Path]) -> list[Row]:
    """Rows of :func:`ldt.report.load_study` with the configuration of each run."""
    rows = []
    for folder in folders:
        alone = (folder / "config.yaml").is_file()
        for row in load_study(folder.parent if alone else folder):
            if row["status"] != "finished" or not row["rounds"]:
                continue
            if not alone or row["run"] == folder.name:
                place = folder if alone else folder / row["run"]
                config = OmegaConf.to_container(load_config(place), resolve=True)
                rows.append({**row, "config": config})
    return rows


def _methods(rows: Sequence[Row]) -> dict[str, list[Point]]:
    cells: dict[str, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        alike = [other for other in rows if other["method"] == row["method"]]
        cells[_label(row, alike)][row["asked_rate"]].append(row)
    return {
        label: [_point(cell) for _, cell in sorted(rates.items())]
        for label, rates in sorted(cells.items())
    }


def _label(row: Row, alike: Sequence[Row]) -> str:
    """The method, and the values of this row's keys in which its runs differ."""
    keys = {
        key
        for other in alike
        for key, *_ in differences(row["config"], other["config"])
        if not below(key, FREE)
    }
    values = [f"{key.split('.')[-1]}={_value(row['config'], key)}" for key in sorted(keys)]
    return ", ".join([row["method"], *values])


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _point(rows: Sequence[Row], prefix: str = "") -> Point:
    sizes = [row[f"{prefix}params"] for row in rows]
    return Point(sum(sizes) / len(sizes) / 1e6, [row[prefix + row["metric"]] for row in rows])


def _unpruned(rows: Sequence[Row]) -> dict[str, Point]:
    """The bases with and without LDT, each seed once."""
    kinds: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        name = "unpruned, LDT" if row["config"]["ldt"]["enabled"] else "unpruned"
        kinds[name][row["seed"]] = row
    return {name: _point(list(seeds.values()), "base_") for name, seeds in sorted(kinds.items())}
