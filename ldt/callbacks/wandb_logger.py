"""Weights & Biases: log every job as a run, in addition to its CSV files."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from types import TracebackType
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from ldt.runs import files

MODES = ("offline", "online")
AXES = {"train/*": "trainer/global_step", "val/*": "trainer/global_step", "round/*": "round/round"}


class WandbRun(WandbLogger):
    """Log a job as a W&B run, within a ``with`` block around the job.

    The run finishes with the rounds as a table, the pictures and the checkpoint, or is marked as
    failed if the block raises. Its id is derived from study and name, so that a resumed job
    continues the same W&B run. The x axis is ``trainer/global_step`` for training, and
    ``round/round`` for ``round/*``. Only rank 0 logs.

    Args:
        save_dir: the job's directory; W&B writes to ``wandb`` in it.
        study: W&B's group.
        name: the job's name.
        project: W&B's project.
        entity: a user or team; None is the account's default.
        tags: labels to filter by.
        mode: ``offline`` stores the run for ``wandb sync``, ``online`` uploads it while it runs.
        checkpoint: log the last round's checkpoint as an artifact.

    Raises:
        ValueError: unknown mode, or ``online`` without an account.
    """

    def __init__(
        self,
        save_dir: str,
        study: str,
        name: str,
        project: str,
        entity: str | None = None,
        tags: Sequence[str] = (),
        mode: str = "offline",
        checkpoint: bool = True,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"logger.mode={mode!r}; choose from {', '.join(MODES)}")
        self.folder, self.checkpoint = Path(save_dir), checkpoint
        about: dict[str, Any] = {"group": study, "name": name, "id": run_id(study, name)}
        about |= {"project": project, "entity": entity, "tags": list(tags), "mode": mode}
        run = None if rank_zero_only.rank else _begin(save_dir, about)
        super().__init__(experiment=run, project=project, id=about["id"], save_dir=save_dir)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log all metrics that are not nan (as the AP of object sizes without ground truth)."""
        super().log_metrics({k: v for k, v in metrics.items() if not isnan(v)}, step)

    def __enter__(self) -> "WandbRun":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if rank_zero_only.rank:
            return
        failed = True
        try:
            if kind is None:
                self._log_result(files.read_json(self.folder / files.SUMMARY))
                failed = False
        finally:
            self.experiment.finish(exit_code=int(failed))

    def _log_result(self, summary: dict[str, Any]) -> None:
        rows = summary["rounds"]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data: list[Any] = [[row.get(key) for key in columns] for row in rows]
        pictures = files.pictures(self.folder)
        self.experiment.log(
            {"rounds": wandb.Table(columns=columns, data=data)}
            | {f"pictures/{file.stem}": wandb.Image(str(file)) for file in pictures}
        )
        if self.checkpoint:
            self._log_checkpoint(self.folder / summary["checkpoint"], summary)

    def _log_checkpoint(self, file: Path, summary: dict[str, Any]) -> None:
        about = {key: summary[key] for key in ("study", "detector", "dataset", "method", "seed")}
        name = re.sub(r"[^\w.-]", "-", summary["run"])  # W&B allows no other characters
        artifact = wandb.Artifact(name, type="model", metadata=about | summary["rounds"][-1])
        artifact.add_file(
            str(file), policy="immutable"
        )  # not copied: the file is kept in the job's directory
        self.experiment.log_artifact(artifact)


def _begin(save_dir: str, about: dict[str, Any]) -> wandb.Run:
    """Start a separate run, even while the run of the job that needs a shared base is open."""
    try:
        run = wandb.init(dir=save_dir, resume="allow", reinit="create_new", **about)
    except wandb.Error as error:
        raise _no_account(error) from error
    for metrics, axis in AXES.items():
        run.define_metric(axis)
        run.define_metric(metrics, step_metric=axis)
    return run


def run_id(study: str, name: str) -> str:
    """Return the W&B id of a job: 16 hex digits that depend on study and name only."""
    return hashlib.sha256(f"{study}/{name}".encode()).hexdigest()[:16]


def account() -> wandb.Api:
    """Return a client of the configured W&B server.

    Raises:
        ValueError: there is no API key, the server rejects it, or does not answer.
    """
    try:
        return wandb.Api()
    except wandb.Error as error:
        raise _no_account(error) from error


def _no_account(error: wandb.Error) -> ValueError:
    return ValueError(
        f"no W&B account is available: {error} Run `wandb login`, or set WANDB_API_KEY (and "
        "WANDB_BASE_URL for your own server); logger.mode=offline needs no account"
    )
