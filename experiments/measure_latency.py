"""Measure the latency of Table 4's detectors one after another on an otherwise idle machine.

python experiments/measure_latency.py                # CPU, and GPU where there is one
python experiments/measure_latency.py --size small

Runs measure latency themselves, but on the training device and possibly beside other jobs. The
results are written to `latency.json` in the run's directory, which `build.py` prefers. Eager
PyTorch, ONNX Runtime and OpenVINO are timed in turns too, by the CPU time of one thread.
"""

import argparse
from pathlib import Path

import torch
from cells import ROOT, fill, load_cells, load_runs

from ldt import load_pruned
from ldt.deployment.to_runtime import adapter_of
from ldt.detectors.checkpoints import read
from ldt.detectors.forward import raw_forward
from ldt.evaluation.profiling import latency
from ldt.runs.files import LATENCY, read_json, round_checkpoint, write_json
from ldt.runs.run import Run
from ldt.runtimes.timing import RUNTIMES, measure_runtimes

DEVICES = {"cpu_ms": "cpu", "gpu_ms": "cuda"}


def measure(run: Run, device: str, runs: int) -> float:
    """Median latency of one image in ms for the detector of a run's last round."""
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
    names = list(RUNTIMES)
    parser.add_argument("--runtimes", nargs="*", choices=names, default=names)
    given = parser.parse_args()
    cells, study = load_cells("table4_latency", given.size)
    fill(cells, list(load_runs([given.runs or ROOT / "runs" / study])))
    for run in (run for cell in cells for run in cell.runs.values()):
        known = read_json(run.folder / LATENCY)
        for key, device in DEVICES.items():
            if device == "cpu" or torch.cuda.is_available():
                known[key] = measure(run, device, given.times)
                print(f"{run.folder.name}  {key} {known[key]}")
        adapter = adapter_of(read(run.folder / round_checkpoint(run.row["rounds"])))
        known |= measure_runtimes(adapter, given.runtimes, given.times)
        write_json(run.folder / LATENCY, known)


if __name__ == "__main__":
    main()
