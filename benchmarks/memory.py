"""Memory of this process after each round of pruning: it should not grow with their number.

    python benchmarks/memory.py [--rounds 12] [--images 8]

A run of the tiny detector on few generated scenes, an epoch a phase. What was allocated once, such
as the caches of libraries, is there after the third round; the last line is the last over it.
"""

import argparse
import gc
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil

import ldt
from ldt.loop import prune_retrain

WARM = 3  # rounds


def measure(rounds: int, images: int, folder: Path) -> list[float]:
    """Run; return the resident memory in MiB after each cut, garbage collected."""
    found: list[float] = []
    plain = prune_retrain.prune_round

    def measured(*given: Any, **more: Any) -> Any:
        result = plain(*given, **more)
        gc.collect()
        found.append(psutil.Process().memory_info().rss / 2**20)
        return result

    prune_retrain.prune_round = measured
    try:
        ldt.train(
            *("detector=gfl_tiny", "trainer=cpu", f"dataset.train={images}", "dataset.val=4"),
            *("dataset.height=64", "dataset.width=128", "dataset.scale=[128,64]"),
            *("dataset.workers=0", f"dataset.cache={folder / 'cache'}", "recipe.batch_size=4"),
            *("recipe.epochs=1", "recipe.retrain_epochs=1", f"prune.images={images}"),
            *("prune.rate=0.6", f"prune.rounds={rounds}", "report.figures=false"),
            "report.latency_runs=0",
            folder=folder / "run",
        )
    finally:
        prune_retrain.prune_round = plain
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--images", type=int, default=8)
    given = parser.parse_args()
    if given.rounds <= WARM:
        parser.error(f"--rounds {given.rounds}; allowed: above {WARM}")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given.rounds, given.images, Path(folder))
    print("round  resident (MiB)")
    for number, size in enumerate(found, 1):
        print(f"{number:5}  {size:14.0f}")
    print(f"last over round {WARM}: {found[-1] / found[WARM - 1]:.3f}")


if __name__ == "__main__":
    main()
