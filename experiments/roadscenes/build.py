"""Reads the runs of this experiment; writes results.csv, results.md and curves: see README.md."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from ldt.figures.comparison import Point, draw_comparison
from ldt.figures.style import save
from ldt.records import write_rows, write_text
from ldt.report import load_study

HERE = Path(__file__).parent
STUDY = Path("runs/roadscenes")
METRICS = ("AP", "mAP")
Cell = tuple[str, str, float]  # detector, method, rate


def cells(runs: list[dict[str, Any]]) -> dict[Cell, list[dict[str, Any]]]:
    """The finished runs of each cell, one per seed."""
    found: dict[Cell, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        if run["status"] == "finished" and run["rounds"]:
            found[run["detector"], run["method"], run["asked_rate"]].append(run)
    return dict(sorted(found.items()))


def point(runs: list[dict[str, Any]], metric: str, prefix: str = "") -> Point:
    """The cell's mean size and its metric for each seed."""
    sizes = [run[f"{prefix}params"] for run in runs]
    return Point(sum(sizes) / len(sizes) / 1e6, [run[prefix + metric] for run in runs])


def line(cell: Cell, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of results.csv."""
    row: dict[str, Any] = dict(zip(("detector", "method", "rate"), cell, strict=True))
    row["seeds"] = len(runs)
    for metric in METRICS:
        for name, prefix in ((metric, ""), (f"base_{metric}", "base_")):
            found = point(runs, metric, prefix)
            row |= {name: round(found.mean, 4), f"{name}_std": round(found.deviation, 4)}
    for key in ("params_rate", "multiply_adds_rate", "seconds"):
        row[key] = round(sum(run[key] for run in runs) / len(runs), 4)
    return row


def table(found: dict[Cell, list[dict[str, Any]]], detector: str) -> str:
    """AP after pruning: a line per method, a column per rate; the best of each rate in bold."""
    points = {
        (method, rate): point(runs, "AP")
        for (name, method, rate), runs in found.items()
        if name == detector
    }
    rates = sorted({rate for _, rate in points})
    best = {rate: max(p.mean for (_, r), p in points.items() if r == rate) for rate in rates}
    lines = [
        f"| {detector}: AP | unpruned | {' | '.join(f'{rate:.0%} gone' for rate in rates)} |",
        f"|---|---|{'---|' * len(rates)}",
    ]
    for method in sorted({method for method, _ in points}):
        runs = [r for key, cell in found.items() if key[:2] == (detector, method) for r in cell]
        base = Point(0, list({run["seed"]: run["base_AP"] for run in runs}.values()))
        texts = [f"{base.mean:.3f} ± {base.deviation:.3f}"]
        for rate in rates:
            here = points.get((method, rate))
            text = f"{here.mean:.3f} ± {here.deviation:.3f}" if here else "-"
            texts.append(f"**{text}**" if here and here.mean == best[rate] else text)
        lines.append(f"| {method} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Build everything from what is finished."""
    found = cells(load_study(STUDY))
    write_rows(HERE / "results.csv", [line(cell, runs) for cell, runs in found.items()])
    text = ""
    for detector in sorted({cell[0] for cell in found}):
        text += table(found, detector) + "\n"
        curves: dict[str, list[Point]] = defaultdict(list)
        unpruned: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        for (name, method, _), runs in found.items():
            if name == detector:
                curves[method].append(point(runs, "mAP"))
                kind = "unpruned, LDT" if method == "ldt" else "unpruned"
                unpruned[kind].update({run["seed"]: run for run in runs})
        bases = {k: point(list(v.values()), "mAP", "base_") for k, v in sorted(unpruned.items())}
        save(draw_comparison(curves, bases, "mAP"), HERE / f"{detector}.png")
    write_text(HERE / "results.md", text)
    print(text)


if __name__ == "__main__":
    main()
