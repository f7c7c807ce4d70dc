"""Aggregation of runs that differ only in their seed, for the comparison of methods."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Any

import pandas as pd

from ldt.config import method_titles
from ldt.runs import identity, inputs
from ldt.runs.formatting import printable, speed_up
from ldt.runs.run import Run

MOST_NAMED = 2  # list all varying keys in labels if there are at most so many
LONGEST_LABEL = 48  # characters
Config = dict[str, Any]  # flat: dotted key -> value


@dataclass(frozen=True)
class Cell:
    """Finished runs of one configuration with several seeds.

    Attributes:
        dataset, detector, budget: names.
        method: its title; ``unpruned`` or ``unpruned, LDT losses`` for runs that prune nothing.
        rate: the requested rate (share of the budget to remove); 0 if nothing is pruned.
        metric: the data set's headline metric.
        config: the flat settings shared by its runs (:func:`ldt.runs.identity.cell`), with a hash
            of their ``inputs`` if other runs with the same settings have different ones.
        runs: sorted by seed.
        changed: keys in which the cell differs from the most common value among the method's runs.
        label: the method, with ``changed`` if it has variants.
    """

    dataset: str
    detector: str
    budget: str
    method: str
    rate: float
    metric: str
    config: Config
    runs: tuple[Run, ...]
    changed: Mapping[str, Any]
    label: str

    @property
    def pruned(self) -> bool:
        """Whether anything was removed."""
        return self.rate > 0

    @property
    def block(self) -> tuple[str, str, str, float]:
        """The settings that must be equal for cells to be compared directly."""
        return self.dataset, self.detector, self.budget, self.rate


def cells(runs: Iterable[Run]) -> list[Cell]:
    """Group the finished runs by configuration, unpruned ones first, then by rate and label.

    Args:
        runs: runs of one or several studies.
    """
    grouped: dict[str, tuple[Config, list[Run]]] = {}
    for run in runs:
        if run.finished:
            config = run.settings
            grouped.setdefault(_key(run, config), (config, []))[1].append(run)
    blocks: dict[tuple[Any, ...], list[Cell]] = defaultdict(list)
    for config, members in grouped.values():
        for read, own in _by_inputs(members).items():
            told = {"inputs": read} if read else {}
            cell = _cell(sorted(own, key=lambda run: (run.row["seed"], run.name)), config | told)
            blocks[(*cell.block[:3], cell.method)].append(cell)
    labelled = [cell for block in blocks.values() for cell in _label(block)]
    return sorted(labelled, key=lambda cell: (*cell.block, cell.label))


def _key(run: Run, config: Config) -> str:
    facts = [run.row[key] for key in ("dataset", "detector", "method", "asked_rate")]
    budget = identity.canonical_budget(run.row["budget"])
    return json.dumps([facts, budget, config], sort_keys=True, default=str)


def _by_inputs(runs: Sequence[Run]) -> dict[str | None, list[Run]]:
    """Group runs of one configuration by their inputs; unrecorded inputs match any others."""
    found: dict[str | None, list[Run]] = defaultdict(list)
    for run in runs:
        read = inputs.fingerprint(run.inputs)
        found[read and read[:8]].append(run)
    if len(found) == 1 or (len(found) == 2 and None in found):
        return {None: list(runs)}
    return found


def _cell(runs: Sequence[Run], config: Config) -> Cell:
    row = runs[0].row
    pruned = row["rounds"] > 0
    losses = runs[0].summary.get("ldt", False)
    method = title(runs[0]) if pruned else "unpruned, LDT losses" if losses else "unpruned"
    return Cell(
        dataset=row["dataset"],
        detector=row["detector"],
        budget=identity.canonical_budget(row["budget"]),
        method=method,
        rate=row["asked_rate"] if pruned else 0.0,
        metric=row["metric"],
        config=config,
        runs=tuple(runs),
        changed={},
        label=method,
    )


def title(run: Run) -> str:
    """Return what tables and figures call a run's method: its name in the literature."""
    told = run.config.get("method")
    given = told.get("title") if isinstance(told, dict) else None
    name: str = run.row["method"]
    if isinstance(given, str) and given.strip():
        return printable(given)[:LONGEST_LABEL]
    return method_titles().get(name, name)


def varying(configs: Sequence[tuple[Config, int]]) -> dict[str, Counter[str]]:
    """Find the keys in which configurations differ, with the number of runs per value.

    Args:
        configs: flat configurations, each with its number of runs.

    Returns:
        For each such key its values as text; missing ones are ``(not set)``.
    """
    keys = sorted({key for config, _ in configs for key in config})
    counted: dict[str, Counter[str]] = {key: Counter() for key in keys}
    for config, runs in configs:
        for key in keys:
            counted[key][shown(config, key)] += runs
    return {key: values for key, values in counted.items() if len(values) > 1}


def shown(config: Config, key: str) -> str:
    """Format a value as in YAML and JSON, in one line."""
    if key not in config:
        return "(not set)"
    value = config[key]
    return printable(value) if isinstance(value, str) else json.dumps(value, default=str)


def _label(block: Sequence[Cell]) -> list[Cell]:
    """Label the variants of a method by their settings if short, else by a number."""
    keys = varying([(_variant(cell), len(cell.runs)) for cell in block])
    usual = {key: values.most_common(1)[0][0] for key, values in keys.items()}
    numbers: dict[str, int] = {}
    named = []
    for cell in block:
        values = {key: shown(cell.config, key) for key in keys}
        number = numbers.setdefault(json.dumps(values), len(numbers) + 1)
        changed = {
            key: value
            for key, value in values.items()
            if value != usual[key] or len(keys) <= MOST_NAMED
        }
        text = _changes({key.split(".")[-1]: value for key, value in changed.items()})
        label = f"{cell.method} ({text})" if text else cell.method
        if len(label) > LONGEST_LABEL:
            label = f"{cell.method} #{number}"
        named.append(replace(cell, changed=changed, label=label))
    return named


def _changes(changed: Mapping[str, str]) -> str:
    """Return keys, which may be anybody's, and values on one line."""
    return ", ".join(f"{printable(key)}={value}" for key, value in changed.items())


def _variant(cell: Cell) -> Config:
    return {key: value for key, value in cell.config.items() if key != "prune.rate"}


# Numbers ------------------------------------------------------------------------------------


def summarise(found: Sequence[Cell]) -> pd.DataFrame:
    """Compute one row per cell: means and sample standard deviations over its runs.

    Columns: ``dataset``, ``detector``, ``method`` (the label), ``budget``, ``rate``
    (requested), ``seeds``, ``metric`` (name of the headline metric), then for each measurement of a
    round (``AP``, ``params`` ...) the last round's mean under its name and the deviation under
    ``<name>_std``, NaN for a single seed; ``base`` is the headline metric before pruning,
    ``change`` its change, and ``speed_up`` the latency before over that after. Runs with equal
    configuration and seed count as one.
    """
    rows = [{**numbers(run), "cell": i} for i, cell in enumerate(found) for run in cell.runs]
    seeds: Any = pd.DataFrame(rows).groupby(["cell", "seed"]).mean()
    means = seeds.groupby("cell").mean()
    measured = pd.concat([means, seeds.groupby("cell").std().add_suffix("_std")], axis="columns")
    order = [name for key in means for name in (key, f"{key}_std")]
    counts = seeds.groupby("cell").size()
    about = [_about(cell, int(counts[index])) for index, cell in enumerate(found)]
    return pd.concat([pd.DataFrame(about), measured[order]], axis="columns")


ABOUT = ("dataset", "detector", "method", "budget", "rate", "seeds", "metric")


def _about(cell: Cell, seeds: int) -> dict[str, Any]:
    place = (cell.dataset, cell.detector, cell.label)
    return dict(zip(ABOUT, (*place, cell.budget, cell.rate, seeds, cell.metric), strict=True))


def numbers(run: Run) -> dict[str, float]:
    """Return a run's row of the table that :func:`summarise` averages."""
    first, last = run.summary["rounds"][0], run.summary["rounds"][-1]
    after = {
        key: value
        for key, value in last.items()
        if isinstance(value, (int, float)) and key not in ("round", "threads", *ABOUT)
    }
    metric = run.row["metric"]
    base = first.get(metric, nan)
    gains = {"change": last.get(metric, nan) - base, "speed_up": speed_up(last, first)}
    pruned = run.row["rounds"] > 0
    return {**after, "seed": run.row["seed"], "base": base, **(gains if pruned else {})}


def notes(found: Sequence[Cell]) -> list[str]:
    """Explain the numbered labels, one line each."""
    told = {
        cell.label: _changes(cell.changed)
        for cell in found
        if cell.label == f"{cell.method} #{cell.label.rpartition('#')[2]}"
    }
    return [f"{label}: {text}" for label, text in told.items()]
