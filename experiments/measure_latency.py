"""Times the detectors of Table 4 one after another on this machine; keep it quiet meanwhile.

python experiments/measure_latency.py                # CPU, and GPU where there is one
python experiments/measure_latency.py --size small

A run times its detectors itself, but on the device that it trains on and beside other jobs. What
is measured here goes to `latency.json` in the run's directory, which `build.py` prefers.
"""

import argparse
from pathlib import Path

import torch
from cells import ROOT, fill, load_cells, load_runs

from ldt import load_pruned
from ldt.detectors.forward import raw_forward
from ldt.evaluation.profiling import latency
from ldt.runs.files import LATENCY, read_json, round_checkpoint, write_json
from ldt.runs.run import Run

DEVICES = {"cpu_ms": "cpu", "gpu_ms": "cuda"}


def measure(run: Run, device: str, runs: int) -> float:
    """Median milliseconds of one image through a run's last detector."""
    detector = load_pruned(run.folder / round_checkpoint(run.row["rounds"]), device)
    image = torch.zeros(1, 3, *run.row["input_size"], device=device)
    found = latency(lambda: raw_forward(detector, image), runs=runs, device=device)
    return round(found.median_ms, 2)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--runs", type=Path, help="the study, if not the experiment's own")
    parser.add_argument("--times", type=int, default=100, help="timed inferences, at least 30")
    given = parser.parse_args()
    cells, study = load_cells("table4_latency", given.size)
    fill(cells, list(load_runs([given.runs or ROOT / "runs" / study])))
    for run in (run for cell in cells for run in cell.runs.values()):
        known = read_json(run.folder / LATENCY)
        for key, device in DEVICES.items():
            if device == "cpu" or torch.cuda.is_available():
                known[key] = measure(run, device, given.times)
                print(f"{run.folder.name}  {key} {known[key]}")
        write_json(run.folder / LATENCY, known)


if __name__ == "__main__":
    main()
