"""Adapter of an mmdet detector with the operations that criteria, tracing and evaluation need."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.detectors import BaseDetector
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from ldt import progress
from ldt.config.names import below
from ldt.detectors.forward import (
    ENCODER,
    find_neck,
    find_predictors,
    forwards_for_tracing,
    makers_of_maps,
    name_of_maps,
    neck_maps,
    raw_forward,
)
from ldt.detectors.mmengine_internals import copy_without_waiting, swaps_channels
from ldt.objects import Objects, background_boxes, labelled_objects
from ldt.pruning.attention import make_prunable
from ldt.pruning.graph import PruningGraph
from ldt.pruning.layer_types import NORMS

RawBatch = dict[str, Any]  # collated by mmdet's data loaders: "inputs" and "data_samples"


@dataclass
class PreparedBatch:
    """A batch ready for the network.

    Attributes:
        images: [N, 3, H, W], normalised and padded.
        samples: mmdet's data samples.
        objects: the ground-truth objects, in pixels of ``images``.
    """

    images: Tensor
    samples: list[DetDataSample]
    objects: Objects

    def of_image(self, index: int) -> "PreparedBatch":
        """Return one image as a batch of its own."""
        part = slice(index, index + 1)
        return PreparedBatch(self.images[part], self.samples[part], self.objects.of_image(index))


class Detector:
    """Wrap an mmdet detector for criteria, tracing and evaluation.

    The adapter has no weights of its own and needs no training recipe: the detector can be trained,
    pruned and moved to another device while it is wrapped. Attention layers of the detector are
    replaced by equal ones that can be pruned (:func:`ldt.pruning.attention.make_prunable`).

    Args:
        model: an mmdet detector.
        input_size: (height, width) of the input for tracing and for counting MACs.
        neck: name of the module whose output LDT uses, or ``auto``.
        predictors: layers whose output channels are never pruned; detected if None.
        channels_last: compute in the NHWC memory format.
        background: add boxes of the background to the objects of every batch, as a class.

    Attributes:
        model, input_size, neck, predictors, background: as given or detected.

    Raises:
        ValueError: there is no such module; the message lists the existing ones.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: tuple[int, int],
        neck: str = "auto",
        predictors: Sequence[str] | None = None,
        channels_last: bool = False,
        background: bool = False,
    ) -> None:
        self.background = background
        self.model, self.neck, self.channels_last = cast(BaseDetector, model), neck, channels_last
        self.input_size = (int(input_size[0]), int(input_size[1]))
        make_prunable(model)
        self._compiled: dict[nn.Module, Callable[..., object]] = {}
        find_neck(model, neck)
        self.predictors = list(predictors or self._find_predictors())
        known = dict(model.named_modules())
        if unknown := [name for name in self.predictors if name not in known]:
            raise ValueError(
                f"detector.predictors names {', '.join(unknown)}, which {type(model).__name__} "
                f"does not have; detected are: {', '.join(self._find_predictors())}"
            )

    def _find_predictors(self) -> list[str]:
        return find_predictors(self.model, self.example(), name_of_maps(self.neck))

    @property
    def acts_on_backbone(self) -> bool:
        """Whether the detector has no neck, so that LDT uses the output of its backbone."""
        return find_neck(self.model, self.neck) is getattr(self.model, "backbone", None)

    def example(self) -> Tensor:
        """Return a zero image [1, 3, H, W] of the input size, on the detector's device."""
        return next(self.model.parameters()).new_zeros(1, 3, *self.input_size)

    def arrange(self) -> bool:
        """Order the weights as the feature maps are; a GPU would reorder them in every pass.

        Returns:
            Whether their memory format may have changed.
        """
        if not self.channels_last or next(self.model.parameters()).device.type == "cpu":
            return False
        self.model.to(memory_format=torch.channels_last)
        return True

    def compile(self) -> None:
        """Compile backbone and neck as they are now, for passes within :meth:`compiled`.

        Compiled forwards lie beside the network, not in it: names of weights, copies and traces of
        the network remain what they are, and so do passes with hooks on its layers.
        """
        torch.compiler.reset()  # what was compiled for other widths
        parts = (getattr(self.model, name, None) for name in ("backbone", "neck"))
        self._compiled = {part: torch.compile(part.forward) for part in parts if part is not None}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the compiled forwards, which belong to this network: a copy is not compiled."""
        return self.__dict__ | {"_compiled": {}}

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Use what :meth:`compile` has compiled, if anything, within the context."""
        try:
            for module, forward in self._compiled.items():
                module.__dict__["forward"] = forward
            yield
        finally:
            for module in self._compiled:
                module.__dict__.pop("forward", None)

    def prepare(self, batch: RawBatch, training: bool = False) -> PreparedBatch:
        """Normalise, pad and move a collated batch; ``training`` allows batch augmentation."""
        loaded = batch["data_samples"]  # the preprocessor may change them
        background = [background_boxes(sample) for sample in loaded] if self.background else []
        with nullcontext() if training else _no_batch_augments(self.model):
            data = self._preprocess(batch, training=True)  # also prepares what losses need
        images, samples = data["inputs"], data["data_samples"]
        shape = (int(images.shape[2]), int(images.shape[3]))
        return PreparedBatch(images, samples, labelled_objects(samples, shape, loaded, background))

    def _preprocess(self, batch: RawBatch, training: bool) -> RawBatch:
        preprocessor = cast(DetDataPreprocessor, self.model.data_preprocessor)
        device = next(self.model.parameters()).device
        if preprocessor.device != device:  # moving a module that holds the detector leaves it as is
            preprocessor.to(device)
            copy_without_waiting(preprocessor)
        data = preprocessor(batch, training)
        if self.channels_last:  # layers preserve the memory format of their input
            data["inputs"] = data["inputs"].contiguous(memory_format=torch.channels_last)
        return data

    def features(self, batch: PreparedBatch) -> list[Tensor]:
        """Return the neck's feature maps, each [N, C, h, w]."""
        model: Any = self.model
        with neck_maps(self.model, self.neck) as maps:
            levels = model.extract_feat(batch.images)
            if below(self.neck, [ENCODER]):
                model.forward_encoder(**model.pre_transformer(levels, batch.samples)[0])
        return maps

    def losses(self, batch: PreparedBatch) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """Return the sum of mmdet's losses, the single losses by name, and the neck's maps."""
        with neck_maps(self.model, self.neck) as maps:
            losses = self.model(batch.images, batch.samples, mode="loss")
        total, logs = self.model.parse_losses(losses)
        return total, dict(logs), maps

    def detection_loss(self, batch: PreparedBatch) -> Tensor:
        """Return the training loss of a batch, a scalar; norms and dropout keep their mode.

        All other modules are in training mode during this, since some heads have other outputs in
        eval mode.
        """
        switched = [m for m in self.model.modules() if not (m.training or _depends_on_mode(m))]
        for module in switched:
            module.training = True
        try:
            return self.losses(batch)[0]
        finally:
            for module in switched:
                module.training = False

    def raw_maps(self, images: Tensor) -> list[Tensor]:
        """Return the raw output maps of images [N, 3, H, W] as a flat list."""
        return raw_forward(self.model, images)

    def network_input(self, batch: RawBatch) -> Tensor:
        """Return a collated batch's images as in testing: [N, 3, H, W], normalised and padded."""
        return self._preprocess(batch, False)["inputs"]

    def pad_pixel(self) -> list[float]:
        """Return what the network sees as padding, as pixel values of a loaded image's channels."""
        preprocessor: Any = self.model.data_preprocessor
        pixel = torch.full((3,), float(getattr(preprocessor, "pad_value", 0)))
        if getattr(preprocessor, "mean", None) is not None:
            mean, std = preprocessor.mean.flatten().cpu(), preprocessor.std.flatten().cpu()
            pixel = pixel * std + mean
        return (pixel.flip(0) if swaps_channels(preprocessor) else pixel).tolist()

    def predict(self, batch: RawBatch) -> list[DetDataSample]:
        """Return samples with ``pred_instances`` in pixels of the original images."""
        return self.model(**self._preprocess(batch, False), mode="predict")

    def trace(self, scope: Sequence[str]) -> PruningGraph:
        """Trace the coupled groups below ``scope``; call within ``eval_with_gradients``.

        Raises:
            ValueError: the detector has no part of a name in ``scope``.
        """
        _check_scope(scope, self.model)
        forward, traced = forwards_for_tracing(self.model, scope, self.neck)
        neck = name_of_maps(self.neck)
        ends = makers_of_maps(self.model, self.example(), neck) if traced else []
        layers = [name for name in self.predictors if name not in ends]
        return PruningGraph(self.model, forward, self.example(), scope, layers, traced, ends)


@dataclass
class Calibration:
    """Calibration batches for criteria, prepared again in every iteration.

    Args:
        detector: prepares the batches.
        loader: yields collated batches, the same in every iteration.
    """

    detector: Detector
    loader: Iterable[RawBatch]

    def __iter__(self) -> Iterator[PreparedBatch]:
        for batch in self.loader:
            yield self.detector.prepare(batch)
            progress.advance(len(batch["inputs"]))


def _check_scope(scope: Sequence[str], model: nn.Module) -> None:
    names = {name for name, _ in model.named_modules()}
    for name in scope:
        if name not in names:
            parts = ", ".join(part for part, _ in model.named_children())
            raise ValueError(
                f"prune.scope={list(scope)}: {type(model).__name__} has no part {name!r}. Its "
                f"parts are: {parts}; a part of these works too, e.g. prune.scope=[backbone.layer4]"
            )


@contextmanager
def _no_batch_augments(model: BaseDetector) -> Iterator[None]:
    """Disable the batch augmentations of mmdet's preprocessor within the context."""
    preprocess = cast(DetDataPreprocessor, model.data_preprocessor)
    augments, preprocess.batch_augments = preprocess.batch_augments, None
    try:
        yield
    finally:
        preprocess.batch_augments = augments


def _depends_on_mode(module: nn.Module) -> bool:
    """Return whether a module uses batch statistics or random numbers in training mode."""
    is_dropout = type(module).__name__.startswith("Drop")
    return is_dropout or isinstance(module, (*NORMS, nn.MultiheadAttention))
