"""LightningModule for any mmdet detector."""

import logging
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from mmengine.logging import MessageHub
from mmengine.optim import OPTIMIZERS, build_optim_wrapper
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldt.detectors.adapter import Detector, RawBatch
from ldt.detectors.checkpoints import detector_state, pruning_record
from ldt.detectors.models import build
from ldt.detectors.untrusted import limited_allocation
from ldt.detectors.weights import load_weights
from ldt.evaluation.metrics import MAX_DETECTIONS, DetectionMetrics
from ldt.objects import Objects
from ldt.pruning import structure
from ldt.recipe import learning_rate, set_keys, warmup_steps

log = logging.getLogger(__name__)

LossTerm = Callable[[Sequence[Tensor], Objects, Tensor], dict[str, Tensor]]


class NonFiniteLossError(RuntimeError):
    """A loss term became NaN or infinite; the message names the term and the step."""


def find_optimizer(name: str | None) -> type[Optimizer]:
    """Return an optimizer class of mmengine's registry, which has those of ``torch.optim``.

    Raises:
        ValueError: there is none of this name.
    """
    if found := OPTIMIZERS.get(str(name)):
        return found
    by_case = {known.lower(): known for known in OPTIMIZERS.module_dict}
    near = [by_case[match] for match in get_close_matches(str(name).lower(), by_case, 1)]
    meant = f"did you mean {near[0]}?" if near else "e.g. SGD or AdamW"
    raise ValueError(f"recipe.optimizer.type={name}: unknown optimizer; {meant}")


def build_optimizer(detector: nn.Module, recipe: Mapping[str, Any]) -> Optimizer:
    """Build a recipe's optimizer with mmengine, whose groups follow ``recipe.paramwise``."""
    config: dict[str, Any] = {"optimizer": set_keys(recipe["optimizer"])}
    if paramwise := set_keys(recipe["paramwise"]):
        config["paramwise_cfg"] = paramwise
    return build_optim_wrapper(detector, config).optimizer


class DetectorModule(L.LightningModule):
    """Train and validate an mmdet detector.

    Args:
        model: the detector's config as plain data (:func:`ldt.detectors.models.model_config`).
        classes: class names in label order.
        recipe: the keys of ``conf/recipe`` (:class:`ldt.config.RecipeConfig`) as plain data.
        input_size: (height, width) of the input for tracing and for counting MACs.
        neck: name of the module whose output LDT uses, or ``auto``.
        predictors: layers whose output channels are never pruned; detected if None.
        checkpoint: file of the initial weights.
        initialise: run mmdet's weight initialisation.
        resize: the transforms that resize an image to the network's input size, as in mmdet's
            configs; they are stored in checkpoints.
        background: add boxes of the background to the objects, as a class, for LDT.
        max_detections: detections per image and class that count for AP.
        compiled: compile backbone and neck for training steps (``torch.compile``).

    Attributes:
        detector: the mmdet detector; the prefix of its weights is ``detector.``.
        adapter: the same detector, wrapped for criteria, tracing and evaluation.
        loss_terms: additional losses by name; each maps the neck's feature maps, the objects of a
            batch and the detection loss to named values. Values with ``loss`` in their name are
            added to mmdet's losses, and their ratios to these are logged too (``share_<name>``).
        phase_epochs: epochs of the current training phase, for the learning-rate schedule.
        lr_scale: factor on the learning rate in the current phase.
        schedule: learning-rate schedule of the current phase, the recipe's or ``constant``.
        phase_steps: optimizer steps of the current phase.
        term_constants: what a term has estimated, by its name, as plain data; stored in checkpoints
            and taken from the initial weights if there is no base training.
        untrained: whether predictors lack weights in the checkpoint, for another number of classes.
    """

    def __init__(
        self,
        model: dict[str, Any],
        classes: Sequence[str],
        recipe: dict[str, Any],
        input_size: tuple[int, int],
        neck: str = "auto",
        predictors: Sequence[str] | None = None,
        checkpoint: str | None = None,
        initialise: bool = True,
        resize: Sequence[dict[str, Any]] = (),
        background: bool = False,
        max_detections: int = MAX_DETECTIONS,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model_config, self.recipe = model, recipe
        self.classes, self.resize = tuple(classes), list(resize)
        self.detector = build(model, initialise=initialise and checkpoint is None)
        self.detector.train()  # puts norms of `norm_eval` into eval mode; Lightning does not
        self.loss_terms: dict[str, LossTerm] = {}
        self.phase_epochs, self.lr_scale = int(recipe["epochs"]), 1.0
        self.schedule: str = recipe["schedule"]
        self.phase_steps = 1
        self.term_constants: dict[str, Any] = {}
        self.untrained = False
        self.metrics = DetectionMetrics(self.classes, max_detections)
        self.adapter = Detector(
            self.detector,
            input_size,
            neck,
            predictors,
            bool(recipe.get("channels_last")),
            background,
        )
        self._compiled = compiled
        if self.adapter.acts_on_backbone:
            log.info(
                "%s has no neck: LDT uses the output of its backbone", type(self.detector).__name__
            )
        if checkpoint is not None:
            record, new = load_weights(self.detector, checkpoint, self.adapter.predictors)
            self.untrained = bool(new)
            if not recipe["epochs"]:
                self.term_constants = dict(record.get("term_constants", {}))

    # Training and validation --------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Prepare the detector for its device."""
        self.fit_to_device()

    def fit_to_device(self) -> None:
        """Arrange and compile the network for its device; repeat it after a cut."""
        self.adapter.arrange()
        if self._compiled:
            self.adapter.compile()

    def transfer_batch_to_device(
        self, batch: RawBatch, device: torch.device, dataloader_idx: int
    ) -> RawBatch:
        """Return the batch unchanged: mmdet's preprocessor moves it, faster than Lightning."""
        return batch

    def training_step(self, batch: RawBatch, batch_idx: int) -> Tensor:
        """Return the sum of mmdet's losses and the additional loss terms."""
        hub = MessageHub.get_current_instance()  # mmdet's modules read the progress from it
        hub.update_info("iter", self.global_step)
        hub.update_info("epoch", self.current_epoch)
        prepared = self.adapter.prepare(batch, training=True)
        with self.adapter.compiled():
            total, logs, maps = self.adapter.losses(prepared)
        detection, shares = total, {}
        for term in self.loss_terms.values():
            for name, value in term(maps, prepared.objects, detection).items():
                logs[name] = value.detach()
                if "loss" in name:
                    total = total + value
                    shares[name.replace("loss", "share")] = (value / detection).detach().abs()
        logs["loss"] = total.detach()
        self._check_finite(logs)
        if self._logs_are_read():
            images = len(prepared.samples)
            values = {f"train/{key}": value for key, value in (logs | shares).items()}
            self.log_dict(values, batch_size=images)
            self.log("loss", total.detach(), prog_bar=True, logger=False, batch_size=images)
        return total

    def _logs_are_read(self) -> bool:
        """Return whether a logger or, at the end of an epoch, a callback reads this step's values.

        Handing them to Lightning in every step costs a small detector with LDT some per cent.
        """
        trainer: Any = self._trainer  # the Trainer's annotations lack this attribute
        if trainer is None:  # a step outside of any training
            return False
        every: int = trainer.log_every_n_steps
        return trainer.is_last_batch or (every > 0 and (self.global_step + 1) % every == 0)

    def _check_finite(self, logs: dict[str, Tensor]) -> None:
        values = torch.stack([torch.as_tensor(v).detach().float().sum() for v in logs.values()])
        if not bool(values.isfinite().all()):  # synchronises with the GPU, so once per step
            bad = [key for key, ok in zip(logs, values.isfinite().tolist(), strict=True) if not ok]
            terms = [key for key in bad if "loss_" in key] or bad
            raise NonFiniteLossError(
                f"{', '.join(terms)} is not finite at step {self.global_step} (epoch "
                f"{self.current_epoch}). The last good checkpoint is kept. Lower the learning "
                "rate (recipe.optimizer.lr), clip gradients (recipe.clip_grad=35), or weaken LDT "
                f"(ldt.alpha, ldt.beta, ldt.ridge){self._precision_advice()}"
            )

    def _precision_advice(self) -> str:
        """Return the advice to compute in full precision; empty if that is the case."""
        mixed = self._trainer is not None and "mixed" in str(self.trainer.precision)
        return "; or compute in full precision (trainer.precision=32-true)" if mixed else ""

    def validation_step(self, batch: RawBatch, batch_idx: int) -> None:
        """Collect detections for the metrics."""
        self.metrics.update(self.adapter.predict(batch))

    def on_validation_epoch_end(self) -> None:
        """Log every metric as ``val/<name>``."""
        values = self.metrics.compute()
        self.metrics.reset()
        self.log_dict(
            {f"val/{k}": torch.tensor(v, dtype=torch.float32) for k, v in values.items()},
            sync_dist=False,
        )

    # Optimizer ----------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the recipe's optimizer with mmengine, and a schedule over the current phase."""
        optimizer = build_optimizer(self.detector, self.recipe)
        steps, epochs = self.trainer.estimated_stepping_batches, self.trainer.max_epochs or 1
        plain: int = self.recipe["plain_epochs"]
        self.phase_steps = max(1, round(steps / epochs * self.phase_epochs))
        factor = learning_rate(
            self.recipe | {"schedule": self.schedule},
            self.phase_steps,
            self.phase_epochs,
            self.lr_scale * self._batch_scale(),
            round(steps / epochs * plain) if plain < self.phase_epochs else 0,
        )
        schedule = LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"},
        }

    @property
    def phase_step(self) -> int:
        """Return the number of optimizer steps taken in the current phase."""
        schedule = self.lr_schedulers()
        assert isinstance(schedule, LambdaLR)
        return schedule.last_epoch

    @property
    def warmup_steps(self) -> int:
        """Return the number of optimizer steps of the phase's learning-rate warm-up."""
        return warmup_steps(self.recipe, self.phase_steps, self.phase_epochs)

    def _batch_scale(self) -> float:
        """Return the linear scaling rule's factor: lr is for ``recipe.base_batch_size`` images."""
        base = self.recipe["base_batch_size"]
        return self.recipe["batch_size"] / base if base else 1.0

    # Checkpoints --------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add all that is needed to rebuild the detector, as plain data."""
        record = pruning_record(self.adapter, self.model_config, self.classes, self.resize)
        phase = ("phase_epochs", "lr_scale", "schedule")
        checkpoint["ldt"] = {
            **record,
            "phase": {key: getattr(self, key) for key in phase},
            "term_constants": self.term_constants,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore structure and phase, before Lightning restores weights and optimizer.

        Raises:
            ValueError: the checkpoint was not written by ldt, or belongs to another detector.
        """
        if "ldt" not in checkpoint:
            raise ValueError("the checkpoint was not written by ldt: it has no structure record")
        if checkpoint["ldt"]["model"] != self.model_config:
            raise ValueError("the checkpoint belongs to another detector: its model config differs")
        state = detector_state(checkpoint)
        structure.rebuild(self.detector, checkpoint["ldt"]["structure"], state)
        self.term_constants = dict(checkpoint["ldt"].get("term_constants", {}))
        # not in `on_fit_start`: the learning-rate schedule is created earlier
        for key, value in checkpoint["ldt"]["phase"].items():
            setattr(self, key, value)


def restored(checkpoint: dict[str, Any], recipe: dict[str, Any]) -> DetectorModule:
    """Restore the module of a checkpoint, in eval mode.

    Args:
        checkpoint: the content of a round's file (:func:`ldt.detectors.checkpoints.read`).
        recipe: the recipe of its run.

    Raises:
        ValueError: as in :meth:`DetectorModule.on_load_checkpoint`.
    """
    record = checkpoint["ldt"]
    with limited_allocation(checkpoint["state_dict"]):
        module = DetectorModule(
            record["model"],
            record["classes"],
            recipe,
            record["input_size"],
            neck=record["neck"],
            predictors=record["predictors"],
            initialise=False,
            background=record.get("background", False),
        )
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval()
