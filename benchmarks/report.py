"""CPU seconds of `ldt report` and `ldt runs` over many runs, copies of one finished run.

python benchmarks/report.py runs/default/<run>              # 500 runs
python benchmarks/report.py runs/default/<run> --runs 10000 --no-report
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ldt.runs import files

METHODS = 10  # number of methods among the copies


def copies(run: Path, study: Path, count: int) -> None:
    """Write copies of a run that differ in method and seed."""
    summary, config = files.read_json(run / files.SUMMARY), files.read_config(run)
    for index in range(count):
        method, seed = f"method{index % METHODS}", index // METHODS
        folder = study / f"{method}-s{seed}"
        folder.mkdir(parents=True)
        told = {"run": folder.name, "method": method, "seed": seed}
        files.write_json(folder / files.SUMMARY, summary | told)
        named = {"method": config["method"] | {"name": method}, "seed": seed}
        files.write_json(folder / files.CONFIG, config | named)  # JSON is YAML
        for logs in files.log_folders(run):
            shutil.copytree(logs, folder / logs.name)


def seconds(*arguments: str) -> float:
    """Return the CPU time of a command of ldt."""
    before = os.times()
    subprocess.run(
        [sys.executable, "-m", "ldt.cli", *arguments], check=True, stdout=subprocess.DEVNULL
    )
    after = os.times()
    return after.children_user + after.children_system - sum(before[2:4])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--no-report", action="store_true", help="list them only")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder) / "study"
        copies(given.run, study, given.runs)
        if not given.no_report:
            print(f"ldt report: {seconds('report', str(study)):.1f} s")
        print(f"ldt runs: {seconds('runs', str(study)):.1f} s")


if __name__ == "__main__":
    main()
