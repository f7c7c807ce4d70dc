"""AP right after a cut with `prune.repair` none, bn and lstsq, without any training.

    python experiments/batch_norm_repair/measure.py mmdet::yolox/yolox_nano_8xb8-300e_coco.py \
        yolox_nano.pth /data/coco --out results.csv

A criterion scores the detector once; then each rate and repair begins with the unpruned detector.
Rows that the file has already are not measured again.
"""

import argparse
import csv
import sys
import time
from copy import deepcopy
from pathlib import Path

import pandas as pd
import torch

import ldt
from ldt.criteria.base import score_groups
from ldt.criteria.methods import find_method
from ldt.data.datamodule import DetectionDataModule
from ldt.data.folders import open_folder
from ldt.detectors.adapter import Calibration, Detector
from ldt.detectors.forward import eval_with_gradients
from ldt.detectors.models import input_settings, quiet
from ldt.detectors.opening import open_detector
from ldt.loop.pruning_round import Unpruned, repair, selection_arguments
from ldt.loop.schedule import PruningSchedule
from ldt.pruning.budget import select_channels
from ldt.pruning.refit import refit_consumers

CUTS = ("params:0.2", "params:0.3", "macs:0.3", "macs:0.5")
REPAIRS = ("none", "bn", "lstsq")
KEYS = ["detector", "criterion", "ranking", "budget", "rate", "repair"]


def accuracy(detector: Detector, data: DetectionDataModule, images: int) -> float:
    """AP on evenly spread validation images."""
    loader = ldt.api.calibration_batches(data.val_dataloader().dataset, images, 16)
    return ldt.evaluate(detector.model, loader, data.classes)["AP"]


def measure(options: argparse.Namespace) -> None:
    """Write a row for the unpruned detector, and one for each criterion, cut and repair."""
    side = options.square
    given = {"scale": (side, side), "keep_ratio": True, "pad": "square"} if side else {}
    data = open_folder(options.data, given or input_settings(options.config), {})
    data.setup("fit")
    name, out = Path(options.config).stem, options.out
    known = pd.read_csv(out)[KEYS].to_numpy().tolist() if out.exists() else []
    opened = open_detector(options.config, options.weights, data.classes)
    loader = data.calibration_dataloader(options.images, 16)
    size = opened.model.data_preprocessor(next(iter(loader)), False)["inputs"].shape[2:]
    base = Detector(opened.model, tuple(size))
    batches, unpruned = list(Calibration(base, loader)), Unpruned.of(base)

    def write(criterion: str, ranking: str, budget: str, rate: float, *cells: object) -> None:
        fresh = not out.exists()
        with out.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if fresh:
                writer.writerow([*KEYS, "AP", "seconds"])
            writer.writerow([name, criterion, ranking, budget, rate, *cells])
        print(name, criterion, ranking, budget, rate, *cells, flush=True)

    if not any(row[0] == name for row in known):
        write("-", "-", "-", 0.0, "-", round(accuracy(base, data, options.val), 4), 0.0)
    for spec in options.criteria:
        criterion, _, ranking = spec.partition(":")
        method, scores = find_method(criterion, ranking or None), None
        for cut in options.cuts:
            budget, _, rate = cut.partition(":")
            for kind in REPAIRS:
                row = [name, criterion, method.ranking, budget, float(rate), kind]
                if row in known:
                    continue
                schedule = PruningSchedule.one_shot(
                    float(rate), budget=budget, ranking=method.ranking, repair=kind
                )
                detector = deepcopy(base)
                with eval_with_gradients(detector.model):
                    graph = detector.trace(schedule.scope)
                    if scores is None:
                        torch.manual_seed(0)
                        scores = score_groups(method.criterion, detector, graph, batches)
                    arguments = selection_arguments(detector, graph, schedule, unpruned, 1)
                    channels = select_channels(graph, scores, **arguments)
                    start = time.perf_counter()
                    if kind == "lstsq":
                        refit_consumers(graph, channels, batches)
                    graph.remove(channels)
                repair(detector, batches, schedule)
                seconds = round(time.perf_counter() - start, 1)
                found = round(accuracy(detector, data, options.val), 4)
                write(criterion, method.ranking, budget, float(rate), kind, found, seconds)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("weights", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--criteria", nargs="*", default=["ldt", "l1", "random"])
    parser.add_argument("--cuts", nargs="*", default=CUTS)
    parser.add_argument("--square", type=int, help="input size of a config without test pipeline")
    parser.add_argument("--images", type=int, default=64, help="calibration images")
    parser.add_argument("--val", type=int, default=82, help="validation images")
    parser.add_argument("--out", type=Path, default=Path("results.csv"))
    quiet()
    measure(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
