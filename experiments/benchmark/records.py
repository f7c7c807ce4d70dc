"""What the finished cells of a study have found, small enough for the repository.

A folder holds cells.csv, with a line for each cell, and the detections of those that are compared:
all that the statistics need; and choices.json, what development has frozen. A stage goes on from
it where the run directories are gone.
"""

import shutil
from pathlib import Path
from typing import Any

from benchmark.plan import LIGHT, Cell

from ldt.evaluation.detection_rows import Image
from ldt.evaluation.kept_detections import load
from ldt.runs import DONE, files, provenance

CELLS, CHOICES = "cells.csv", "choices.json"
NUMBERS = ("AP", "AP50", "params", "multiply_adds", "latency_ms")  # of a run's last round


class Records:
    """The finished cells of a study.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = {row["cell"]: row for row in files.read_rows(folder / CELLS)}

    def row(self, cell: Cell) -> dict[str, Any] | None:
        """Return the numbers of a cell; None if it is not finished."""
        return self.rows.get(cell.name)

    def detections(self, cell: Cell) -> tuple[list[Image], tuple[str, ...]] | None:
        """Return the images of a cell's validation, and the classes; None if they are not kept."""
        file = self._file(cell)
        return load(file) if file.is_file() else None

    def add(self, cell: Cell, run: Path, stage: str) -> None:
        """Keep what the run of a cell has found, if it is finished.

        Trials of the development, which are ten times as many as the other cells, leave no
        detections.

        Args:
            cell: the cell.
            run: directory of its run.
            stage: name of the stage.
        """
        summary = files.read_json(run / files.SUMMARY)
        if summary.get("status") != DONE:
            return
        last = summary["rounds"][-1]
        if (stage, cell.kind) != ("development", LIGHT):
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / files.detections(last["round"]), self._file(cell))
        starts = provenance.starts(run)
        commit = starts[-1]["git"].get("commit", "") if starts else ""
        self.rows[cell.name] = {
            **{"cell": cell.name, "stage": stage},
            **{name: last[name] for name in NUMBERS if last.get(name) is not None},
            "commit": commit[:10],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_rows(self.folder / CELLS, list(self.rows.values()))

    def _file(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.npz"
