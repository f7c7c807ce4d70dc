"""Weights & Biases: every job is a run there, beside its CSV files."""

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
    """One job as a W&B run, which ends as the ``with`` block around the job does.

    It is finished, with the rounds as a table, the pictures and the checkpoint; or failed, where
    the block raises. Its id stands for study and name, so that the same job goes on in the same
    run. Training is shown against ``trainer/global_step``, ``round/*`` against ``round/round``. Of
    several processes the first one speaks.

    Args:
        save_dir: the job's directory; what W&B writes goes to ``wandb`` in it.
        study: W&B's group.
        name: the job's identity.
        project: on the server.
        entity: a user or team; None is the account's default.
        tags: labels to filter by.
        mode: ``offline`` waits for ``wandb sync``, ``online`` uploads at once.
        checkpoint: log the last round's checkpoint as an artifact.

    Raises:
        ValueError: another mode, or ``online`` without an account.
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
        """Log all but what has no value (the AP of sizes that the images lack)."""
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
        name = re.sub(r"[^\w.-]", "-", summary["run"])  # all that W&B allows in it
        artifact = wandb.Artifact(name, type="model", metadata=about | summary["rounds"][-1])
        artifact.add_file(str(file), policy="immutable")  # no copy: it stays in the job's directory
        self.experiment.log_artifact(artifact)


def _begin(save_dir: str, about: dict[str, Any]) -> wandb.Run:
    """A run of its own, also where the run of the job that needs a shared base is open."""
    try:
        run = wandb.init(dir=save_dir, resume="allow", reinit="create_new", **about)
    except wandb.Error as error:
        raise _no_account(error) from error
    for metrics, axis in AXES.items():
        run.define_metric(axis)
        run.define_metric(metrics, step_metric=axis)
    return run


def run_id(study: str, name: str) -> str:
    """The W&B id of a job: 16 hex digits, the same wherever and whenever it is started."""
    return hashlib.sha256(f"{study}/{name}".encode()).hexdigest()[:16]


def account() -> wandb.Api:
    """What reads from the W&B server that is set up here.

    Raises:
        ValueError: there is no API key, the server does not know it, or does not answer.
    """
    try:
        return wandb.Api()
    except wandb.Error as error:
        raise _no_account(error) from error


def _no_account(error: wandb.Error) -> ValueError:
    return ValueError(
        f"no W&B account can be used here: {error} Type `wandb login`, or set WANDB_API_KEY (and "
        "WANDB_BASE_URL for a server of your own); logger.mode=offline needs none"
    )
