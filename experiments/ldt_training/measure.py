"""Reads the runs of this experiment and writes results.csv and results.md: see README.md."""

import statistics
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldt.build import build_data
from ldt.detectors.checkpoints import load_pruned
from ldt.evaluation.neck_statistics import neck_statistics
from ldt.runs.files import (
    ROUNDS,
    SUMMARY,
    read_json,
    read_rows,
    round_checkpoint,
    write_rows,
    write_text,
)

HERE = Path(__file__).parent
RUNS = Path("runs/ldt_training")
METRICS = ("AP", "AP50", "mAP")
STATISTICS = ("share", "correlation", "eigenvalue")


def measure(folder: Path) -> dict[str, Any]:
    """One row: the base detector's metrics and, per scale, the neck's statistics."""
    config: Any = OmegaConf.load(folder / "config.yaml")
    data = build_data(config)
    detector = load_pruned(folder / round_checkpoint(0))
    row: dict[str, Any] = {"ldt": bool(config.ldt.enabled), "seed": config.seed}
    base = read_rows(folder / ROUNDS)[0]
    row |= {name: round(base[name], 4) for name in METRICS}
    found = neck_statistics(detector, data.probe_dataloader("val", 16), ridge=config.ldt.ridge)
    for scale in found:
        for name in STATISTICS:
            row[f"{name}_{scale['scale']}"] = round(scale[name], 4)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, with and without LDT, as Markdown."""
    lines = ["| | without LDT | with LDT |", "|---|---|---|"]
    for key in rows[0]:
        if key in ("ldt", "seed"):
            continue
        cells = []
        for wanted in (False, True):
            values = [row[key] for row in rows if row["ldt"] == wanted]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every finished run of the study."""
    finished = [
        file.parent
        for file in sorted(RUNS.glob(f"*/{SUMMARY}"))
        if read_json(file).get("status") == "finished"
    ]
    rows = sorted((measure(f) for f in finished), key=lambda row: (row["ldt"], row["seed"]))
    write_rows(HERE / "results.csv", rows)
    write_text(HERE / "results.md", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
