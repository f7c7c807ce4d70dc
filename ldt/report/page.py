"""Report of a study as a self-contained HTML page."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from math import isnan
from pathlib import Path
from typing import Any
from urllib.parse import quote

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ldt.report import study_figures
from ldt.report.images import album
from ldt.report.tables import Column, Value, columns, compare, has_noise, noise, percent
from ldt.report.terminal import BUDGETS
from ldt.runs import STATES
from ldt.runs.aggregate import Cell, cells, numbers, title, varying
from ldt.runs.files import CONFIG as SETTINGS
from ldt.runs.files import STRUCTURE, tolerated
from ldt.runs.formatting import TILDE
from ldt.runs.identity import LABELS, flatten
from ldt.runs.run import Run

MOST_LAYER_TABLES = 12
LAYER_TITLES = {"multiply_adds": "MACs", "latency_ms": "ms"}
CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["select2d", "lasso2d"],
}


def page(study: Path, runs: Sequence[Run], megabytes: float, place: Path | None = None) -> str:
    """Render the report of a study.

    Args:
        study: directory of the study; its name is the title.
        runs: runs of the study, at least one of them finished.
        megabytes: limit on the size of embedded pictures; the page states how many are omitted.
        place: folder of the page, which links to the runs' files; default: the study.

    Returns:
        Self-contained HTML with plotly's JavaScript, figures, tables and pictures.
    """
    found = cells(runs)
    environment = Environment(
        loader=PackageLoader("ldt.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _html
    return environment.get_template("page.html").render(
        study=study.name,
        made=datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        facts=_facts(runs, found),
        cells=compare(found),
        noise=TILDE if has_noise(found) else "",
        rows=_rows(found, place or study),
        layers=_layers(found),
        panels=_panels(found),
        losses=_losses(found),
        places=_places(found),
        album=album([run for cell in found for run in cell.runs], megabytes),
        labels={run.name: cell.label for cell in found for run in cell.runs},
        differing=_differing(found),
        variants=_variants(found),
        others=[run.row for run in runs if not run.finished],
    )


def _html(figure: go.Figure) -> Markup:
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG))


# What was compared --------------------------------------------------------------------------


def _facts(runs: Sequence[Run], found: Sequence[Cell]) -> dict[str, str]:
    """Summary of the study as terms and descriptions."""
    done = [run for run in runs if run.finished]
    states = [run.row["status"] for run in runs]
    counts = (f"{states.count(state)} {state}" for state in STATES if state in states)
    sizes = dict.fromkeys("{} x {}".format(*run.row["input_size"]) for run in done)
    rates = sorted({(cell.budget, cell.rate) for cell in found if cell.pruned})
    return {
        "runs": ", ".join(counts),
        "data sets": _listed(cell.dataset for cell in found),
        "detectors": _listed(cell.detector for cell in found),
        "methods": _listed(title(run) for run in done if run.row["rounds"]) or "none",
        "removed": _listed(f"{percent(rate)} of {BUDGETS[budget]}" for budget, rate in rates)
        or "-",
        "seeds": _listed(str(seed) for seed in sorted({run.row["seed"] for run in done})),
        "input (height x width)": _listed(sizes),
        "code": _listed(_code(run) for run in done),
    }


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _code(run: Run) -> str:
    known = [start.get("git") or {} for start in run.starts]
    return _listed(map(_commit, known or [run.summary.get("git") or {}]))


def _commit(git: Mapping[str, Any]) -> str:
    return git.get("commit", "unknown")[:8] + (" with changes" if git.get("dirty") else "")


def _places(found: Sequence[Cell]) -> list[str]:
    """Devices and threads of the latencies, which are comparable only if there is one of each."""
    rows = (run.row for cell in found for run in cell.runs)
    places = (f"{row['device']}, {_threads(row['threads'])}" for row in rows if "device" in row)
    return list(dict.fromkeys(places))


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


# Tables -------------------------------------------------------------------------------------


def _rows(found: Sequence[Cell], place: Path) -> list[dict[str, Value]]:
    """Return the table of runs; all rows have the same columns."""
    rows = [(cell, run, numbers(run)) for cell in found for run in cell.runs]
    known = {key for _, _, values in rows for key in values}
    shown = [column for column in columns(found) if column.key in known]
    return [_row(cell, run, values, shown, place) for cell, run, values in rows]


def _row(
    cell: Cell, run: Run, values: Mapping[str, float], shown: Sequence[Column], place: Path
) -> dict[str, Value]:
    """Return one row of the table of runs, with the columns measured after the last cut."""
    about = {
        "run": Value(run.name, run.name, link=_link(run.folder, place)),
        "settings": Value("yaml", "", link=_link(run.folder / SETTINGS, place)),
        "method": Value(cell.label, cell.label),
        "detector": Value(cell.detector, cell.detector),
        "seed": Value(str(run.row["seed"]), run.row["seed"]),
    }
    measured = {
        column.title: _number(values.get(column.key), column, noise(column, run.row))
        for column in shown
    }
    removed = _number(run.row.get("rate"), Column("", "", 1, 100))
    return about | measured | {"removed (%)": removed}


def _number(value: float | None, column: Column, mark: str = "") -> Value:
    if value is None or isnan(value):
        return Value("-", "")
    return Value(mark + column.text(value), value)


def _link(file: Path, place: Path) -> str:
    """Return the address of a file or folder, relative to the page's folder."""
    return quote(os.path.relpath(file.resolve(), place.resolve()).replace(os.sep, "/"))


def _layers(found: Sequence[Cell]) -> list[tuple[str, list[dict[str, Value]]]]:
    """Return a table of layers for a run of each of the first pruned cells."""
    pruned = [cell.runs[0] for cell in found if cell.pruned][:MOST_LAYER_TABLES]
    tables = ((run.name, _layer_rows(run)) for run in pruned)
    return [(name, rows) for name, rows in tables if rows]


def _layer_rows(run: Run) -> list[dict[str, Value]]:
    """Return sizes and times of the layers before pruning and after; none without a file."""
    if not (run.folder / STRUCTURE).exists():
        return []
    rows = []
    for change in tolerated(lambda: run.layer_changes, []):
        values: dict[str, Value] = {"layer": Value(change["layer"], change["layer"])}
        for key, (before, after) in change["sizes"].items():
            head = str(LAYER_TITLES.get(key, key))
            values[head] = Value(_size(before), before)
            values[f"{head} after"] = Value(_size(after), after)
        rows.append(values)
    return rows


def _size(value: float) -> str:
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


# Figures ------------------------------------------------------------------------------------


def _pairs(found: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Group the cells by detector and data set; only these share axes."""
    pairs: dict[str, list[Cell]] = defaultdict(list)
    for cell in found:
        pairs[f"{cell.detector} · {cell.dataset}"].append(cell)
    return pairs


def _panels(found: Sequence[Cell]) -> list[dict[str, Any]]:
    """Draw the figures of each detector and data set."""
    return [
        {
            "name": name,
            "trade_off": study_figures.trade_off(own),
            "by_round": study_figures.by_round(own) if any(cell.pruned for cell in own) else None,
        }
        for name, own in _pairs(found).items()
    ]


def _losses(found: Sequence[Cell]) -> list[dict[str, Any]]:
    """Draw the loss terms of each detector and data set with a training log."""
    return [
        {"name": name, "figure": study_figures.training(own)}
        for name, own in _pairs(found).items()
        if any(key.startswith("train/loss") for c in own for run in c.runs for key in run.log)
    ]


# Configurations -----------------------------------------------------------------------------


def _differing(found: Sequence[Cell]) -> list[tuple[str, list[tuple[str, int]]]]:
    """Keys in which the finished runs differ, with the runs per value in descending order.

    For detectors and data sets only the names are listed.
    """
    keys = {"detector.name", "dataset.name"}
    for own in _pairs(found).values():
        keys |= set(varying(_configs(own)))
    counted = varying(_configs(found))
    shown = sorted((keys - set(LABELS)) & set(counted))
    return [(key, counted[key].most_common()) for key in shown]


def _configs(found: Sequence[Cell]) -> list[tuple[dict[str, Any], int]]:
    return [(flatten(run.config), 1) for cell in found for run in cell.runs]


def _variants(found: Sequence[Cell]) -> list[Cell]:
    """One cell for each label of a method variant."""
    return list({(cell.label, cell.detector): cell for cell in found if cell.changed}.values())
