"""Weights & Biases workspace and report of a study; the command `ldt dashboard`.

Both compare the runs of the study: mAP over parameters, multiply-adds and latency, all rounds, all
loss terms, and a table. Each call saves new ones and prints their URLs.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from ldt.callbacks.wandb_logger import account
from ldt.runs.refusal import refusing

COSTS = {"params": "parameters", "multiply_adds": "multiply-adds", "latency_ms": "latency (ms)"}
ROUNDS = {"AP": "AP", "mAP": "mAP (IoU 0.5)"} | COSTS
RESULTS = ("AP", "AP50", "mAP", *COSTS, "params_rate", "multiply_adds_rate")
COLUMNS = (
    *("run:displayName", "run:state", "config:method.value.name", "config:detector.value.name"),
    *("config:dataset.value.name", "config:prune.value.rate", "config:seed.value"),
    *(f"summary:round/{key}" for key in RESULTS),
)
PICTURES = ("pictures/detections", "pictures/channels", "pictures/metric_vs_params")
FRONT = (
    "A point is a run after its last round. The line is the best mAP among all runs of at most "
    "that cost: the runs at which it rises are the Pareto front."
)
BY_ROUND = "Round 0 is the unpruned detector; every later round has cut and retrained it."
LOSSES = "The terms of the training loss, at every logged step of all rounds."
SHOWN = "Detections beside the ground truth, channels kept per layer, and the rounds of each run."
TABLE = "What differs between the configurations, and a table of all runs."


@dataclass(frozen=True)
class Study:
    """A study on a W&B server, with the names of its loss terms."""

    entity: str
    project: str
    name: str
    losses: tuple[str, ...]

    @property
    def filters(self) -> str:
        """Filter expression for its runs; the library does not escape names itself."""
        return f"Metric('Group') == {self.name!r}"

    def panels(self) -> dict[str, tuple[str, list[Any]]]:
        """Return new panels with an explanation, by heading."""
        return {
            "Accuracy against cost": (FRONT, [_scatter(key) for key in COSTS]),
            "Rounds": (BY_ROUND, [_line("round/round", f"round/{k}", ROUNDS[k]) for k in ROUNDS]),
            "Losses": (LOSSES, [_line("trainer/global_step", key, key) for key in self.losses]),
            "Pictures": (SHOWN, [wr.MediaBrowser(media_keys=[key]) for key in PICTURES]),
            "Runs": (TABLE, [wr.RunComparer(diff_only="split", layout=wr.Layout(w=24, h=12))]),
        }


def _scatter(cost: str) -> wr.ScatterPlot:
    return wr.ScatterPlot(
        title=f"mAP against {COSTS[cost]}",
        x=wr.SummaryMetric(f"round/{cost}"),
        y=wr.SummaryMetric("round/mAP"),
        running_ymax=True,
    )


def _line(x: str, y: str, title: str) -> wr.LinePlot:
    return wr.LinePlot(title=title, x=x, y=[y], max_runs_to_show=100)


@contextlib.contextmanager
def _asking(what: str) -> Iterator[None]:
    """Convert server errors to ValueError; W&B has no common exception class for them."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"the W&B server was asked {what} and failed: {error}. Check --project, --entity and "
            "WANDB_BASE_URL; servers that only imitate W&B's uploads have no workspaces"
        ) from error


def find(study: str, project: str, entity: str | None = None) -> Study:
    """Find a study on the configured W&B server.

    Raises:
        ValueError: there is no account, no such project, or no run of the study in it.
    """
    api = account()
    with _asking(f"for the runs of {entity or 'the default entity'}/{project}"):
        owner = entity or api.default_entity
        runs = list(api.runs(f"{owner}/{project}", filters={"group": study}))
    if not runs:
        raise ValueError(
            f"{owner}/{project} has no run of the study {study!r}. Runs are there with "
            "`python run.py logger=wandb logger.mode=online`, or, where they were offline, after "
            f"`wandb sync runs/{study}/*/wandb/offline-run-*`"
        )
    logged = {key for run in runs for key in run.summary.keys()}  # noqa: SIM118 (it has no iterator)
    losses = sorted(key for key in logged if key.startswith("train/") and "loss" in key)
    return Study(owner or "", project, study, tuple(losses))


def workspace(study: Study) -> ws.Workspace:
    """Build a saved view of the study's project."""
    return ws.Workspace(
        entity=study.entity,
        project=study.project,
        name=f"study {study.name}",
        sections=[
            ws.Section(name=name, panels=panels, is_open=True)
            for name, (_, panels) in study.panels().items()
        ],
        settings=ws.WorkspaceSettings(max_runs=100),
        runset_settings=ws.RunsetSettings(filters=study.filters, pinned_columns=list(COLUMNS)),
    )


def report(study: Study) -> wr.Report:
    """Build a report with explanations; the table of runs follows the last panels."""
    blocks: list[Any] = [wr.TableOfContents()]
    for name, (text, panels) in study.panels().items():
        runs = wr.Runset(name=study.name, filters=study.filters, pinned_columns=list(COLUMNS))
        grid = wr.PanelGrid(runsets=[runs], panels=panels, hide_run_sets=name != "Runs")
        blocks += [wr.H1(name), wr.P(text), grid]
    return wr.Report(
        entity=study.entity,
        project=study.project,
        title=f"Study {study.name}",
        description="Detectors pruned by different methods: accuracy, size and speed",
        blocks=blocks,
        width="fluid",
    )


def save(study: str, project: str, entity: str | None = None) -> dict[str, str]:
    """Save a workspace and a report of a study.

    Args:
        study: W&B group of the runs.
        project: project of the runs.
        entity: user or team; None: the account's default.

    Returns:
        The URLs of ``workspace`` and ``report``.

    Raises:
        ValueError: see :func:`find`, or the server fails.
    """
    with refusing():
        found = find(study, project, entity)
    with _asking("to save a workspace and a report"):
        saved = {"workspace": workspace(found).save(), "report": report(found).save()}
        return {name: str(what.url) for name, what in saved.items()}
