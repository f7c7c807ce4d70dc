"""Hydra callback for the end of a sweep; created before any job, so heavy imports are deferred."""

import contextlib
import math
import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf


class StudyTable(Callback):
    """Print the study after a sweep; exit with an error code if a run of the study failed."""

    def __init__(self) -> None:
        self.jobs = 0
        self.refused = 0  # jobs without a result

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Count jobs and rejected jobs; Hydra calls it after each job."""
        self.jobs += 1
        value = job_return.return_value if job_return.status == JobStatus.COMPLETED else None
        values = value if isinstance(value, tuple) else (value,)
        empty = any(isinstance(v, float) and math.isnan(v) for v in values)
        self.refused += empty and not _is_finished(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the study; Hydra calls it in the launching process."""
        from ldt import report

        with contextlib.suppress(FileNotFoundError):
            failed = report.print_study(Path(config.hydra.sweep.dir))
            if failed or self.refused:
                sys.exit(1 if failed or self.refused < self.jobs else 2)


def _is_finished(config: DictConfig) -> bool:
    """Return whether a job has finished its run: without objects to detect, its metric is NaN."""
    from ldt.runs import files

    folder = OmegaConf.select(config, "hydra.runtime.output_dir")
    summary = files.read_json(Path(folder) / files.SUMMARY) if folder else {}
    return summary.get("status") == "finished"
