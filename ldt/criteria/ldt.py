"""Location-aware discriminant tracing, eqs. 13-16 of the paper."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from ldt.config.values import NotNegative, Positive, Share, checked
from ldt.criteria.base import Criterion, Target, feature_gradients
from ldt.discriminant import (
    ATTENTION_A,
    ATTENTION_B,
    PHI,
    RIDGE,
    attention,
    channel_ratio,
    discriminant_directions,
    discriminative_channels,
    drop_singletons,
    location_aware_discriminants,
    stacked_vectors,
)
from ldt.objects import Objects
from ldt.pruning.graph import PruningGraph
from ldt.pruning.layer_types import width_of

Source = Literal["neck", "neck_all", "neck_energy", "power", "discriminant", "detection"]
Reduce = Literal["position", "position_absolute", "absolute", "signed", "sum_absolute"]


class LDTCriterion(Criterion):
    """Traces the neck's discriminating power back to every channel by first derivatives.

    ``u`` (eq. 13) is the gradient of a scalar z, the chosen ``source``, by a feature map F; the
    score (eqs. 14-16) sums ``M u_c F_c`` over positions, with the attention M of eq. 15, and
    averages over images. Eq. 13 averages u over the positions of a map, which loses what gradients
    of opposite sign carry: kept per position, it leaves 0.02-0.04 AP more of a detector cut by
    85 % (``experiments/roadscenes/README.md``), so that is the default.

    Args:
        source: what z is.
            ``neck``: sum of the discriminative channels of the neck's output, those whose ratio
            (S_b)_cc/(S_w)_cc over the calibration images is above ``phi`` of the largest;
            ``neck_all``: sum of all its channels; ``neck_energy``: half its squared norm;
            ``power``: the sum of the top eigenvalues (eq. 10);
            ``discriminant``: half the squared norm of its projection on the top eigenvectors;
            ``detection``: the detection loss (LDT_det of Table 3).
        location: weight positions by the attention map; False counts all alike.
        reduce: how the positions and images of eq. 16 are summed.
            ``position``: per image |sum M u F|, with u kept per position;
            ``position_absolute``: sum |M u F|, likewise;
            ``absolute``: |sum M u F|, with u averaged over positions as in eq. 13;
            ``signed``: its literal signed sum; ``sum_absolute``: sum |M u F|, likewise.
        a: attention next to a box, eq. 15.
        b: its decay with the squared distance in cells.
        phi: share of the largest ratio above which a channel is discriminative.
        ridge: ridge of S_w for ``power`` and ``discriminant``, in tr(S_w)/C.

    Layers outside of the neck's reach (a head in ``prune.scope``) are scored with ``detection``,
    because the neck's output does not depend on them.

    ``notes["rank_correlation"]`` is Spearman's correlation of a layer's scores between two batches,
    averaged over layers and pairs of batches (the paper's Fig. 6: batches agree).

    Raises:
        ValueError: a value outside of what is allowed, naming its key.
    """

    @checked("method.criterion")
    def __init__(
        self,
        source: Source = "neck",
        location: bool = True,
        reduce: Reduce = "position",
        a: Positive = ATTENTION_A,
        b: Positive = ATTENTION_B,
        phi: Share = PHI,
        ridge: NotNegative = RIDGE,
    ) -> None:
        self.source, self.location, self.reduce = source, location, reduce
        self.a, self.b, self.phi, self.ridge = a, b, phi, ridge
        self._scores: dict[nn.Module, Tensor] = {}
        self.batch_scores: dict[nn.Module, list[Tensor]] = {}  # of each batch, summed over images
        self.batch_images: list[int] = []  # of each batch, those that were summed over

    def channel_scores(self, layer: nn.Module) -> Tensor:
        """I_c of eq. 16 for every output channel of a layer."""
        return self._scores[layer]

    def collect(self, target: Target, graph: PruningGraph, batches: Iterable[Any]) -> None:
        """Score every layer of the graph's groups (eq. 16)."""
        points = graph.feature_modules
        self._scores = {
            layer: torch.zeros(width_of(layer, "out"), dtype=torch.float64) for layer in points
        }
        self.batch_scores = {layer: [] for layer in points}
        weights = self._channel_weights(target, batches)
        head = points
        if self.source != "detection":
            self._trace(points, target, batches, weights)
            head = {layer: point for layer, point in points.items() if layer not in self._reached}
        if head:
            self._trace(head, target, batches, None)
        self.notes = {"rank_correlation": rank_correlation(self.batch_scores.values())}

    def _trace(
        self,
        points: dict[nn.Module, nn.Module],
        target: Target,
        batches: Iterable[Any],
        weights: list[Tensor] | None,
    ) -> None:
        """One pass of eqs. 13-16; ``weights`` as of :meth:`_channel_weights`."""
        self._reached: set[nn.Module] = set()
        self.batch_images = []
        for batch in batches:
            maps: dict[tuple[int, int], Tensor] = {}
            images = len(batch.images)
            sums: dict[nn.Module, Tensor] = {}

            def receive(
                layer: nn.Module,
                value: Tensor,
                gradient: Tensor,
                maps: dict[tuple[int, int], Tensor] = maps,
                sums: dict[nn.Module, Tensor] = sums,
                batch: Any = batch,
            ) -> None:
                size = (value.shape[2], value.shape[3])
                if size not in maps:
                    maps[size] = self._attention(batch.objects, size, len(batch.images))
                summed = self._sum_positions(value, gradient, maps[size])
                sums[layer] = sums[layer] + summed if layer in sums else summed

            with feature_gradients(points, receive):
                self._scalar(target, batch, weights).backward()
            target.model.zero_grad(set_to_none=True)
            self._reached |= set(sums)
            seen = torch.ones(images, dtype=torch.bool)
            if self.location:  # images without objects have no attention: they are skipped
                seen = torch.bincount(batch.objects.image.cpu(), minlength=images) > 0
            self.batch_images.append(int(seen.sum()))
            for layer, per_image in sums.items():
                kept = per_image.double().cpu()[seen]
                summed = (kept if self.reduce == "signed" else kept.abs()).sum(0)
                self.batch_scores[layer].append(summed)
                self._scores[layer] += summed
        used = sum(self.batch_images)
        if not used:
            raise ValueError(
                "none of the calibration images holds an object, so nothing can be traced; "
                "raise prune.images or check the labels of the training set"
            )
        for layer in self._reached:
            self._scores[layer] /= used

    def _attention(self, objects: Objects, size: tuple[int, int], images: int) -> Tensor:
        """M of eq. 15 for maps of this size (h, w), [images, 1, h, w]."""
        if not self.location:
            return torch.ones(images, 1, *size, device=objects.boxes.device)
        return attention(objects, size, images, self.a, self.b)[:, None]

    def _sum_positions(self, value: Tensor, gradient: Tensor, attended: Tensor) -> Tensor:
        """Sums over positions, eq. 16, [N, C], of maps [N, C, h, w]; ``attended`` [N, 1, h, w]."""
        value, gradient = _precise(value), _precise(gradient)
        if self.reduce == "position":
            return (attended * gradient * value).sum((2, 3))
        if self.reduce == "position_absolute":
            return (attended * (gradient * value).abs()).sum((2, 3))
        u = gradient.mean((2, 3))
        if self.reduce == "sum_absolute":
            return (attended * value.abs()).sum((2, 3)) * u.abs()
        return (attended * value).sum((2, 3)) * u

    def _scalar(self, target: Target, batch: Any, weights: list[Tensor] | None) -> Tensor:
        """The z that is differentiated, summed over scales and images."""
        if weights is None:
            return target.detection_loss(batch)
        features = [_precise(f) for f in target.features(batch)]
        if self.source == "power":
            found = location_aware_discriminants(
                features, batch.objects, phi=self.phi, ridge=self.ridge
            )
            return -found.loss_ld
        if self.source == "neck_energy":
            return torch.stack([f.square().sum() / 2 for f in features]).sum()
        if self.source == "discriminant":
            projected = [
                torch.einsum("nchw,ck->nkhw", f, w.to(f))
                for f, w in zip(features, weights, strict=True)
            ]
            return torch.stack([p.square().sum() / 2 for p in projected]).sum()
        return torch.stack(
            [(f.sum((0, 2, 3)) * w.to(f)).sum() for f, w in zip(features, weights, strict=True)]
        ).sum()

    def _channel_weights(self, target: Target, batches: Iterable[Any]) -> list[Tensor] | None:
        """Per scale: 1 for the channels D_s ([C]), or the top eigenvectors ([C, K])."""
        if self.source == "detection":
            return None
        if self.source in ("power", "neck_energy"):
            return []
        with torch.no_grad():
            if self.source == "neck_all":
                first = target.features(next(iter(batches)))
                return [torch.ones(f.shape[1]) for f in first]
            vectors, labels = stacked_vectors((target.features(b), b.objects) for b in batches)
        at_least = len(labels[drop_singletons(labels)].unique()) - 1
        if self.source == "discriminant":
            return [discriminant_directions(x, labels, self.phi, self.ridge) for x in vectors]
        return [
            discriminative_channels(channel_ratio(x, labels), self.phi, at_least) for x in vectors
        ]


def rank_correlation(layers: Iterable[Sequence[Tensor]]) -> float:
    """Spearman's correlation between batches, averaged; nan where there is only one batch."""
    found = []
    for scores in layers:
        ranks = [rankdata(s.numpy()) for s in scores if s.unique().numel() > 1]
        if len(ranks) > 1:
            found.append(np.corrcoef(ranks)[np.triu_indices(len(ranks), 1)].mean())
    return float(np.mean(found)) if found else float("nan")


def _precise(x: Tensor) -> Tensor:
    """At least float32: sums over thousands of positions lose half precision's few digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
