"""Compare the runs of an experiment with the paper: results.csv, results.md and figures.

python experiments/build.py table1_coco                 # from runs/paper
python experiments/build.py table1_coco --size small    # results_small.csv, results_small.md
python experiments/build.py fig3_kitti --size small --runs runs/paper_small --runs runs/roadscenes
python experiments/build.py table1_coco recipe.batch_size=4   # runs made with this override
python experiments/build.py benchmark                   # statistics from the detections of its runs
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cells import ROOT, RUNTIMES, SMALL, TableRow, differing, fill, load_cells, load_runs

from ldt.runs import files
from ldt.runs.files import write_rows, write_text
from ldt.runs.run import Run

FIGURES = {
    "fig1_discriminants": "discriminants",
    "fig3_kitti": "curves",
    "fig4_attention": "attention",
    "fig5_detections": "detections",
    "fig6_stability": "stability",
    "roadscenes": "curves",
}
TITLES = {
    "AP": "AP (%, IoU 0.50:0.95)",
    "mAP": "mAP (%, IoU 0.5)",
    "removed": "removed of the budget (%)",
    "multiply_adds_G": "multiply-adds (G)",
    "flops_G": "FLOPs, two for each multiply-add (G)",
    "params_M": "parameters (M)",
    "cpu_ms": "latency on the CPU (ms)",
    "gpu_ms": "latency on the GPU (ms)",
    "eager_ms": "CPU time of one thread in eager PyTorch (ms)",
    "onnxruntime_ms": "CPU time of one thread in ONNX Runtime (ms)",
    "openvino_ms": "CPU time of one thread in OpenVINO (ms)",
}
HEADS = {
    "paper": "paper",
    "ours": "ours",
    "difference": "difference",
    "paper_of_base": "paper, % of its base",
    "ours_of_base": "ours, % of its base",
    "unpruned": "before the cuts",
    "seeds": "seeds",
}
GROUP = ("dataset", "detector")
MACHINE = ("cpu", "cores", "gpus", "torch")  # of the environment of a start
OTHER_CELLS = ("prune.rate", "prune.budget", "ldt.enabled")  # differ between tables on purpose


# Numbers --------------------------------------------------------------------------------------


def result(cell: TableRow, base: TableRow, metric: str, comparable: bool) -> dict[str, Any]:
    """Build a line of results.csv.

    Args:
        cell: the table row.
        base: the first row of the same detector and data set, which is the original detector if
            the table has it.
        metric: a key of :data:`cells.METRICS`.
        comparable: whether the detector is the paper's, so that the difference is meaningful.
    """
    paper, values, before = (
        cell.paper.get(metric),
        cell.values(metric),
        cell.values(metric, "base_"),
    )
    ours = statistics.mean(values) if values else None
    line: dict[str, Any] = cell.keys | {"metric": metric, "paper": paper, "ours": _round(ours)}
    line["deviation"] = _round(statistics.stdev(values)) if len(values) > 1 else None
    line["seeds"] = len(values)
    if comparable and ours is not None and paper is not None:
        line["difference"] = _round(ours - paper)
    if metric != "removed":
        line["unpruned"] = _round(statistics.mean(before)) if before else None
        if base.config["method.name"] == "none":
            originals = base.values(metric)
            line["paper_of_base"] = _share(paper, base.paper.get(metric))
            line["ours_of_base"] = _share(ours, statistics.mean(originals) if originals else None)
    return line | {"runs": " ".join(run.folder.name for _, run in sorted(cell.runs.items()))}


def results(size: str, cells: Sequence[TableRow], metric: str) -> list[dict[str, Any]]:
    """Build the lines of one metric."""
    pairs = zip(cells, bases(cells), strict=True)
    return [result(cell, base, metric, size == "full") for cell, base in pairs]


def metrics(cells: Sequence[TableRow]) -> list[str]:
    """Return the paper's metrics, and those of runtimes that were measured besides."""
    besides = [name for name in RUNTIMES if any(cell.values(name) for cell in cells)]
    return [*cells[0].paper, *besides]


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _share(part: float | None, whole: float | None) -> float | None:
    return round(100 * part / whole, 1) if part is not None and whole else None


def bases(cells: Sequence[TableRow]) -> list[TableRow]:
    """Return, for each cell, the first one of its detector and data set."""
    first: dict[tuple[Any, ...], TableRow] = {}
    return [first.setdefault(group(cell), cell) for cell in cells]


def group(cell: TableRow) -> tuple[Any, ...]:
    """Return data set and detector of a cell, if its experiment has several."""
    return tuple(cell.keys[key] for key in GROUP if key in cell.keys)


# Text -----------------------------------------------------------------------------------------


def table(lines: Sequence[dict[str, Any]], keys: Sequence[str]) -> str:
    """Format one metric's lines as Markdown without empty columns, the best method in bold."""
    heads = [name for name in HEADS if any(line.get(name) not in (None, "") for line in lines)]
    best = _best(lines, keys)
    text = [
        f"| {' | '.join([*keys, *(HEADS[name] for name in heads)])} |",
        "|" + "---|" * (len(keys) + len(heads)),
    ]
    for line in lines:
        cells = [str(line[key]) for key in keys]
        cells += [_text(name, line, line["ours"] in best[_rivals(line, keys)]) for name in heads]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def _rivals(line: dict[str, Any], keys: Sequence[str]) -> tuple[Any, ...]:
    return tuple(line[key] for key in keys if key != "method")


def _best(lines: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Any]]:
    """Find the best accuracy among lines that differ only in their method."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for line in lines:
        found.setdefault(_rivals(line, keys), []).append(line["ours"])
    ours = {key: [value for value in values if value is not None] for key, values in found.items()}
    accuracy = lines[0]["metric"] in ("AP", "mAP")
    return {key: [max(v)] if accuracy and len(v) > 1 else [] for key, v in ours.items()}


def _text(name: str, line: dict[str, Any], best: bool) -> str:
    value = line.get(name)
    if value is None:
        return "-"
    if name == "ours":
        spread = "" if line["deviation"] is None else f" ± {line['deviation']:.2f}"
        return f"**{value:.2f}**{spread}" if best else f"{value:.2f}{spread}"
    if name == "difference":
        return f"{value:+.2f}"
    return f"{value:.2f}" if name == "unpruned" else str(value)


def report(name: str, size: str, cells: Sequence[TableRow], runs: Sequence[Run]) -> str:
    """Write the text of results.md: hardware, a table per metric, missing cells.

    Args:
        name: name of the experiment.
        size: ``full`` or ``small``.
        cells: table rows with their runs.
        runs: all finished runs that were loaded, for the list of near misses.
    """
    used = [run for cell in cells for run in cell.runs.values()]
    parts = [f"# {name}{' on a laptop' if size == 'small' else ''}\n", _where(used)]
    if size == "small":
        parts.append(_stand_ins(cells))
    keys = list(cells[0].keys)
    for metric in metrics(cells):
        lines = results(size, cells, metric)
        parts.append(f"## {TITLES[metric]}\n\n{table(lines, keys)}")
    parts += [_missing(name, size, cells), _near_misses(cells, runs)]
    return "\n".join(part for part in parts if part)


def _where(runs: Sequence[Run]) -> str:
    if not runs:
        return "No run is finished yet.\n"
    last = max((run.folder / files.SUMMARY).stat().st_mtime for run in runs)
    about = [start["environment"] for run in runs for start in run.starts]
    told = ([machine.get(key, "?") for key in MACHINE] for machine in about)
    kinds = dict.fromkeys("{}, {} cores, GPU: {}, torch {}".format(*values) for values in told)
    day = time.strftime("%Y-%m-%d", time.localtime(last))
    return f"{len(runs)} runs, the last of {day}. Machines: {'; '.join(kinds) or 'not recorded'}.\n"


def _stand_ins(cells: Sequence[TableRow]) -> str:
    named = {value for cell in cells for value in cell.keys.values()}
    pairs = [f"`{small}` for `{full}`" for known in SMALL.values() for full, small in known.items()
             if full in named]  # fmt: skip
    return (
        f"Stand-ins: {', '.join(pairs)}; the data are the embedded road scenes. "
        "Compare the changes against the base, not the values.\n"
    )


def _missing(name: str, size: str, cells: Sequence[TableRow]) -> str:
    """List the cells with missing seeds and the commands to run them."""
    todo = [cell for cell in cells if cell.missing]
    commands = dict.fromkeys(command(name, size, cell) for cell in todo)
    if not commands:
        return ""
    text = f"## Missing: {len(todo)} of {len(cells)} cells\n\n```sh\n"
    if not any(cell.runs for cell in cells):
        return text + f"{command(name, size)}\n```\n"
    return text + "\n".join(commands) + "\n```\n"


def command(name: str, size: str, cell: TableRow | None = None) -> str:
    """Return the command line that runs a cell, or the whole experiment."""
    experiment = name if size == "full" else f"{name}_small"
    job = list(cell.job) if cell else []
    if cell and len(cell.seeds) > 1:
        job.append(f"seed={','.join(map(str, cell.missing))}")
    if size == "full" and name != "roadscenes" and not any("dataset.root" in part for part in job):
        job.append("'dataset.root=/data/${dataset.name}'")
    return " ".join(["python run.py -m", f"experiment={experiment}", *job])


def _near_misses(cells: Sequence[TableRow], runs: Sequence[Run]) -> str:
    """List runs that differ from a cell in a few keys only, possibly by mistake."""
    used = {run.folder for cell in cells for run in cell.runs.values()}
    found = []
    for run in runs:
        keys = min((differing(cell, run.settings) for cell in cells), key=len)
        another = any(key.endswith(".name") or key in OTHER_CELLS for key in keys)
        if run.folder not in used and keys and not another:
            place = f"{run.folder.parent.name}/{run.folder.name}"
            found.append(f"- {place}: other {', '.join(keys)}")
    return "\n".join(["## Left out, for a changed key\n", *found, ""]) if found else ""


# Figures --------------------------------------------------------------------------------------


def figure_commands(name: str, size: str, cells: Sequence[TableRow]) -> Iterable[list[str]]:
    """Yield a figure command per detector; curves show the pruned runs of all seeds."""
    figure, suffix = FIGURES[name], "" if size == "full" else "_small"
    for key in dict.fromkeys(map(group, cells)):
        folders = []
        for cell in (cell for cell in cells if group(cell) == key):
            runs = [run for _, run in sorted(cell.runs.items())]
            if figure == "curves":
                folders += [run.folder for run in runs if run.row["rounds"]]
            else:
                folders += [run.folder for run in runs[:1]]
        if folders:
            out = ROOT / "experiments" / name / f"{figure}-{key[-1]}{suffix}.png"
            yield [figure, *map(str, folders), "--out", str(out)]


# Command line ---------------------------------------------------------------------------------


def build(
    name: str, size: str, studies: Sequence[Path], given: Sequence[str], folder: Path
) -> list[TableRow]:
    """Write results.csv and results.md of an experiment from the available runs.

    Args:
        name: name of the experiment.
        size: ``full`` or ``small``.
        studies: directories of runs; empty: the experiment's study, which need not exist.
        given: additional overrides used for the runs.
        folder: output folder.

    Returns:
        The table rows with their runs.
    """
    cells, study = load_cells(name, size, given)
    own = ROOT / "runs" / study
    runs = list(load_runs(studies or [own] * own.is_dir()))
    fill(cells, runs)
    suffix = "" if size == "full" else "_small"
    rows = [line for metric in metrics(cells) for line in results(size, cells, metric)]
    folder.mkdir(exist_ok=True)
    write_rows(folder / f"results{suffix}.csv", rows)
    text = report(name, size, cells, runs)
    write_text(folder / f"results{suffix}.md", text)
    print(text)
    return cells


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="of the experiment, a folder here; all for every one")
    parser.add_argument("overrides", nargs="*", help="as the runs were made with")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--runs", type=Path, action="append", default=[], help="a study; repeat it")
    parser.add_argument("--no-figure", action="store_true", help="tables only")
    given = parser.parse_intermixed_args()  # overrides may be anywhere
    for text in given.overrides:
        if "=" not in text:
            parser.error(f"{text!r} is no override like recipe.epochs=2; name one experiment")
    if given.name == "benchmark":
        from benchmark.page import build as build_benchmark

        if not build_benchmark():
            parser.error("no stage of the benchmark is finished; see experiments/benchmark")
        return
    every = sorted(file.parent.name for file in ROOT.glob("experiments/*/expected.csv"))
    for name in every if given.name == "all" else [given.name]:
        folder = ROOT / "experiments" / name
        try:
            cells = build(name, given.size, given.runs, given.overrides, folder)
        except FileNotFoundError as error:
            parser.error(str(error))
        if name in FIGURES and not given.no_figure:
            for arguments in figure_commands(name, given.size, cells):
                command_line = [sys.executable, "-m", "ldt.figures", *arguments]
                if subprocess.run(command_line, check=False).returncode:
                    sys.exit(f"tables are written, but this failed: {' '.join(command_line)}")


if __name__ == "__main__":
    main()
