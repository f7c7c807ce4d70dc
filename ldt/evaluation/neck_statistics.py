"""What training has done to the neck: discriminants and correlations on a whole data split."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldt.detectors.forward import neck_maps
from ldt.discriminant import (
    PHI,
    RIDGE,
    channel_ratio,
    discriminant_directions,
    discriminant_share,
    drop_singletons,
    eigenvalues,
    mean_abs_correlation,
    scatter,
    stacked_vectors,
)
from ldt.objects import Objects, labelled_objects


@dataclass(frozen=True, eq=False)
class NeckSpace:
    """The objects of a data split on one scale of a detector's neck.

    Attributes:
        scale: index of the scale.
        projections: [N, K] the centred object vectors in the top discriminants, the largest first;
            in units of the (ridged) standard deviation within classes.
        labels: [N] whole numbers.
        eigenvalues: [C] of eq. 9, the largest first.
        ratio: [C] discriminating power of each channel alone.
        activity: [C] standard deviation of each channel over the objects.
    """

    scale: int
    projections: np.ndarray
    labels: np.ndarray
    eigenvalues: np.ndarray
    ratio: np.ndarray
    activity: np.ndarray

    @property
    def most(self) -> int:
        """#classes - 1, the number of discriminants that there can be."""
        return len(np.unique(self.labels)) - 1

    @property
    def power(self) -> float:
        """The sum of the discriminants' eigenvalues."""
        return float(self.eigenvalues[: self.most].clip(min=0).sum())


def _neck_outputs(
    detector: Any, loader: Iterable[dict[str, Any]], neck: str
) -> Iterator[tuple[list[Tensor], Objects]]:
    for batch in loader:
        data = detector.data_preprocessor(batch, False)
        images = data["inputs"]
        with neck_maps(detector, neck) as maps:
            detector.extract_feat(images)
        yield maps, labelled_objects(data["data_samples"], (images.shape[2], images.shape[3]))


def _object_vectors(
    detector: nn.Module, loader: Iterable[dict[str, Any]], neck: str
) -> tuple[list[Tensor], Tensor]:
    detector.eval()
    return stacked_vectors(_neck_outputs(detector, loader, neck))


@torch.no_grad()
def neck_spaces(
    detector: nn.Module,
    loader: Iterable[dict[str, Any]],
    neck: str = "auto",
    ridge: float = RIDGE,
    phi: float = PHI,
) -> list[NeckSpace]:
    """Objects, eigenvalues and channels on every scale, as the paper's Fig. 1 shows them.

    Objects of classes with a single one are left out. The discriminants are those of the very
    objects that are projected on them.

    Args:
        detector, loader, neck, ridge: as of :func:`neck_statistics`.
        phi: share of the largest eigenvalue above which a discriminant counts.

    Raises:
        ValueError: there are not two classes of two objects.
    """
    vectors, labels = _object_vectors(detector, loader, neck)
    return [_space(scale, x_nc, labels, ridge, phi) for scale, x_nc in enumerate(vectors)]


def _space(scale: int, x_nc: Tensor, labels: Tensor, ridge: float, phi: float) -> NeckSpace:
    ratio = channel_ratio(x_nc, labels)
    directions = discriminant_directions(x_nc, labels, phi, ridge).flip(1)  # the largest first
    keep = drop_singletons(labels)
    x_nc, labels = x_nc[keep].double(), labels[keep]
    S_w, S_b, S_t = scatter(x_nc, labels)
    return NeckSpace(
        scale,
        ((x_nc - x_nc.mean(0)) @ directions).numpy(),
        labels.numpy(),
        eigenvalues(S_w, S_b, ridge).flip(0).numpy(),
        ratio.numpy(),
        S_t.diagonal().clamp(min=0).sqrt().numpy(),
    )


@torch.no_grad()
def neck_statistics(
    detector: nn.Module,
    loader: Iterable[dict[str, Any]],
    neck: str = "auto",
    ridge: float = RIDGE,
) -> list[dict[str, float]]:
    """Per scale, how far the discriminating power is condensed and the channels decorrelated.

    Args:
        detector: an mmdet detector.
        loader: batches with boxes in the coordinates of the network input (``probe_dataloader``).
        neck: name of the tapped module.
        ridge: of S_w, in tr(S_w)/C.

    Returns:
        One dict per scale: ``share`` of the positive eigenvalues' sum held by the top #classes-1,
        ``correlation`` (mean absolute, between channels), ``eigenvalue`` (the largest).
    """
    vectors, labels = _object_vectors(detector, loader, neck)
    keep = drop_singletons(labels)
    top = labels[keep].unique().numel() - 1
    found = []
    for scale, x_nc in enumerate(vectors):
        S_w, S_b, _ = scatter(x_nc[keep], labels[keep])
        eigs = eigenvalues(S_w, S_b, ridge)
        found.append(
            {
                "scale": scale,
                "share": float(discriminant_share(eigs, top)),
                "correlation": float(mean_abs_correlation(x_nc)),
                "eigenvalue": float(eigs[-1]),
            }
        )
    return found
