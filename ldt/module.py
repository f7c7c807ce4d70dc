"""A LightningModule around any mmdet detector."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldt.detectors.checkpoints import detector_state
from ldt.detectors.forward import find_neck, find_predictors, forward_for_tracing, neck_maps
from ldt.detectors.models import build, labelled_objects
from ldt.detectors.weights import load_weights
from ldt.discriminant import Objects
from ldt.evaluation.metrics import DetectionMetrics
from ldt.pruning import structure
from ldt.pruning.graph import NORMS, PruningGraph
from ldt.recipe import learning_rate

log = logging.getLogger(__name__)

LossTerm = Callable[[Sequence[Tensor], Objects], dict[str, Tensor]]


class NonFiniteLossError(RuntimeError):
    """A loss term became NaN or infinite; names the term and the step."""


@dataclass
class PreparedBatch:
    """A batch as the network sees it.

    Attributes:
        images: [N, 3, H, W], normalised and padded.
        samples: mmdet's data samples.
        objects: the labelled objects, in pixels of ``images``.
    """

    images: Tensor
    samples: list[DetDataSample]
    objects: Objects


class DetectorModule(L.LightningModule):
    """Trains, validates and exposes an mmdet detector.

    Args:
        model: the detector's config as plain data (:func:`ldt.detectors.models.model_config`).
        classes: class names, in label order.
        recipe: the keys of ``conf/recipe`` (:class:`ldt.config.RecipeConfig`) as plain data.
        input_size: (height, width) of the input that tracing and counting use.
        neck: name of the module whose output LDT acts on, or ``auto``.
        predictors: layers whose outputs are never pruned; None finds them.
        checkpoint: weights to start from.
        initialise: run mmdet's weight initialisation.
        resize: the steps that bring an image to the network's input size, as mmdet's configs write
            them; checkpoints carry them.

    Attributes:
        detector: the mmdet detector.
        loss_terms: further losses by name; each gets the neck's maps and the objects of a batch,
            and gives named values. Those whose name holds ``loss`` are added to mmdet's own, and
            logged as shares of them too (``share_<name>``).
        phase_epochs: epochs of the present training phase, for the learning-rate schedule.
        lr_scale: factor on the learning rate of the present phase.
        schedule: the present phase's schedule, the recipe's or ``constant``.
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
    ) -> None:
        super().__init__()
        self.model_config, self.recipe = model, recipe
        self.classes, self.input_size = tuple(classes), (input_size[0], input_size[1])
        self.neck_name, self.resize = neck, list(resize)
        self.detector = build(model, initialise=initialise and checkpoint is None)
        self.loss_terms: dict[str, LossTerm] = {}
        self.phase_epochs, self.lr_scale = int(recipe["epochs"]), 1.0
        self.schedule: str = recipe["schedule"]
        self.metrics = DetectionMetrics(self.classes)
        if find_neck(self.detector, neck) is getattr(self.detector, "backbone", None):
            log.info("%s has no neck: LDT acts on its backbone", type(self.detector).__name__)
        self.predictors = list(predictors or find_predictors(self.detector, self.example(), neck))
        known = dict(self.detector.named_modules())
        if unknown := [name for name in self.predictors if name not in known]:
            found = find_predictors(self.detector, self.example(), neck)
            raise ValueError(
                f"detector.predictors names {', '.join(unknown)}, which "
                f"{type(self.detector).__name__} lacks; found by themselves: {', '.join(found)}"
            )
        if checkpoint is not None:
            load_weights(self.detector, checkpoint, self.predictors)

    def tapped_neck(self) -> AbstractContextManager[list[Tensor]]:
        """Within it, a forward fills the list with the neck's maps."""
        return neck_maps(self.detector, self.neck_name)

    def example(self) -> Tensor:
        """A zero image [1, 3, H, W] of the input size, on the detector's device."""
        parameter = next(self.detector.parameters())
        return parameter.new_zeros(1, 3, *self.input_size)

    # What a criterion sees (ldt.criteria.base.Target) -------------------------------------

    @property
    def model(self) -> nn.Module:
        """The detector, as criteria call it."""
        return self.detector

    def prepare(self, batch: dict[str, Any], training: bool = False) -> PreparedBatch:
        """Normalise, pad and move a collated batch; ``training`` allows batch augmentation."""
        with nullcontext() if training else _no_batch_augments(self.detector):
            data = self._preprocessed(batch, training=True)  # makes all that a loss needs
        images, samples = data["inputs"], data["data_samples"]
        shape = (int(images.shape[2]), int(images.shape[3]))
        return PreparedBatch(images, samples, labelled_objects(samples, shape))

    def _preprocessed(self, batch: dict[str, Any], training: bool) -> dict[str, Any]:
        preprocess: Any = self.detector.data_preprocessor
        data = preprocess(batch, training)
        if self.recipe.get("channels_last"):  # every layer keeps its input's order
            data["inputs"] = data["inputs"].contiguous(memory_format=torch.channels_last)
        return data

    def features(self, batch: PreparedBatch) -> list[Tensor]:
        """The neck's output maps, each [N, C, h, w]."""
        extract: Any = self.detector.extract_feat
        with self.tapped_neck() as maps:
            extract(batch.images)
        return maps

    def detection_loss(self, batch: PreparedBatch) -> Tensor:
        """The detector's own training loss of a batch, a scalar; norms and dropout keep their mode.

        All else is in training mode meanwhile: there are heads that give other maps outside of it.
        """
        waiting = [m for m in self.detector.modules() if not m.training and not _is_random(m)]
        for module in waiting:
            module.training = True
        try:
            losses = self.detector(batch.images, batch.samples, mode="loss")
        finally:
            for module in waiting:
                module.training = False
        return _total(self.detector, losses)[0]

    def trace(self, scope: Sequence[str]) -> PruningGraph:
        """The coupled groups below ``scope``; call within `eval_with_gradients`."""
        forward = forward_for_tracing(self.detector, self.neck_name)
        return PruningGraph(self.detector, forward, self.example(), scope, never=self.predictors)

    # Training and validation --------------------------------------------------------------

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Nothing: mmdet's preprocessor moves the batch; a walk through its samples is slow."""
        return batch

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """mmdet's losses and the registered terms, summed."""
        hub = MessageHub.get_current_instance()  # mmdet's own parts read their progress here
        hub.update_info("iter", self.global_step)
        hub.update_info("epoch", self.current_epoch)
        ready = self.prepare(batch, training=True)
        with self.tapped_neck() as maps:
            losses = self.detector(ready.images, ready.samples, mode="loss")
        total, logs = _total(self.detector, losses)
        detection, shares = total.detach().abs(), {}
        for term in self.loss_terms.values():
            for name, value in term(maps, ready.objects).items():
                logs[name] = value.detach()
                if "loss" in name:
                    total = total + value
                    shares[name.replace("loss", "share")] = value.detach().abs() / detection
        logs["loss"] = total.detach()
        self._check_finite(logs)
        self.log_dict(
            {f"train/{key}": value for key, value in (logs | shares).items()},
            batch_size=len(ready.samples),
        )
        self.log("loss", total.detach(), prog_bar=True, logger=False, batch_size=len(ready.samples))
        return total

    def _check_finite(self, logs: dict[str, Tensor]) -> None:
        values = torch.stack([torch.as_tensor(v).detach().float().sum() for v in logs.values()])
        if not bool(values.isfinite().all()):  # one synchronisation per step
            bad = [key for key, ok in zip(logs, values.isfinite().tolist(), strict=True) if not ok]
            culprits = [key for key in bad if key != "loss"] or bad
            raise NonFiniteLossError(
                f"{', '.join(culprits)} is not finite at step {self.global_step} (epoch "
                f"{self.current_epoch}). The last good checkpoint is kept. Lower the learning "
                "rate (recipe.optimizer.lr), clip gradients (recipe.clip_grad=35), or weaken LDT "
                "(ldt.alpha, ldt.beta, ldt.ridge)"
            )

    def predict_samples(self, batch: dict[str, Any]) -> list[DetDataSample]:
        """Data samples with ``pred_instances`` in the coordinates of the original images."""
        return self.detector(**self._preprocessed(batch, False), mode="predict")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Collect detections for the metrics."""
        self.metrics.update(self.predict_samples(batch))

    def on_validation_epoch_end(self) -> None:
        """Log every metric as ``val/<name>``."""
        found = self.metrics.compute()
        self.metrics.reset()
        self.log_dict(
            {f"val/{k}": torch.tensor(v, dtype=torch.float32) for k, v in found.items()},
            sync_dist=False,
        )

    # Optimizer ----------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """mmengine's optimizer of the recipe, and a schedule over the present phase."""
        config: dict[str, Any] = {"optimizer": dict(self.recipe["optimizer"])}
        if self.recipe["paramwise"]:
            config["paramwise_cfg"] = dict(self.recipe["paramwise"])
        optimizer: Optimizer = build_optim_wrapper(self.detector, config).optimizer
        whole, epochs = self.trainer.estimated_stepping_batches, self.trainer.max_epochs or 1
        plain: int = self.recipe["plain_epochs"]
        factor = learning_rate(
            self.recipe | {"schedule": self.schedule},
            max(1, round(whole / epochs * self.phase_epochs)),
            self.lr_scale * self._batch_scale(),
            round(whole / epochs * plain) if plain < self.phase_epochs else 0,
        )
        schedule = LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"},
        }

    def _batch_scale(self) -> float:
        """The linear scaling rule: a learning rate holds for ``recipe.base_batch_size`` images."""
        base, here = self.recipe["base_batch_size"], self.recipe["batch_size"]
        return here * self.trainer.world_size / base if base else 1.0

    # Checkpoints --------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add everything that rebuilds the detector, as plain data."""
        checkpoint["ldt"] = {
            "model": self.model_config,
            "classes": list(self.classes),
            "structure": structure.record(self.detector),
            "predictors": self.predictors,
            "neck": self.neck_name,
            "input_size": list(self.input_size),
            "resize": self.resize,
            "phase": {
                "phase_epochs": self.phase_epochs,
                "lr_scale": self.lr_scale,
                "schedule": self.schedule,
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's structure and phase before weights and optimizer are restored.

        Raises:
            ValueError: the checkpoint is none of ours, or belongs to another detector.
        """
        if "ldt" not in checkpoint:
            raise ValueError("the checkpoint was not written by ldt: it has no structure record")
        if checkpoint["ldt"]["model"] != self.model_config:
            raise ValueError("the checkpoint belongs to another detector: its model config differs")
        state = detector_state(checkpoint)
        structure.rebuild(self.detector, checkpoint["ldt"]["structure"], state)
        # the optimizer's schedule is made before any `on_fit_start`
        for key, value in checkpoint["ldt"]["phase"].items():
            setattr(self, key, value)


def restored(checkpoint: dict[str, Any], recipe: dict[str, Any]) -> DetectorModule:
    """The module of a checkpoint's content (:func:`ldt.detectors.checkpoints.read`), in eval mode.

    Args:
        checkpoint: a round's.
        recipe: of its run.

    Raises:
        ValueError: as :meth:`DetectorModule.on_load_checkpoint`.
    """
    about = checkpoint["ldt"]
    module = DetectorModule(
        about["model"],
        about["classes"],
        recipe,
        about["input_size"],
        neck=about["neck"],
        predictors=about["predictors"],
        initialise=False,
    )
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval()


@contextmanager
def _no_batch_augments(detector: Any) -> Iterator[None]:
    """Within it, mmdet's preprocessor leaves batches as they are in training too."""
    preprocess = detector.data_preprocessor
    augments, preprocess.batch_augments = preprocess.batch_augments, None
    try:
        yield
    finally:
        preprocess.batch_augments = augments


def _is_random(module: nn.Module) -> bool:
    """Whether a module computes with the batch's statistics, or at random, in training mode."""
    dropping = type(module).__name__.startswith("Drop")
    return dropping or isinstance(module, (*NORMS, nn.MultiheadAttention))


def _total(detector: Any, losses: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of a loss dict and its parts, by mmdet's rule."""
    total, logs = detector.parse_losses(losses)
    return total, dict(logs)
