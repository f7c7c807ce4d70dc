"""The results of the benchmark, computed from the detections that its runs have kept.

`python experiments/build.py benchmark` writes results.csv (cells), comparisons.csv, results.md and
the results in README.md.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmark.plan import (
    BASE,
    FULL,
    LIGHT,
    LONGER,
    PRIMARY,
    SCORE,
    SCRATCH,
    STAGES,
    WIDTHS,
    Cell,
    Plan,
)
from benchmark.records import CHOICES, Records

from ldt.evaluation.paired_bootstrap import (
    Interval,
    Resampled,
    difference,
    effects,
    holm,
    resample,
    verdict,
)
from ldt.evaluation.resampled_ap import Matches, match
from ldt.runs import files

HERE = Path(__file__).parent
LDT, PLAIN, RANDOM = "ldt", "plain", "random"
MARKS = ("<!-- results -->", "<!-- end of results -->")
DRAWS = 1000
CONTROLS = {
    LONGER: "the unpruned base, trained for as long as base and retraining",
    WIDTHS: "its widths, random channels",
    SCRATCH: "its architecture, trained from random weights",
}
Id = tuple[str, str, str, str, str]  # kind, training, score, budget, switch
Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """A stage of a detector and a data set.

    Attributes:
        study: detector and data set.
        stage: name of the stage.
        cells: the last round of each finished run, by cell and replicate.
        resampled: AP of the same cells.
        planned: number of cells that the plan has.
    """

    study: str
    stage: str
    cells: Mapping[Id, Mapping[int, Row]]
    resampled: Resampled
    planned: int

    def scores(self, kind: str, training: str, budget: str) -> list[str]:
        """Return the scores with a cell of this kind."""
        return [
            score
            for k, t, score, b, switch in self.cells
            if (k, t, b, switch) == (kind, training, budget, "")
        ]


def identify(cell: Cell) -> Id:
    """Return what a cell is, without its replicate."""
    return cell.kind, cell.training, cell.score, cell.budget, cell.switch


def read(plan: Plan, stage: str, records: Records, frozen: Mapping[str, Any]) -> Results | None:
    """Read the finished cells of a stage; None if there are none.

    Of development those with the frozen choices are read, without the trials without retraining.
    """
    choices = frozen["choices"]
    plan = replace(plan, scores=tuple(choices), main=tuple(frozen["main"]))
    if stage == "development":
        trials = {s: {b: [trial] for b, trial in by.items()} for s, by in choices.items()}
        planned = [
            *(cell for cell in plan.development() if not cell.score),
            *plan.finals(trials),
            *plan.switched(choices),
        ]
    else:
        planned = plan.test(choices, stage)
    found: dict[Id, dict[int, Row]] = {}
    matched: dict[Id, dict[int, Matches]] = {}
    for cell in planned:
        row, detections = records.row(cell), records.detections(cell)
        if row is None or detections is None:
            continue
        images, classes = detections
        found.setdefault(identify(cell), {})[cell.replicate] = row
        own = matched.setdefault(identify(cell), {})
        own[cell.replicate] = match(images, len(classes))
    if not found:
        return None
    same = {one: stage for own in matched.values() for one in own} if plan.same_images else None
    return Results(plan.name, stage, found, resample(matched, same, DRAWS), len(planned))


# Numbers --------------------------------------------------------------------------------------


def cell_rows(results: Results) -> Iterator[Row]:
    """Yield a line of results.csv for each cell."""
    for key, replicates in results.cells.items():
        kind, training, score, budget, switch = key
        rows = list(replicates.values())
        yield {
            **{"study": results.study, "stage": results.stage, "kind": kind},
            **{"training": training, "score": score, "budget": budget, "switch": switch},
            **_numbers(results.resampled.contrast({key: 1.0})),
            **{name: _mean(rows, name) for name in ("params", "multiply_adds", "latency_ms")},
        }


def comparisons(results: Results) -> Iterator[Row]:
    """Yield a line of comparisons.csv for each difference, with p values by Holm."""
    for kind in (FULL, LIGHT):
        for budget in dict.fromkeys(key[3] for key in results.cells if key[3]):
            yield from _of_budget(results, kind, budget)
    for kind, _, _, budget, _ in results.cells:
        if kind in (WIDTHS, SCRATCH):
            control = (kind, LDT, SCORE, budget, "")
            yield from _against(results, "control", budget, (FULL, LDT, SCORE, budget, ""), control)
    longer = (LONGER, LDT, "", "", "")
    for budget in dict.fromkeys(key[3] for key in results.cells if key[3]):
        yield from _against(results, "control", budget, (FULL, LDT, SCORE, budget, ""), longer)
    for key in results.cells:
        if key[-1]:
            yield from _against(results, "switch", key[3], key, (*key[:-1], ""))


def _of_budget(results: Results, kind: str, budget: str) -> Iterator[Row]:
    ours = (kind, LDT, SCORE, budget, "")
    rivals = [s for s in results.scores(kind, PLAIN, budget) if s not in (SCORE, RANDOM)]
    if ours in results.cells:
        others = {rival: (kind, PLAIN, rival, budget, "") for rival in rivals}
        found = {rival: difference(results.resampled, ours, key) for rival, key in others.items()}
        adjusted = holm({rival: interval.p for rival, interval in found.items()})
        for rival, interval in found.items():
            about = {"what": "ldt - rival", "kind": kind, "budget": budget, "of": LDT}
            more = {"and": rival, "holm": round(adjusted[rival], 4)}
            yield _row(results, about | more, interval)
    floor = (kind, PLAIN, RANDOM, budget, "")
    for training in (PLAIN, LDT):
        for score in results.scores(kind, training, budget):
            key = (kind, training, score, budget, "")
            if floor in results.cells and score != RANDOM:
                yield from _against(results, "score - random", budget, key, floor)
    both = [s for s in rivals if (kind, LDT, s, budget, "") in results.cells]
    if (kind, PLAIN, SCORE, budget, "") not in results.cells or ours not in results.cells:
        return

    def key_of(training: str, score: str) -> Id:
        return (kind, training, score, budget, "")

    for rival in both:
        by_name = effects(results.resampled, SCORE, rival, [SCORE, *both], key=key_of)
        for name, interval in by_name.items():
            about = {"what": f"effect: {name}", "kind": kind, "budget": budget}
            yield _row(results, about | {"of": SCORE, "and": rival}, interval)


def _against(results: Results, what: str, budget: str, one: Id, other: Id) -> Iterator[Row]:
    if one in results.cells and other in results.cells:
        names = {"of": _name(one), "and": _name(other)}
        about = {"what": what, "kind": one[0], "budget": budget, **names}
        yield _row(results, about, difference(results.resampled, one, other))


def _name(key: Id) -> str:
    kind, training, score, _, switch = key
    control = kind if kind in CONTROLS else ""
    return " ".join(part for part in (control, score, switch, f"({training})") if part)


def _row(results: Results, about: Row, interval: Interval) -> Row:
    place = {"study": results.study, "stage": results.stage}
    return place | about | _numbers(interval) | {"verdict": verdict(interval)}


def _numbers(interval: Interval) -> Row:
    value, low, high = (round(100 * each, 2) for each in interval[:3])
    more = {"p": round(interval.p, 4), "replicates": interval.replicates}
    return {"AP": value, "low": low, "high": high, **more}


def _mean(rows: Sequence[Row], name: str) -> float | None:
    known = [row[name] for row in rows if row.get(name) is not None]
    return round(sum(known) / len(known), 3) if known else None


# Text -----------------------------------------------------------------------------------------


def text(results: Results, cells: Sequence[Row], differences: Sequence[Row]) -> str:
    """Write the section of a stage."""
    done = sum(map(len, results.cells.values()))
    parts = [
        f"## {results.study.replace('_', ' ')}: {results.stage}\n",
        f"{done} of {results.planned} cells. AP in %, 95 % intervals.\n",
        primary(differences),
        _grid(cells),
    ]
    kinds = {
        "ldt - rival": "LDT (training and score) against each rival (plain training)",
        "effect: training": "Effect of LDT's training, mean over the scores",
        "effect: score": "Effect of the score, mean over both trainings",
        "effect: interaction": "Interaction: what LDT's training gives its score beyond the rival",
        "score - random": "Distance to random (plain training)",
        "control": "LDT against the controls",
        "switch": "Switches, on against off",
    }
    for what, title in kinds.items():
        own = [row for row in differences if row["what"] == what]
        if what == "effect: training":  # the same for every rival
            own = list({(row["kind"], row["budget"]): row | {"and": ""} for row in own}.values())
        if own:
            parts.append(f"### {title}\n\n{_table(own)}")
    return "\n".join(part for part in parts if part)


def primary(differences: Sequence[Row]) -> str:
    """Return the primary endpoint in a sentence: against the rival that comes nearest."""
    own = [
        row
        for row in differences
        if (row["what"], row["kind"], row["budget"]) == ("ldt - rival", FULL, PRIMARY)
    ]
    if not own:
        return ""
    best = min(own, key=lambda row: row["AP"])
    return (
        f"**Primary endpoint**, AP with half of the MACs gone: LDT {best['AP']:+.2f} "
        f"[{best['low']:+.2f}, {best['high']:+.2f}] against its best rival, {best['and']} (Holm p "
        f"{best['holm']:.3f}, {best['replicates']} replicates): {best['verdict']}.\n"
    )


def _grid(cells: Sequence[Row]) -> str:
    """Return a table of AP, a line for each training and score."""
    columns = list(dict.fromkeys((c["kind"], c["budget"]) for c in cells if c["score"]))
    columns = [column for column in columns if column[0] in (FULL, LIGHT)]
    by = {(c["training"], c["score"], c["kind"], c["budget"]): c for c in cells if not c["switch"]}
    bases = [c for c in cells if c["kind"] in (BASE, LONGER)]
    lines = [f"- {c['kind']}, {c['training']}: {_with_interval(c)}" for c in bases]
    head = ["training", "score", *(f"{kind}, {budget}" for kind, budget in columns)]
    lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for training, score in dict.fromkeys((c["training"], c["score"]) for c in cells if c["score"]):
        found = (by.get((training, score, *column)) for column in columns)
        values = [_with_interval(c) if c else "" for c in found]
        lines.append(f"| {' | '.join([training, score, *values])} |")
    return "\n".join(lines) + "\n"


def _with_interval(row: Row) -> str:
    return f"{row['AP']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def _table(rows: Sequence[Row]) -> str:
    holm_too = any("holm" in row for row in rows)
    head = ["", "less", "cells", "budget", "difference", "p", *["Holm"] * holm_too, ""]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        between = f"{row['AP']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
        values = [row["of"], row["and"], row["kind"], row["budget"], between, f"{row['p']:.3f}"]
        values += [f"{row['holm']:.3f}"] if holm_too else []
        lines.append(f"| {' | '.join(map(str, [*values, row['verdict']]))} |")
    return "\n".join(lines) + "\n"


# Files ----------------------------------------------------------------------------------------


def build(folder: Path = HERE, plan: Path = HERE / "plan.yaml") -> list[Results]:
    """Write all files of the benchmark from the records that there are; return the stages.

    Args:
        folder: of the files, with the directory ``records``.
        plan: the plan.
    """
    found, sections, cells, differences = [], [], [], []
    for file in sorted((folder / "records").glob(f"*/{CHOICES}")):
        frozen = json.loads(file.read_text("utf-8"))
        detector, _, dataset = file.parent.name.rpartition("_")
        for stage in STAGES:
            records = Records(file.parent)
            results = read(Plan.read(detector, dataset, plan), stage, records, frozen)
            if results is None:
                continue
            own, against = list(cell_rows(results)), list(comparisons(results))
            found.append(results)
            sections.append(text(results, own, against))
            cells, differences = cells + own, differences + against
    if not found:
        return []
    files.write_rows(folder / "results.csv", cells)
    files.write_rows(folder / "comparisons.csv", differences)
    files.write_text(folder / "results.md", "\n".join(["# Benchmark\n", *sections]))
    _write_readme(folder / "README.md", found, differences)
    return found


def _write_readme(readme: Path, found: Sequence[Results], differences: Sequence[Row]) -> None:
    lines = []
    for results in found:
        if results.stage == "development":
            continue
        own = [d for d in differences if (d["study"], d["stage"]) == (results.study, results.stage)]
        name = results.study.replace("_", " ")
        lines.append(f"{name}, {results.stage}. {primary(own)}" if primary(own) else "")
    start, end = MARKS
    before, _, rest = readme.read_text("utf-8").partition(start)
    _, _, after = rest.partition(end)
    inside = "\n".join([start, "", *filter(None, lines), end])
    files.write_text(readme, f"{before}{inside}{after}")
