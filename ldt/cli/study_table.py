"""The end of a sweep: its table and its exit code."""

import contextlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from ldt.runs.refusal import Failed, Refused


class StudyTable(Callback):
    """Print the study after a sweep; exit with an error code if one of its jobs failed.

    Hydra creates it before any job, so heavy imports are deferred.
    """

    def __init__(self) -> None:
        self.jobs: list[JobReturn] = []  # of this process: joblib and submitit have others

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Keep the result of a job; Hydra calls it after each job."""
        self.jobs.append(job_return)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the study; Hydra calls it in the launching process."""
        from ldt import report

        study = Path(config.hydra.sweep.dir)
        exit_sweep(study, self.jobs, only_refused=True)
        with contextlib.suppress(FileNotFoundError):
            report.print_study(study)
        exit_sweep(study, self.jobs)


def exit_sweep(study: Path, jobs: Iterable[JobReturn], only_refused: bool = False) -> None:
    """Exit with 2 if all jobs of a sweep were refused, and with 1 if some have no result.

    Args:
        study: directory of the study; what Hydra wrote for refused jobs alone is removed.
        jobs: the jobs of the sweep.
        only_refused: exit only if all jobs were refused.
    """
    from ldt.runs.files import discard_sweep

    values = [_values(job) for job in jobs]
    refused = [any(isinstance(value, Refused) for value in each) for each in values]
    if refused and all(refused):
        discard_sweep(study)
        sys.exit(2)
    if not only_refused and any(_has_failed(value) for each in values for value in each):
        sys.exit(1)


def _has_failed(value: object) -> bool:
    return value is None or isinstance(value, Failed)


def _values(job: JobReturn) -> Sequence[Any]:
    value = job.return_value if job.status == JobStatus.COMPLETED else None
    return value if isinstance(value, tuple) else (value,)
