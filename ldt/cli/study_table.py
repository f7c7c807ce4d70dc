"""Hydra callback for the end of a sweep; created before any job, so heavy imports are deferred."""

import contextlib
import math
import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class StudyTable(Callback):
    """Print the study after a sweep; exit with an error code if a run of the study failed."""

    def __init__(self) -> None:
        self.jobs = 0
        self.without_result = 0
        self.refused = 0  # before any work

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Count jobs and rejected jobs; Hydra calls it after each job."""
        self.jobs += 1
        value = job_return.return_value if job_return.status == JobStatus.COMPLETED else None
        values = value if isinstance(value, tuple) else (value,)
        if any(isinstance(v, float) and math.isnan(v) for v in values):
            refused, finished = _state(Path(config.hydra.runtime.output_dir))
            self.refused += refused
            self.without_result += refused or not finished

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the study; Hydra calls it in the launching process."""
        from ldt import report
        from ldt.runs.files import discard_sweep

        study, failed = Path(config.hydra.sweep.dir), 0
        if self.refused == self.jobs > 0:
            discard_sweep(study)
            sys.exit(2)
        with contextlib.suppress(FileNotFoundError):
            failed = report.print_study(study)
        if failed or self.without_result:
            sys.exit(1)


def _state(folder: Path) -> tuple[bool, bool]:
    """Return whether a job was refused and whether its directory holds a finished run.

    The metric of a finished run is NaN too if there is no object to detect.
    """
    from ldt.runs.files import SUMMARY, read_json
    from ldt.runs.refusal import REFUSED_JOBS

    status = "damaged"
    with contextlib.suppress(ValueError):
        status = read_json(folder / SUMMARY).get("status")
    return status is None or folder in REFUSED_JOBS, status == "finished"
