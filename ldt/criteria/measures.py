"""Measures of object vectors on a whole set of images: eigenvalues, directions and channels.

Symbols and shapes as in :mod:`ldt.discriminant`.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ldt.discriminant import (
    PHI,
    RIDGE,
    RIDGE_ABSOLUTE,
    Classes,
    check_phi,
    classes_of,
    ridge_of,
    solve,
    top_k,
    total_root,
    within_root,
)
from ldt.location import object_vectors
from ldt.objects import Objects


def stacked_vectors(
    batches: Iterable[tuple[Sequence[Tensor], Objects]],
) -> tuple[list[Tensor], Tensor]:
    """Return the object vectors of batches of (maps NCHW per scale, objects), on the CPU.

    Returns:
        [N, C_s] per scale, and the labels [N].
    """
    rows: list[list[Tensor]] = []
    labels: list[Tensor] = []
    for maps, objects in batches:
        rows.append([object_vectors(feat_nchw, objects).cpu() for feat_nchw in maps])
        labels.append(objects.labels.cpu())
    return [torch.cat(scale) for scale in zip(*rows, strict=True)], torch.cat(labels)


def eigenvalues(
    x: Tensor, labels: Tensor, ridge: float = RIDGE, absolute: float = RIDGE_ABSOLUTE
) -> Tensor:
    """Return all eigenvalues of eq. 9: [.., C] ascending, float64, without gradient.

    `x` [.., N, C] are object vectors, `labels` [N].

    Raises:
        ValueError: there are fewer than two classes with two objects, or the ridge is negative.
    """
    x, classes = _select(x, labels)
    eigs, _ = solve(x, classes, ridge_of(x, classes, ridge, absolute), 0)
    return pad(eigs, (0, x.shape[-1] - eigs.shape[-1])).sort(-1).values.detach()


def discriminant_directions(
    x_nc: Tensor,
    labels: Tensor,
    phi: float = PHI,
    ridge: float = RIDGE,
    absolute: float = RIDGE_ABSOLUTE,
) -> Tensor:
    """Return the eigenvectors of the top K eigenvalues of eq. 9: [C, K] float64, no gradient.

    `x_nc` [N, C] are the vectors of all calibration objects on one scale, `labels` [N]. Columns v
    are scaled so that v^T (S_w + r I) v = 1.

    Raises:
        ValueError: there are fewer than two classes with two objects, or S_w is singular.
    """
    x_nc, classes = _select(x_nc.detach(), labels)
    most = min(len(classes) - 1, *x_nc.shape)
    eigs, vectors = solve(x_nc, classes, ridge_of(x_nc, classes, ridge, absolute), most)
    if eigs.isnan().any():
        raise ValueError(f"S_w is singular with ridge={ridge}: raise the ridge, e.g. to {RIDGE}")
    return vectors[:, top_k(eigs, len(classes), phi)[-most:]]


def channel_ratio(x_nc: Tensor, labels: Tensor) -> Tensor:
    """Return the discriminating power of each channel, (S_b)_cc / (S_w)_cc: [C] float64, >= 0.

    `x_nc` [N, C] are the vectors of all calibration objects on one scale, `labels` [N]. If S_w and
    S_b are diagonal due to the covariance penalty, these are the eigenvalues of eq. 9. Dead
    channels have 0.

    Raises:
        ValueError: there are fewer than two classes with two objects.
    """
    x_nc, classes = _select(x_nc, labels)
    within, total = (r.square().sum(0) for r in (within_root(x_nc, classes), total_root(x_nc)))
    floor = 1e-9 * within.mean() + torch.finfo(within.dtype).tiny
    return (total - within).clamp(min=0) / within.maximum(floor)


def discriminative_channels(ratio: Tensor, phi: float, at_least: int) -> Tensor:
    """Return a bool mask [C] of channels whose `channel_ratio` [C] exceeds phi times the largest.

    At least `at_least` channels are selected (G - 1, the number of discriminants in sec. 3.1).

    Raises:
        ValueError: phi is not in [0, 1).
    """
    check_phi(phi)
    mask = ratio > phi * ratio.max()
    mask[ratio.topk(min(at_least, ratio.numel())).indices] = True
    return mask


def discriminant_share(eigs: Tensor, k: int) -> Tensor:
    """Return the share of the `k` largest of `eigs` [.., C] in the discriminating power: [..].

    The power is the sum of the positive eigenvalues; the share, in [0, 1], is 0 if there is none.
    """
    power = eigs.clamp(min=0).sort(descending=True).values
    return power[..., :k].sum(-1) / power.sum(-1).clamp(min=torch.finfo(power.dtype).tiny)


def _select(x: Tensor, labels: Tensor) -> tuple[Tensor, Classes]:
    """Select the objects of the classes with two or more; ValueError for fewer than two classes."""
    classes = classes_of(labels, x.device)
    if len(classes) < 2:
        raise ValueError(
            f"the objects have the classes {labels.unique().tolist()}, but two classes with two "
            "objects each are needed: use more images"
        )
    return x.index_select(-2, classes.rows), classes
