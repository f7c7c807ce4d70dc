"""Weights & Biases: log every job as a run, in addition to its CSV files."""

import hashlib
import logging
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from math import isnan
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from uuid import uuid4

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from ldt.config.values import check_value
from ldt.runs import files

log = logging.getLogger(__name__)

Mode = Literal["offline", "online"]
PATIENCE = 5  # seconds for the first answer of a server
OFFLINE = (
    "with logger.mode=offline the run is stored, and `wandb sync` uploads it later; "
    "logger.offline_if_unreachable=true does so by itself"
)
AXES = {"train/*": "trainer/global_step", "val/*": "trainer/global_step", "round/*": "round/round"}


class WandbRun(WandbLogger):
    """Log a job as a W&B run, within a ``with`` block around the job.

    The run finishes with the rounds as a table, the pictures and the checkpoint, or is marked as
    failed if the block raises. Its id is random and kept in the job's directory, so that a resumed
    job continues the same W&B run, and jobs of the same name in other directories do not. The x
    axis is ``trainer/global_step`` for training, and ``round/round`` for ``round/*``. Only rank 0
    logs.

    Args:
        save_dir: the job's directory; W&B writes to ``wandb`` in it.
        study: W&B's group.
        name: the job's name.
        project: W&B's project.
        entity: a user or team; None is the account's default.
        tags: labels to filter by.
        mode: ``offline`` stores the run for ``wandb sync``, ``online`` uploads it while it runs.
        offline_if_unreachable: with ``online``, store the run if the server does not answer at the
            start.
        checkpoint: log the last round's checkpoint as an artifact.

    Raises:
        ValueError: unknown mode, or ``online`` without an account or a server.
    """

    def __init__(
        self,
        save_dir: str,
        study: str,
        name: str,
        project: str,
        entity: str | None = None,
        tags: Sequence[str] = (),
        mode: Mode = "offline",
        offline_if_unreachable: bool = False,
        checkpoint: bool = True,
    ) -> None:
        check_value("logger.mode", mode, Mode)
        self.folder, self.checkpoint = Path(save_dir), checkpoint
        about: dict[str, Any] = {"group": study, "name": name, "project": project}
        about |= {"entity": entity, "tags": list(tags), "mode": mode}
        run = None
        if rank_zero_only.rank == 0:
            if mode == "online" and (reason := unreachable()):
                if not offline_if_unreachable:
                    raise ValueError(f"{reason}; {OFFLINE}")
                log.warning("%s: this run is stored for `wandb sync`", reason)
                about["mode"] = "offline"
            run = _begin(save_dir, about | {"id": run_id(self.folder, study, name)})
        super().__init__(experiment=run, project=project, save_dir=save_dir)

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
            | self._layers()
            | {f"pictures/{file.stem}": wandb.Image(str(file)) for file in pictures}
        )
        if self.checkpoint:
            self._log_checkpoint(self.folder / summary["checkpoint"], summary)

    def _layers(self) -> dict[str, wandb.Table]:
        """Return the table of layers before pruning and after, where the run has one."""
        if not (rows := files.read_rows(self.folder / files.LAYERS)):
            return {}
        data: list[Any] = [list(row.values()) for row in rows]
        return {"layers": wandb.Table(columns=list(rows[0]), data=data)}

    def _log_checkpoint(self, file: Path, summary: dict[str, Any]) -> None:
        about = {key: summary[key] for key in ("study", "detector", "dataset", "method", "seed")}
        name = re.sub(r"[^\w.-]", "-", summary["run"])  # W&B allows no other characters
        artifact = wandb.Artifact(name, type="model", metadata=about | summary["rounds"][-1])
        # not copied: the file is kept in the job's directory
        artifact.add_file(str(file), policy="immutable")
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


def run_id(folder: Path, study: str, name: str) -> str:
    """Return the W&B id of the job in a directory: 16 hex digits, drawn at its first start.

    Earlier versions derived it from study and name, and the directories that they began keep it.
    """
    file = folder / files.WANDB_ID
    if not file.is_file():
        derived = hashlib.sha256(f"{study}/{name}".encode()).hexdigest()
        drawn = derived if (folder / "wandb").is_dir() else uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(file, {"id": drawn[:16]})
    return files.read_json(file)["id"]


def unreachable() -> str:
    """Return why the configured W&B server cannot be used; empty if it answers in time."""
    address = wandb.setup().settings.base_url
    try:
        urllib.request.urlopen(address, timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        return ""  # an answer
    except (OSError, HTTPException) as error:  # a refused connection, no such host, no answer
        return f"the W&B server {address} does not answer ({getattr(error, 'reason', error)})"
    return ""


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
