"""A sweep: its jobs while they run, its table at the end, and its exit code."""

import contextlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from ldt.cli.sweep_progress import (
    FAILED,
    FINISHED,
    REFUSED,
    JobReport,
    SweepProgress,
    ask_for_reports,
    labels,
    report_of,
)
from ldt.progress.console import terminal
from ldt.progress.display import display
from ldt.runs.refusal import Failed, Refused


class StudyTable(Callback):
    """Show the jobs of a sweep while they run.

    Hydra creates it before any job, so heavy imports are deferred.

    Attributes:
        jobs: those that have ended in this process: joblib and submitit have others.
        progress: all jobs of the sweep of this process.
    """

    jobs: list[JobReturn] = []
    progress = SweepProgress()

    _report: JobReport | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        """Forget earlier sweeps; Hydra calls it in the launching process."""
        here = str(config.hydra.launcher._target_).endswith(".BasicLauncher")
        place = None
        if not here and terminal().is_interactive:
            place = ask_for_reports(Path(config.hydra.sweep.dir))
        StudyTable.jobs, StudyTable.progress = [], SweepProgress(place)
        display().above = None if here else self.progress.draw

    def on_job_start(self, config: DictConfig, **kwargs: object) -> None:
        """Begin a job; Hydra calls it before each job."""
        if config.hydra.mode == RunMode.MULTIRUN:
            self._report = report_of(config.hydra.job.num)
            if self._report is not None:
                return self._report.begin()
            display().above = self.progress.draw if self.progress.jobs else None
            self.progress.start(config.hydra.job.num)
        return None

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: object) -> None:
        """Keep the result of a job; Hydra calls it after each job."""
        self.jobs.append(job_return)
        if config.hydra.mode == RunMode.MULTIRUN:
            values = _values(job_return)
            state = FAILED if any(_has_failed(value) for value in values) else FINISHED
            state = REFUSED if any(isinstance(value, Refused) for value in values) else state
            result = values[0] if len(values) == 1 else tuple(values)
            if self._report is not None:
                self._report.end(state, result)
            else:
                self.progress.end(config.hydra.job.num, state, result)


def end_sweep(study: Path, jobs: Sequence[JobReturn]) -> None:
    """Print the jobs of a sweep, then exit with an error code if one of them has no result.

    Args:
        study: directory of the study.
        jobs: the jobs of the sweep.
    """
    from ldt import report

    display().above = None
    StudyTable.progress.close()
    exit_sweep(study, jobs, only_refused=True)
    with contextlib.suppress(FileNotFoundError):
        named = zip(map(_folder, jobs), labels([job.overrides or () for job in jobs]), strict=True)
        report.print_study(study, {name: label or name for name, label in named if name})
    exit_sweep(study, jobs)


def _folder(job: JobReturn) -> str:
    """Return the name of the directory of a job; empty if it had none."""
    if job.hydra_cfg is None or any(isinstance(value, Refused) for value in _values(job)):
        return ""
    return Path(job.hydra_cfg.hydra.runtime.output_dir).name


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
