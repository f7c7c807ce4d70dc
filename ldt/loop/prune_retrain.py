"""The loop of the paper: train, then score, cut and retrain, round after round."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch_pruning.pruner.importance import Importance

from ldt.callbacks.ema import ExponentialMovingAverage
from ldt.criteria.base import score_groups
from ldt.data.datamodule import DetectionDataModule
from ldt.detectors.forward import eval_with_gradients
from ldt.evaluation import profiling
from ldt.evaluation.round_metrics import count_params_and_macs, format_round, measure_latency
from ldt.loop.distributed import check_same_channels, rewrap_ddp
from ldt.loop.gradual_masking import GradualPruning
from ldt.loop.round_record import RoundRecord
from ldt.loop.schedule import PruningSchedule
from ldt.module import DetectorModule, PreparedBatch
from ldt.pruning.budget import TOLERANCE, UnreachableRateError, check_reachable, select_channels
from ldt.pruning.costs import ALIASES, CostModel
from ldt.pruning.graph import PruningGraph
from ldt.runs.files import write_rows

log = logging.getLogger(__name__)


@dataclass
class Calibration:
    """The images that criteria see, prepared anew at every pass."""

    module: DetectorModule
    loader: Any

    def __iter__(self) -> Iterator[PreparedBatch]:
        for batch in self.loader:
            yield self.module.prepare(batch)


class PruneRetrain(L.Callback):
    """Runs a :class:`PruningSchedule` inside one ``trainer.fit``.

    At the last epoch of a phase it records the round (metrics, size, latency) and saves
    ``round-<t>.ckpt``; then it scores and cuts the detector and rebuilds what belongs to its
    parameters: optimizer, schedule, moving average. Every row goes to ``rounds.csv`` at once.

    Args:
        plan: what is removed and when.
        criterion: a criterion of ours or any importance of Torch-Pruning; None trains only.
        folder: the run's directory.
        latency_runs: forward passes that are timed, at least 30; 0 does not measure.
        validate_every: epochs between validations within a phase; 0 validates at its end only.
        gradual: masks channels while training, in epochs of its own before each round's retraining,
            instead of cutting at once; the criterion is not asked then.

    Attributes:
        rows: one dict per finished round, the base first.
    """

    def __init__(
        self,
        plan: PruningSchedule,
        criterion: Importance | None,
        folder: Path,
        latency_runs: int = 30,
        validate_every: int = 0,
        gradual: GradualPruning | None = None,
    ) -> None:
        if 0 < latency_runs < profiling.MINIMUM_RUNS or latency_runs < 0:
            raise ValueError(
                f"report.latency_runs={latency_runs}; at least {profiling.MINIMUM_RUNS} are timed, "
                "or none: report.latency_runs=0"
            )
        self.plan, self.criterion, self.folder = plan, criterion, folder
        self.latency_runs, self.validate_every = latency_runs, validate_every
        self.gradual = gradual
        self._masking_epochs = 0  # of all rounds; they come on top of the plan's
        self._masks: dict[str, Any] = {}  # a loaded state, until there is a graph for it
        self.round = 0
        self.rows: list[dict[str, Any]] = []
        self.excluded: dict[str, str] = {}
        self._unpruned: dict[str, int] = {}  # budget -> cost of the unpruned model
        self._channels: dict[str, int] = {}  # layer -> channels in the unpruned model
        self._started = time.perf_counter()
        self._metrics: dict[str, float] = {}
        self._notes: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as plain data."""
        return {
            "round": self.round,
            "rows": self.rows,
            "left_whole": self.excluded,
            "notes": self._notes,
            "masking_epochs": self._masking_epochs,
            "masks": self.gradual.state_dict() if self.gradual else {},
            "unpruned": self._unpruned,
            "channels": self._channels,
            "seconds": time.perf_counter() - self._started,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the saved round."""
        self.round, self.rows = state_dict["round"], state_dict["rows"]
        self.excluded, self._notes = state_dict["left_whole"], state_dict["notes"]
        self._masking_epochs, self._masks = state_dict["masking_epochs"], state_dict["masks"]
        self._channels = state_dict["channels"]
        costs: dict[str, int] = state_dict["unpruned"]  # earlier versions wrote "flops"
        self._unpruned = {ALIASES.get(key, key): cost for key, cost in costs.items()}
        self._started = time.perf_counter() - state_dict["seconds"]

    # When ---------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check scope and rate before any training, and count the unpruned model once."""
        assert isinstance(pl_module, DetectorModule)
        if self._unpruned:
            return
        self._unpruned = count_params_and_macs(pl_module)
        for name, layer in pl_module.detector.named_modules():
            width = getattr(layer, "out_channels", None)
            if isinstance(width, int):
                self._channels[name] = width
        if self.criterion is not None:
            self._check_plan(pl_module)

    def is_last_epoch(self, epoch: int) -> bool:
        """Whether a phase ends with this epoch (counted from 0)."""
        return not self._masking and self.plan.is_last_epoch(epoch - self._masking_epochs)

    @property
    def _masking(self) -> bool:
        return self.gradual is not None and (self.gradual.active or bool(self._masks))

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the state before anything asks where phases and the run end."""
        self.load_state_dict(checkpoint["callbacks"][self.state_key])
        self._set_end(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Without base training, the first cut comes before the first step."""
        if self._masks:
            state, self._masks = self._masks, {}
            self._begin_masking(pl_module).restore(state)
        if self.plan.base_epochs == 0 and self.round == 0:
            self._finish_round(trainer, pl_module)
            self._begin_round(trainer, pl_module)

    def _set_end(self, trainer: L.Trainer) -> None:
        trainer.fit_loop.max_epochs = self.plan.total_epochs + self._masking_epochs

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate at the end of each phase, and as often as was asked in between."""
        if self._masking:
            self._masking_epochs += 1
            self._set_end(trainer)
        epoch, every = trainer.current_epoch, self.validate_every
        due = self.is_last_epoch(epoch) or (every and (epoch + 1) % every == 0)
        trainer.check_val_every_n_epoch = 1 if due else trainer.current_epoch + 2

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Mask channels where that is done while training."""
        if self.gradual is not None:
            self.gradual.after_step()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the metrics of the last validation for the round's record."""
        self._metrics = {
            key.removeprefix("val/"): float(value)
            for key, value in trainer.callback_metrics.items()
            if key.startswith("val/")
        }

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """At the end of a phase: record the round, and begin the next one."""
        if self._masking:
            self._cut_masked(trainer, pl_module)
        elif self.is_last_epoch(trainer.current_epoch):
            for callback in _averages(trainer):
                callback.finish(pl_module)
            self._finish_round(trainer, pl_module)
            if self.round < self.plan.rounds:
                self._begin_round(trainer, pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """After Ctrl-C keep the detector as it is; the run goes on from its last epoch."""
        if isinstance(exception, KeyboardInterrupt):
            trainer.save_checkpoint(self.folder / "interrupted.ckpt", weights_only=True)

    # What ---------------------------------------------------------------------------------

    def _finish_round(self, trainer: L.Trainer, module: Any) -> None:
        counts = count_params_and_macs(module)
        path = self.folder / f"round-{self.round}.ckpt"
        trainer.save_checkpoint(path, weights_only=True)
        row: dict[str, Any] = {"round": self.round, **self._metrics}
        row["params"], row["multiply_adds"] = counts["params"], counts["macs"]
        row["rate"] = 1 - counts[self.plan.budget] / self._unpruned[self.plan.budget]
        row["params_rate"] = 1 - counts["params"] / self._unpruned["params"]
        row["multiply_adds_rate"] = 1 - counts["macs"] / self._unpruned["macs"]
        row["file_bytes"] = path.stat().st_size if trainer.is_global_zero else 0
        if self.latency_runs:
            row.update(measure_latency(module, self.latency_runs))
        row.update({f"criterion/{key}": value for key, value in self._notes.items()})
        row["seconds"] = round(time.perf_counter() - self._started, 1)
        self.rows.append(row)
        if trainer.is_global_zero:
            write_rows(self.folder / "rounds.csv", self.rows)
        if trainer.logger is not None:
            numbers = {
                f"round/{k}": float(v) for k, v in row.items() if isinstance(v, (int, float))
            }
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)
        if trainer.is_global_zero:
            log.info(format_round(row, module.input_size))

    def _begin_round(self, trainer: L.Trainer, module: Any) -> None:
        self.round += 1
        self._started = time.perf_counter()
        if self.gradual is None:
            self._cut(trainer, module)
            return
        self._begin_masking(module)
        module.phase_epochs, module.lr_scale, module.schedule = 1, self.gradual.lr, "constant"
        self._rebuild(trainer, module)

    def _cut(self, trainer: L.Trainer, module: Any) -> None:
        """Score, choose and remove channels, as often as the plan says."""
        removed = RoundRecord()
        with eval_with_gradients(module.detector):
            for inner in range(1, self.plan.inner_rounds + 1):
                graph = module.trace(self.plan.scope)
                if inner == 1:
                    self._report_whole(graph)
                scores = self._score(trainer, module, graph)
                channels = self._choose(module, graph, scores, inner)
                graph.remove(channels)
                removed.add(scores, channels)
        self._notes = dict(getattr(self.criterion, "notes", {}))
        self._retrain(trainer, module, removed)

    def _begin_masking(self, module: Any) -> GradualPruning:
        assert self.gradual is not None
        with eval_with_gradients(module.detector):
            graph = module.trace(self.plan.scope)
        self._report_whole(graph)
        self.gradual.begin(graph, **self._rule(module, graph, self.round))
        return self.gradual

    def _cut_masked(self, trainer: L.Trainer, module: Any) -> None:
        """Remove the channels that were masked while training, once their budget is met."""
        gradual = self.gradual
        if gradual is None or not gradual.done:
            return
        graph, removed = gradual.graph, RoundRecord()
        channels = gradual.end()
        with eval_with_gradients(module.detector):
            graph.remove(channels)
        removed.add(gradual.scores, channels)
        self._notes = {"events": gradual.events, "channels_per_event": gradual.channels}
        self._retrain(trainer, module, removed)

    def _retrain(self, trainer: L.Trainer, module: Any, removed: RoundRecord) -> None:
        check_same_channels(trainer, removed)
        if trainer.is_global_zero:
            removed.save(self.folder / f"scores-{self.round}.npz")
        self._check_rate(module)
        module.phase_epochs, module.lr_scale = self.plan.retrain_epochs, self.plan.retrain_lr
        module.schedule = module.recipe["schedule"]
        self._rebuild(trainer, module)

    def _rebuild(self, trainer: L.Trainer, module: Any) -> None:
        """Make everything anew that holds on to parameters."""
        rewrap_ddp(trainer)
        trainer.strategy.setup_optimizers(trainer)
        for callback in _averages(trainer):
            callback.restart(trainer, module)

    def _score(self, trainer: L.Trainer, module: Any, graph: PruningGraph) -> dict[str, Tensor]:
        assert self.criterion is not None
        loader = _data(trainer).calibration_dataloader(self.plan.images, self.plan.batch_size)
        scores = score_groups(self.criterion, module, graph, Calibration(module, loader))
        # batch statistics differ between processes, what is cut must not
        return trainer.strategy.broadcast(scores)

    def _choose(
        self, module: Any, graph: PruningGraph, scores: dict[str, Tensor], inner: int
    ) -> dict[str, list[int]]:
        rounds = self.plan.inner_rounds
        rule = self._rule(module, graph, self.round - 1 + inner / rounds)
        if inner < rounds:  # only what the round ends with must be exact
            rule["tolerance"] = self._unpruned[self.plan.budget]
        return select_channels(graph, scores, **rule)

    def _rule(self, module: Any, graph: PruningGraph, after: float) -> dict[str, Any]:
        """What :func:`select_channels` is told, so that a (partial) round ends as planned."""
        plan, whole = self.plan, self._unpruned[self.plan.budget]
        return {
            "costs": CostModel(graph, plan.budget),
            "save": plan.removed_share(after) * whole
            - (whole - count_params_and_macs(module)[plan.budget]),
            "tolerance": TOLERANCE * whole,
            "ranking": plan.ranking,
            "limits": plan.limits,
            "original": self._channels,
        }

    def _check_plan(self, module: Any) -> None:
        plan = self.plan
        _check_scope(plan.scope, module.detector)
        with eval_with_gradients(module.detector):
            graph = module.trace(plan.scope)
        self._report_whole(graph)
        save = (plan.rate - TOLERANCE) * self._unpruned[plan.budget]
        check_reachable(graph, CostModel(graph, plan.budget), save, plan.limits, self._channels)

    def _check_rate(self, module: Any) -> None:
        budget = self.plan.budget
        achieved = 1 - count_params_and_macs(module)[budget] / self._unpruned[budget]
        asked = self.plan.removed_share(self.round)
        if abs(achieved - asked) > TOLERANCE:
            raise RuntimeError(
                f"round {self.round} removed {achieved:.2%} of the {budget}, not the asked "
                f"{asked:.2%}: the cost model and the cut network disagree"
            )

    def _report_whole(self, graph: PruningGraph) -> None:
        self.excluded = dict(graph.excluded)
        for name, reason in graph.excluded.items():
            log.warning("left whole: %s (%s)", name, reason)
        cut, all_ = graph.prunable_share()
        if cut < all_ / 2:
            listed = "; ".join(f"{name}: {why}" for name, why in list(self.excluded.items())[:20])
            raise UnreachableRateError(
                f"only {cut:,} of the {all_:,} parameters in prune.scope="
                f"{list(self.plan.scope)} can be cut. Left whole: {listed}"
            )


def _check_scope(scope: tuple[str, ...], detector: nn.Module) -> None:
    names = {name for name, _ in detector.named_modules()}
    for name in scope:
        if name not in names:
            parts = ", ".join(part for part, _ in detector.named_children())
            raise ValueError(
                f"prune.scope={list(scope)}: {type(detector).__name__} has no part {name!r}. Its "
                f"parts are: {parts}; parts of them go too, e.g. prune.scope=[backbone.layer4]"
            )


def _averages(trainer: L.Trainer) -> list[ExponentialMovingAverage]:
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if isinstance(c, ExponentialMovingAverage)]


def _data(trainer: L.Trainer) -> DetectionDataModule:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, DetectionDataModule)
    return data
