"""An mmdet detector as pruning sees it: what criteria, tracing and evaluation ask of it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from ldt.detectors.forward import (
    find_neck,
    find_predictors,
    forward_for_tracing,
    neck_maps,
    raw_forward,
)
from ldt.objects import Objects, labelled_objects
from ldt.pruning.graph import PruningGraph
from ldt.pruning.layer_types import NORMS

RawBatch = dict[str, Any]  # what mmdet's data loaders give: "inputs" and "data_samples"


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


class Detector:
    """Wrap an mmdet detector for criteria, tracing and evaluation.

    It holds no weights of its own and needs no training recipe: the detector can be trained, cut
    and moved to another device while it is wrapped.

    Args:
        model: an mmdet detector.
        input_size: (height, width) of the input that tracing and counting use.
        neck: name of the module whose output LDT acts on, or ``auto``.
        predictors: layers whose outputs are never pruned; None finds them.
        channels_last: compute in NHWC order.

    Attributes:
        model, input_size, neck, predictors: as given or found.

    Raises:
        ValueError: there is no such module; names those that there are.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: tuple[int, int],
        neck: str = "auto",
        predictors: Sequence[str] | None = None,
        channels_last: bool = False,
    ) -> None:
        self.model, self.neck, self.channels_last = model, neck, channels_last
        self.input_size = (int(input_size[0]), int(input_size[1]))
        find_neck(model, neck)
        self.predictors = list(predictors or self._find_predictors())
        known = dict(model.named_modules())
        if unknown := [name for name in self.predictors if name not in known]:
            raise ValueError(
                f"detector.predictors names {', '.join(unknown)}, which {type(model).__name__} "
                f"lacks; found by themselves: {', '.join(self._find_predictors())}"
            )

    def _find_predictors(self) -> list[str]:
        return find_predictors(self.model, self.example(), self.neck)

    @property
    def acts_on_backbone(self) -> bool:
        """Whether the detector has no neck, so that LDT acts on its backbone."""
        return find_neck(self.model, self.neck) is getattr(self.model, "backbone", None)

    def example(self) -> Tensor:
        """Return a zero image [1, 3, H, W] of the input size, on the detector's device."""
        return next(self.model.parameters()).new_zeros(1, 3, *self.input_size)

    def prepare(self, batch: RawBatch, training: bool = False) -> PreparedBatch:
        """Normalise, pad and move a collated batch; ``training`` allows batch augmentation."""
        with nullcontext() if training else _no_batch_augments(self.model):
            data = self._preprocess(batch, training=True)  # makes all that a loss needs
        images, samples = data["inputs"], data["data_samples"]
        shape = (int(images.shape[2]), int(images.shape[3]))
        return PreparedBatch(images, samples, labelled_objects(samples, shape))

    def _preprocess(self, batch: RawBatch, training: bool) -> RawBatch:
        preprocess: Any = self.model.data_preprocessor
        data = preprocess(batch, training)
        if self.channels_last:  # every layer keeps its input's order
            data["inputs"] = data["inputs"].contiguous(memory_format=torch.channels_last)
        return data

    def features(self, batch: PreparedBatch) -> list[Tensor]:
        """Return the neck's feature maps, each [N, C, h, w]."""
        extract: Any = self.model.extract_feat
        with neck_maps(self.model, self.neck) as maps:
            extract(batch.images)
        return maps

    def losses(self, batch: PreparedBatch) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """Return the sum of mmdet's losses, its parts for the log, and the neck's feature maps."""
        with neck_maps(self.model, self.neck) as maps:
            losses = self.model(batch.images, batch.samples, mode="loss")
        parse: Any = self.model.parse_losses
        total, logs = parse(losses)
        return total, dict(logs), maps

    def detection_loss(self, batch: PreparedBatch) -> Tensor:
        """Return the training loss of a batch, a scalar; norms and dropout keep their mode.

        All else is in training mode meanwhile: there are heads that give other maps outside of it.
        """
        waiting = [m for m in self.model.modules() if not m.training and not _is_random(m)]
        for module in waiting:
            module.training = True
        try:
            return self.losses(batch)[0]
        finally:
            for module in waiting:
                module.training = False

    def raw_maps(self, images: Tensor) -> list[Tensor]:
        """Return the raw output maps of images [N, 3, H, W], flat."""
        return raw_forward(self.model, images)

    def predict(self, batch: RawBatch) -> list[DetDataSample]:
        """Return samples with ``pred_instances`` in the coordinates of the original images."""
        return self.model(**self._preprocess(batch, False), mode="predict")

    def trace(self, scope: Sequence[str]) -> PruningGraph:
        """Return the coupled groups below ``scope``; call within ``eval_with_gradients``.

        Raises:
            ValueError: ``scope`` names no part of the detector.
        """
        _check_scope(scope, self.model)
        forward = forward_for_tracing(self.model, self.neck)
        return PruningGraph(self.model, forward, self.example(), scope, self.predictors)


@dataclass
class Calibration:
    """Calibration images as criteria see them, prepared anew at every pass.

    Args:
        detector: prepares them.
        loader: gives collated batches, the same at every pass.
    """

    detector: Detector
    loader: Iterable[RawBatch]

    def __iter__(self) -> Iterator[PreparedBatch]:
        for batch in self.loader:
            yield self.detector.prepare(batch)


def _check_scope(scope: Sequence[str], model: nn.Module) -> None:
    names = {name for name, _ in model.named_modules()}
    for name in scope:
        if name not in names:
            parts = ", ".join(part for part, _ in model.named_children())
            raise ValueError(
                f"prune.scope={list(scope)}: {type(model).__name__} has no part {name!r}. Its "
                f"parts are: {parts}; parts of them go too, e.g. prune.scope=[backbone.layer4]"
            )


@contextmanager
def _no_batch_augments(model: Any) -> Iterator[None]:
    """Within it, mmdet's preprocessor leaves batches as they are in training too."""
    preprocess = model.data_preprocessor
    augments, preprocess.batch_augments = preprocess.batch_augments, None
    try:
        yield
    finally:
        preprocess.batch_augments = augments


def _is_random(module: nn.Module) -> bool:
    """Whether a module computes with the batch's statistics, or at random, in training mode."""
    dropping = type(module).__name__.startswith("Drop")
    return dropping or isinstance(module, (*NORMS, nn.MultiheadAttention))
