"""Distillation from the unpruned base while the pruned detector retrains."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from ldt.config.values import NotNegative, Positive, checked
from ldt.detectors.adapter import Detector
from ldt.detectors.checkpoints import load_pruned
from ldt.detectors.forward import eval_with_gradients, neck_maps
from ldt.loop.round_record import RoundRecord
from ldt.module import DetectorModule
from ldt.objects import Objects
from ldt.pruning.coupled_groups import Member
from ldt.pruning.hooks import outputs_of
from ldt.runs import files

Readers = list[tuple[str, Member]]  # the groups of a map's channels, and a layer that reads them


def channel_wise_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) of softmax over positions: the mean over channels, images.

    Shu et al., ICCV 2021. It is computed in float32, and 0 for equal maps.

    Args:
        student: [N, C, h, w].
        teacher: [N, C, h, w]; gets no gradient.
        temperature: T, which both are divided by.
    """
    own, other = (
        log_softmax(maps.flatten(2).float() / temperature, dim=2)
        for maps in (student, teacher.detach())
    )
    divergence = kl_div(own, other, reduction="sum", log_target=True)
    return divergence * temperature**2 / (own.shape[0] * own.shape[1])


class Distillation(L.Callback):
    """Add the channel-wise divergence from the unpruned base to the loss, after the first cut.

    The teacher is the base's checkpoint of the run, in eval mode; it sees the same augmented images
    as the student. It is no part of the module, so neither checkpoints nor averages hold it.

    Args:
        folder: the run's directory.
        scope: name prefixes of the modules that are pruned.
        neck: weight of the divergence of the neck's maps, the mean over scales. Channels that were
            removed are left out of the teacher's maps.
        head: weight of the divergence of the predictors' outputs, the mean over these.
        temperature: of both.

    Raises:
        ValueError: a value is not allowed; the message names its key.
    """

    NAME = "distill"

    @checked("distill")
    def __init__(
        self,
        folder: Path,
        scope: Sequence[str],
        neck: NotNegative = 0.0,
        head: NotNegative = 0.0,
        temperature: Positive = 1.0,
    ) -> None:
        self.folder, self.scope = folder, tuple(scope)
        self.neck, self.head, self.temperature = neck, head, temperature
        self._kept: dict[str, list[int]] = {}  # per group, numbered as in the base
        self._active = False
        self._teacher: Detector | None = None
        self._readers: list[Readers] = []  # per map of the neck
        self._left: list[Tensor] = []  # of each map's channels; empty: not known yet
        self._hooks = ExitStack()
        self._outputs: list[Tensor] = []  # of the student's predictors, in this step
        self._wanted: tuple[list[Tensor], list[Tensor]] = ([], [])  # the teacher's maps and outputs

    def state_dict(self) -> dict[str, Any]:
        """Return which of the base's channels are left; the teacher itself is a file of the run."""
        return {"active": self._active, "kept": self._kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore which channels are left."""
        self._active, self._kept, self._left = state_dict["active"], state_dict["kept"], []

    def cut(self, record: RoundRecord) -> None:
        """Follow the removal of channels; from now on the student differs from the base."""
        self._active, self._left = True, []
        for name, kept in record.kept.items():
            before = self._kept.get(name)
            self._kept[name] = [int(c) if before is None else before[c] for c in kept]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Register the loss terms with the module."""
        assert isinstance(pl_module, DetectorModule)
        pl_module.loss_terms[self.NAME] = self

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the loss terms from the module."""
        assert isinstance(pl_module, DetectorModule)
        pl_module.loss_terms.pop(self.NAME, None)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Observe the student for this step only: copies of the module must not hold the hooks."""
        if not self._active:
            return
        assert isinstance(pl_module, DetectorModule)
        if self._teacher is None:
            self._load(pl_module.adapter)
        detector: nn.Module = pl_module.detector
        self._hooks.callback(detector.register_forward_pre_hook(self._teach).remove)
        self._outputs = self._hooks.enter_context(outputs_of(predictors_of(pl_module.adapter)))

    def on_train_batch_end(self, *_: object) -> None:
        """Forget the step."""
        self._hooks.close()
        self._outputs = []
        self._wanted = ([], [])

    def _load(self, student: Detector) -> None:
        weight = next(student.model.parameters())
        path = self.folder / files.round_checkpoint(0)
        model = load_pruned(path, weight.device).to(weight.dtype).requires_grad_(False)
        self._teacher = Detector(model, student.input_size, student.neck, student.predictors)
        self._readers = find_readers(self._teacher, self.scope)

    @torch.no_grad()
    def _teach(self, _model: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert self._teacher is not None
        model, images = self._teacher.model, inputs[0]
        predictors = predictors_of(self._teacher)
        with neck_maps(model, self._teacher.neck) as maps, outputs_of(predictors) as outputs:
            if self.head:
                self._teacher.raw_maps(images)
            else:
                model.extract_feat(images)
        self._wanted = (maps, outputs)

    def __call__(
        self, features: Sequence[Tensor], objects: Objects, detection: Tensor
    ) -> dict[str, Tensor]:
        """Return the weighted terms of a step; none before the first cut."""
        maps, outputs = self._wanted
        losses = {}
        if self.neck and maps:
            if not self._left:  # on the device: a copy from the host would wait for it
                pairs = zip(maps, self._readers, strict=True)
                self._left = [
                    kept_channels(m.shape[1], readers, self._kept).to(m.device)
                    for m, readers in pairs
                ]
            theirs = [m[:, left] for m, left in zip(maps, self._left, strict=True)]
            losses["loss_distill_neck"] = self.neck * self._mean(features, theirs)
        if self.head and outputs:
            losses["loss_distill_head"] = self.head * self._mean(self._outputs, outputs)
        return losses

    def _mean(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        pairs = zip(student, teacher, strict=True)
        found = [channel_wise_divergence(own, other, self.temperature) for own, other in pairs]
        return torch.stack(found).mean()


def predictors_of(detector: Detector) -> list[nn.Module]:
    """Return the layers that compute the raw maps."""
    return [detector.model.get_submodule(name) for name in detector.predictors]


def find_readers(detector: Detector, scope: Sequence[str]) -> list[Readers]:
    """Return, for each of the neck's maps, the groups of its channels as its readers tell them.

    Args:
        detector: unpruned.
        scope: name prefixes of the modules that are pruned.
    """
    with eval_with_gradients(detector.model):
        graph = detector.trace(scope)
    read: list[tuple[str, Member, Tensor]] = []

    def note(group: str, member: Member) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _layer, inputs: read.append((group, member, inputs[0]))

    hooks = [
        member.layer.register_forward_pre_hook(note(name, member))
        for name, group in graph.groups.items()
        for member in group.consumers
    ]
    with neck_maps(detector.model, detector.neck) as maps:
        graph.run(hooks)
    return [[(name, member) for name, member, x in read if x is own] for own in maps]


def kept_channels(width: int, readers: Readers, kept: dict[str, list[int]]) -> Tensor:
    """Return which of a map's channels are left, given those of the groups."""
    left = np.ones(width, bool)
    for name, member in readers:
        if name in kept:
            left[member.channels] &= np.isin(member.roots, kept[name])
    return torch.as_tensor(np.flatnonzero(left))


def check_head(detector: Detector) -> None:
    """Raise ValueError unless a detector's predictors compute maps of the images alone."""
    inside = any(name.startswith(("backbone.", "neck.")) for name in detector.predictors)
    if inside or hasattr(detector.model, "roi_head"):
        raise ValueError(
            f"distill.head compares the maps of one-stage detectors with convolutional heads, "
            f"{type(detector.model).__name__} has others: type distill.head=0 (and distill.neck=1)"
        )
