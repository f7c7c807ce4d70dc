"""Discriminants and channel correlations of the neck's output on a data split."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from mmdet.models.detectors import BaseDetector
from torch import Tensor, nn

from ldt.criteria.measures import (
    channel_ratio,
    discriminant_directions,
    discriminant_share,
    eigenvalues,
    stacked_vectors,
)
from ldt.detectors.adapter import RawBatch
from ldt.detectors.forward import neck_maps
from ldt.discriminant import PHI, RIDGE, classes_of, mean_abs_correlation
from ldt.objects import Objects, background_boxes, labelled_objects


@dataclass(frozen=True, eq=False)
class NeckSpace:
    """The objects of a data split on one scale of a detector's neck.

    Attributes:
        scale: index of the scale.
        projections: [N, K] projections of the centred object vectors onto the top discriminants,
            largest first, in units of the (ridged) within-class standard deviation.
        labels: [N] integers.
        eigenvalues: [C] of eq. 9, largest first.
        ratio: [C] discriminating power of each channel.
        activity: [C] standard deviation of each channel over the objects.
    """

    scale: int
    projections: np.ndarray
    labels: np.ndarray
    eigenvalues: np.ndarray
    ratio: np.ndarray
    activity: np.ndarray

    @property
    def max_discriminants(self) -> int:
        """The largest possible number of discriminants, #classes - 1."""
        return len(np.unique(self.labels)) - 1

    @property
    def power(self) -> float:
        """The sum of the discriminants' eigenvalues."""
        return float(self.eigenvalues[: self.max_discriminants].clip(min=0).sum())


def _neck_outputs(
    detector: BaseDetector, loader: Iterable[RawBatch], neck: str, background: bool
) -> Iterator[tuple[list[Tensor], Objects]]:
    for batch in loader:
        others = [background_boxes(s) for s in batch["data_samples"]] if background else []
        data = detector.data_preprocessor(batch, False)
        images = data["inputs"]
        with neck_maps(detector, neck) as maps:
            detector.extract_feat(images)
        shape = (images.shape[2], images.shape[3])
        yield maps, labelled_objects(data["data_samples"], shape, background=others)


def _object_vectors(
    detector: nn.Module, loader: Iterable[RawBatch], neck: str, background: bool
) -> tuple[list[Tensor], Tensor]:
    detector.eval()
    return stacked_vectors(_neck_outputs(cast(BaseDetector, detector), loader, neck, background))


@torch.no_grad()
def neck_spaces(
    detector: nn.Module,
    loader: Iterable[RawBatch],
    neck: str = "auto",
    ridge: float = RIDGE,
    phi: float = PHI,
    background: bool = False,
) -> list[NeckSpace]:
    """Compute objects, eigenvalues and channels on every scale, for Fig. 1 of the paper.

    Classes with a single object are excluded. The discriminants are computed from the same objects
    that are projected onto them.

    Args:
        detector: an mmdet detector.
        loader: batches with boxes in pixels of the network input (``probe_dataloader``).
        neck: name of the module whose output is used.
        ridge: ridge of S_w, relative to tr(S_w)/C.
        phi: share of the largest eigenvalue above which a discriminant counts.
        background: boxes of the background are a further class.

    Raises:
        ValueError: there are fewer than two classes with two objects.
    """
    vectors, labels = _object_vectors(detector, loader, neck, background)
    return [_space(scale, x_nc, labels, ridge, phi) for scale, x_nc in enumerate(vectors)]


def _space(scale: int, x_nc: Tensor, labels: Tensor, ridge: float, phi: float) -> NeckSpace:
    ratio = channel_ratio(x_nc, labels)
    directions = discriminant_directions(x_nc, labels, phi, ridge).flip(1)  # largest first
    eigs = eigenvalues(x_nc, labels, ridge)
    kept = classes_of(labels).rows
    x_nc, labels = x_nc[kept].double(), labels[kept]
    return NeckSpace(
        scale,
        ((x_nc - x_nc.mean(0)) @ directions).numpy(),
        labels.numpy(),
        eigs.flip(0).numpy(),
        ratio.numpy(),
        x_nc.std(0).numpy(),
    )


@torch.no_grad()
def neck_statistics(
    detector: nn.Module,
    loader: Iterable[RawBatch],
    neck: str = "auto",
    ridge: float = RIDGE,
    background: bool = False,
) -> list[dict[str, float]]:
    """Measure the concentration of discriminating power and the correlation of channels.

    Args:
        detector: an mmdet detector.
        loader: batches with boxes in pixels of the network input (``probe_dataloader``).
        neck: name of the module whose output is used.
        ridge: ridge of S_w, relative to tr(S_w)/C.
        background: boxes of the background are a further class.

    Returns:
        One dict per scale: ``share`` of the top #classes-1 in the sum of positive eigenvalues,
        ``correlation`` (mean absolute, between channels), ``eigenvalue`` (the largest).
    """
    vectors, labels = _object_vectors(detector, loader, neck, background)
    top = len(classes_of(labels)) - 1
    statistics = []
    for scale, x_nc in enumerate(vectors):
        eigs = eigenvalues(x_nc, labels, ridge)
        statistics.append(
            {
                "scale": scale,
                "share": float(discriminant_share(eigs, top)),
                "correlation": float(mean_abs_correlation(x_nc)),
                "eigenvalue": float(eigs[-1]),
            }
        )
    return statistics
