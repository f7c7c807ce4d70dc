"""The prune-retrain loop of the paper: train, then score, prune and retrain, round by round."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from torch_pruning.pruner.importance import Importance

from ldt import progress
from ldt.callbacks.distillation import Distillation
from ldt.callbacks.ema import ExponentialMovingAverage
from ldt.callbacks.ldt_loss import LDTLoss
from ldt.callbacks.lightning_internals import (
    callbacks_of,
    datamodule_of,
    next_epoch,
    rebuild_optimizers,
    rewrap_ddp,
    set_max_epochs,
    validate,
)
from ldt.criteria.base import check_importance
from ldt.data.datamodule import DetectionDataModule
from ldt.detectors.adapter import Calibration, Detector, RawBatch
from ldt.detectors.batch_norm import settle_batch_norms
from ldt.detectors.forward import eval_with_gradients
from ldt.detectors.freezing import thaw
from ldt.detectors.mmengine_internals import initialise_again
from ldt.evaluation import kept_detections, profiling
from ldt.evaluation.round_metrics import (
    format_cut,
    format_round,
    measure_latency,
)
from ldt.loop.distributed import check_same_channels
from ldt.loop.gradual_masking import GradualPruning
from ldt.loop.pruning_round import (
    Unpruned,
    check_prunable,
    check_rate,
    check_schedule,
    latency_table,
    layer_channels,
    prune_round,
    repair,
    selection_arguments,
)
from ldt.loop.round_record import RoundRecord
from ldt.loop.schedule import PruningSchedule
from ldt.module import DetectorModule
from ldt.progress.steps import CUT, SCORE
from ldt.runs import files
from ldt.runs.identity import canonical_budget
from ldt.runtimes.latency_table import LatencyTable
from ldt.runtimes.timing import Runtime, RuntimeName, measure_runtimes

log = logging.getLogger(__name__)
C = TypeVar("C", bound=L.Callback)


class PruneRetrain(L.Callback):
    """Execute a :class:`PruningSchedule` within one ``trainer.fit``.

    At the last epoch of a phase this callback records the round (metrics, size, latency), saves
    ``round-<t>.ckpt`` and writes ``rounds.csv``. Then it scores and prunes the detector and
    rebuilds optimizer, LR scheduler, EMA and DDP wrapper.

    Args:
        schedule: how much is pruned, from which layers, and when.
        criterion: a criterion of ours or any importance of Torch-Pruning; None trains only.
        folder: the run's directory.
        latency_runs: timed forward passes, at least 30; 0 does not measure the latency.
        validate_every: epochs between validations within a phase; 0 validates at its end only.
        runtimes: in which the latency is measured besides (:data:`ldt.runtimes.timing.RUNTIMES`).
        keep_detections: write the detections of each round's validation.
        before_retraining: validate after each cut too, for ``cut/AP`` in the round's row.
        gradual: mask channels while training, in additional epochs before each round's retraining,
            instead of pruning at once; the criterion is not used then.

    Attributes:
        rows: one dict per finished round, that of the base training first.
        after_cut: whether the current validation is that of a cut.
    """

    def __init__(
        self,
        schedule: PruningSchedule,
        criterion: Importance | None,
        folder: Path,
        latency_runs: int = 30,
        validate_every: int = 0,
        gradual: GradualPruning | None = None,
        runtimes: Sequence[RuntimeName] = (),
        keep_detections: bool = False,
        before_retraining: bool = False,
    ) -> None:
        if 0 < latency_runs < profiling.MINIMUM_RUNS or latency_runs < 0:
            raise ValueError(
                f"report.latency_runs={latency_runs} must be at least {profiling.MINIMUM_RUNS}, "
                "or 0 for no measurement: report.latency_runs=0"
            )
        check_importance(criterion)
        self.schedule, self.criterion, self.folder = schedule, criterion, folder
        self.latency_runs, self.validate_every = latency_runs, validate_every
        self.gradual, self.runtimes = gradual, tuple(runtimes)
        self.keep_detections, self.before_retraining = keep_detections, before_retraining
        self.after_cut = False
        self._masking_epochs = 0  # of all rounds, in addition to the schedule's epochs
        self._masking_before = 0  # of these, those of earlier rounds
        self._masks: dict[str, Any] = {}  # loaded state of `gradual`, until the graph is traced
        self.round = 0
        self.rows: list[dict[str, Any]] = []
        self.excluded: dict[str, str] = {}
        self._unpruned = Unpruned({}, {})
        self._latency: dict[str, float] = {}
        self._started = time.perf_counter()
        self._metrics: dict[str, float] = {}
        self._cut_metrics: dict[str, float] = {}
        self._notes: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as plain data."""
        return {
            "round": self.round,
            "rows": self.rows,
            "left_whole": self.excluded,
            "notes": self._notes,
            "cut_metrics": self._cut_metrics,
            "latency": self._latency,
            "masking_epochs": self._masking_epochs,
            "masking_before": self._masking_before,
            "masks": self.gradual.state_dict() if self.gradual else {},
            "unpruned": self._unpruned.costs,
            "channels": self._unpruned.channels,
            "seconds": time.perf_counter() - self._started,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the saved round."""
        self.round, self.rows = state_dict["round"], state_dict["rows"]
        self.excluded, self._notes = state_dict["left_whole"], state_dict["notes"]
        self._masking_epochs, self._masks = state_dict["masking_epochs"], state_dict["masks"]
        self._masking_before = state_dict.get("masking_before", 0)  # not in earlier versions
        costs: dict[str, float] = state_dict["unpruned"]  # earlier versions wrote "flops"
        costs = {canonical_budget(key): cost for key, cost in costs.items()}
        self._unpruned = Unpruned(costs, state_dict["channels"], self.table)
        self._latency = state_dict.get("latency", {})
        self._cut_metrics = state_dict.get("cut_metrics", {})
        self._started = time.perf_counter() - state_dict["seconds"]

    # Hooks: when to validate, record and prune --------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Measure the unpruned model and check the schedule, unless already done."""
        assert isinstance(pl_module, DetectorModule)
        if not self._unpruned.costs:
            self.check(pl_module.adapter)

    @property
    def table(self) -> LatencyTable | None:
        """The times that a latency budget goes by, once :meth:`check` has been called."""
        return self._unpruned.table

    def check(
        self,
        detector: Detector,
        device: torch.device | None = None,
        known: Mapping[str, Any] | None = None,
    ) -> None:
        """Measure the unpruned detector's size, and check that it can be pruned as asked.

        Args:
            detector: the detector.
            device: where it will be; None: where it is.
            known: the table of a run that is resumed, for a latency budget.

        Raises:
            ValueError: it has no part of a name in the scope, or the rate is not reachable.
            ImportError: a runtime is not installed.
        """
        for name in self.runtimes:
            Runtime(name).version()
        prunes, here = self.criterion is not None, device or detector.example().device
        table = latency_table(self.schedule, here, known) if prunes else None
        self._unpruned = Unpruned.of(detector, table)
        if table is not None:
            self.schedule = self.schedule.aimed(self._unpruned.costs["latency"])
        if prunes:
            self.excluded = check_schedule(detector, self.schedule, self._unpruned)

    @property
    def unpruned(self) -> Mapping[str, float]:
        """Parameters, MACs and, with a latency budget, ms of the unpruned detector."""
        return self._unpruned.costs

    def is_last_epoch(self, epoch: int) -> bool:
        """Return whether a phase ends with this epoch (counted from 0)."""
        return not self.masking and self.schedule.is_last_epoch(epoch - self._masking_epochs)

    def epochs_before(self, epoch: int) -> int:
        """Return how many epochs of the current phase come before one (counted from 0)."""
        schedule = self.schedule
        planned = schedule.base_epochs + (self.round - 1) * schedule.retrain_epochs
        masked = self._masking_before if self.masking else self._masking_epochs
        return epoch - (planned + masked if self.round else 0)

    @property
    def masking(self) -> bool:
        """Whether the current phase masks channels while training."""
        return self.gradual is not None and (self.gradual.active or bool(self._masks))

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load the state early: other callbacks need the ends of phases and of the run."""
        assert isinstance(pl_module, DetectorModule)
        self.load_state_dict(checkpoint["callbacks"][self.state_key])
        _data(trainer).first_epoch = next_epoch(checkpoint)
        if self.round and not self.masking:
            thaw(pl_module.detector, self.schedule.scope)
        self._set_end(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Order the weights for their device, and DDP's gradient buckets like the weights."""
        assert isinstance(pl_module, DetectorModule)
        if pl_module.adapter.arrange():
            rewrap_ddp(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune before the first step if there is no base training."""
        assert isinstance(pl_module, DetectorModule)
        if self._masks:
            state, self._masks = self._masks, {}
            self._begin_masking(pl_module).restore(state)
        if self.schedule.base_epochs == 0 and self.round == 0:
            self._finish_round(trainer, pl_module)
            self._begin_rounds(trainer, pl_module)

    def _set_end(self, trainer: L.Trainer) -> None:
        # while masking, the number of its epochs is not known: at least one more
        epochs = self.schedule.total_epochs + self._masking_epochs
        set_max_epochs(trainer, epochs + bool(self.masking))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Schedule validations: at the end of each phase and every ``validate_every`` epochs."""
        if self.masking:
            self._masking_epochs += 1
            self._set_end(trainer)
        epoch, every = trainer.current_epoch, self.validate_every
        due = self.is_last_epoch(epoch) or (every and (epoch + 1) % every == 0)
        trainer.check_val_every_n_epoch = 1 if due else trainer.current_epoch + 2

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: RawBatch,
        batch_idx: int,
    ) -> None:
        """Update the gradual masking, if there is one."""
        if self.gradual is not None:
            complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
            self.gradual.after_batch(stepped=complete or trainer.is_last_batch)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the metrics of the last validation for the round's record."""
        self._metrics = {
            key.removeprefix("val/"): float(value)
            for key, value in trainer.callback_metrics.items()
            if key.startswith("val/")
        }

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the round and begin the next one, at the end of a phase."""
        assert isinstance(pl_module, DetectorModule)
        if self.masking:
            self._remove_masked(trainer, pl_module)
            if not self.masking and not self.schedule.retrain_epochs:
                self._begin_rounds(trainer, pl_module)
            self._set_end(trainer)
        elif self.is_last_epoch(trainer.current_epoch):
            for callback in _of_kind(trainer, ExponentialMovingAverage):
                callback.finish(pl_module)
            for terms in _of_kind(trainer, LDTLoss):
                terms.finish()
            self._finish_round(trainer, pl_module)
            self._begin_rounds(trainer, pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save the detector after Ctrl-C; the run itself resumes from its last epoch.

        Not with several processes: saving waits for all of them, and one alone may be interrupted.
        """
        if isinstance(exception, KeyboardInterrupt) and trainer.world_size == 1:
            trainer.save_checkpoint(self.folder / files.INTERRUPTED, weights_only=True)

    # Recording and pruning ----------------------------------------------------------------

    def _finish_round(self, trainer: L.Trainer, module: DetectorModule) -> None:
        counts, unpruned = self._unpruned.measure(module.adapter), self._unpruned.costs
        path = self.folder / files.round_checkpoint(self.round)
        trainer.save_checkpoint(path, weights_only=True)
        row: dict[str, Any] = {"round": self.round, **self._metrics}
        row["params"], row["multiply_adds"] = counts["params"], counts["macs"]
        row["rate"] = 0.0
        if self.schedule.budget in unpruned:  # no latency where nothing is pruned
            row["rate"] = 1 - counts[self.schedule.budget] / unpruned[self.schedule.budget]
        row["params_rate"] = 1 - counts["params"] / unpruned["params"]
        row["multiply_adds_rate"] = 1 - counts["macs"] / unpruned["macs"]
        row["file_bytes"] = path.stat().st_size if trainer.is_global_zero else 0
        if self.latency_runs:
            row.update(measure_latency(module.adapter, self.latency_runs))
        if self.runtimes:
            runs = self.latency_runs or profiling.MINIMUM_RUNS
            row.update(measure_runtimes(module.adapter, self.runtimes, runs))
        row.update(self._cut_metrics)
        row.update({f"latency/{key}": value for key, value in self._latency.items()})
        row.update({f"criterion/{key}": value for key, value in self._notes.items()})
        row["seconds"] = round(time.perf_counter() - self._started, 1)
        self.rows.append(row)
        if trainer.is_global_zero:
            files.write_rows(self.folder / files.ROUNDS, self.rows)
            if self.keep_detections:
                file = self.folder / files.detections(self.round)
                kept_detections.save(file, module.metrics.measured, module.classes)
        if trainer.logger is not None:
            numbers = {
                f"round/{k}": float(v) for k, v in row.items() if isinstance(v, (int, float))
            }
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)
        if trainer.is_global_zero:
            log.info(format_round(row, module.adapter.input_size))

    def _begin_rounds(self, trainer: L.Trainer, module: DetectorModule) -> None:
        """Begin the next round; without retraining it ends at once, and the next one begins."""
        while self.round < self.schedule.rounds:
            self._begin_round(trainer, module)
            if self.masking or self.schedule.retrain_epochs:
                break
        self._set_end(trainer)

    def _begin_round(self, trainer: L.Trainer, module: DetectorModule) -> None:
        self.round += 1
        self._started = time.perf_counter()
        if self.gradual is None:
            self._prune(trainer, module)
            return
        self._masking_before = self._masking_epochs
        module.phase_epochs, module.lr_scale, module.schedule = 1, self.gradual.lr, "constant"
        self._rebuild(trainer, module)  # first: an average is a copy, which hooks must not be in
        self._begin_masking(module)

    def _prune(self, trainer: L.Trainer, module: DetectorModule) -> None:
        """Score, select and remove channels, then prepare the retraining."""
        assert self.criterion is not None
        progress.begin(SCORE, self.round)
        before = layer_channels(module.adapter)
        images = self._calibration(trainer, module)
        settle_batch_norms(module.adapter, images)
        record = prune_round(
            module.adapter,
            self.criterion,
            images,
            self.schedule,
            self.round,
            self._unpruned,
            # batch statistics differ between ranks, but the removed channels must not
            synchronize=trainer.strategy.broadcast,
        )
        self.excluded = record.excluded
        self._notes = dict(getattr(self.criterion, "notes", {}))
        self._latency = record.latency
        self._begin_retraining(trainer, module, record, before)

    def _calibration(self, trainer: L.Trainer, module: DetectorModule) -> Calibration:
        images, batch_size = self.schedule.images, self.schedule.batch_size
        loader = _data(trainer).calibration_dataloader(images, batch_size)
        return Calibration(module.adapter, loader)

    def _begin_masking(self, module: DetectorModule) -> GradualPruning:
        assert self.gradual is not None
        detector, schedule = module.adapter, self.schedule
        with eval_with_gradients(detector.model):
            graph = detector.trace(schedule.scope)
        check_prunable(graph, schedule)
        self.excluded = dict(graph.excluded)
        arguments = selection_arguments(detector, graph, schedule, self._unpruned, self.round)
        self.gradual.begin(graph, **arguments)
        return self.gradual

    def _remove_masked(self, trainer: L.Trainer, module: DetectorModule) -> None:
        """Remove the masked channels, once the round's budget is saved."""
        gradual = self.gradual
        if gradual is None or not gradual.done:
            return
        progress.begin(CUT, self.round)
        graph, record = gradual.graph, RoundRecord()
        total = self._unpruned.costs[self.schedule.budget]
        record.left = self.schedule.left_share(self.round) * total + gradual.short
        before = layer_channels(module.adapter)
        channels = gradual.end()
        with eval_with_gradients(module.detector):
            graph.remove(channels)
        record.add(gradual.scores, channels)
        self._notes = {"events": gradual.events, "channels_per_event": gradual.channels}
        self._begin_retraining(trainer, module, record, before)

    def _begin_retraining(
        self,
        trainer: L.Trainer,
        module: DetectorModule,
        record: RoundRecord,
        before: Mapping[str, int],
    ) -> None:
        check_same_channels(trainer, record)
        for distillation in _of_kind(trainer, Distillation):
            distillation.cut(record)
        if trainer.is_global_zero:
            record.save(self.folder / files.scores(self.round))
        counts = check_rate(module.adapter, self.schedule, self.round, self._unpruned, record)
        if trainer.is_global_zero:
            of, after = f"{self.round}/{self.schedule.rounds}", layer_channels(module.adapter)
            log.info("cut %s: %s", of, format_cut(before, after, self.rows[-1], counts))
        if self.schedule.weights == "fresh":
            initialise_again(module.detector)
        repair(module.adapter, self._calibration(trainer, module), self.schedule)
        thaw(module.detector, self.schedule.scope)
        module.phase_epochs = self.schedule.retrain_epochs
        module.lr_scale = self.schedule.retrain_lr
        module.schedule = module.recipe["schedule"]
        self._rebuild(trainer, module)
        self._cut_metrics = {}
        if not self.schedule.retrain_epochs:
            validate(trainer)
            self._finish_round(trainer, module)
        elif self.before_retraining:
            self._validate_cut(trainer)

    def _validate_cut(self, trainer: L.Trainer) -> None:
        """Measure what a cut leaves before retraining."""
        self.after_cut = True
        validate(trainer)
        self.after_cut = False
        in_total = {key: value for key, value in self._metrics.items() if "/" not in key}
        self._cut_metrics = {f"cut/{key}": value for key, value in in_total.items()}
        if trainer.is_global_zero:
            found = (in_total.get(key, math.nan) for key in ("AP", "mAP"))
            log.info("before retraining: AP %.3f, mAP %.3f", *found)

    def _rebuild(self, trainer: L.Trainer, module: DetectorModule) -> None:
        """Rebuild all that depends on the network's weights, after a phase ends or pruning.

        These are the compiled network, the optimizer, the LR scheduler, the EMA, the DDP wrapper
        and LDT's memory.
        """
        module.fit_to_device()
        rewrap_ddp(trainer)
        rebuild_optimizers(trainer)
        for callback in _of_kind(trainer, ExponentialMovingAverage):
            callback.restart(trainer, module)
        for terms in _of_kind(trainer, LDTLoss):
            terms.forget()


def _of_kind(trainer: L.Trainer, kind: type[C]) -> list[C]:
    """Return the callbacks of a class."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, kind)]


def _data(trainer: L.Trainer) -> DetectionDataModule:
    data = datamodule_of(trainer)
    assert isinstance(data, DetectionDataModule)
    return data
