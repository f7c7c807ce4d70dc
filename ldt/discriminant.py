"""Location-aware discriminant analysis: eqs. 4-12 on plain tensors.

Symbols, as in "Visual Detector Compression via Location-Aware Discriminant Analysis":

    S_w, S_b, S_t   within-class, between-class and total scatter matrices (eqs. 5-7)
    G, N, C, S      classes, objects, channels, neck scales;  K discriminants kept on a scale
    phi             an eigenvalue counts when it exceeds phi times the largest one of its scale

Shape suffixes, one letter per dimension: s scales, n objects (in `nchw`: images), c channels,
g classes, h rows, w columns.

All of it is float64 for any precision of the detector, with autocast off. Labels are on the CPU:
the classes of a batch follow from them without waiting for the device of the vectors, to which they
are copied once. On a GPU only the eigen-solver makes the host wait.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ldt.config.kinds import Covariance
from ldt.location import object_vectors
from ldt.objects import Objects

Vectors = Sequence[Tensor] | Tensor  # [N, C_s] of each scale, or [S, N, C]
Memory = tuple[Vectors, Tensor]  # detached vectors of earlier batches, and their labels [M]
# Defaults, the paper's where it states them; the same as in conf/ldt/paper.yaml and
# conf/method/ldt.yaml.
PHI = 5e-3
RIDGE, RIDGE_ABSOLUTE = 0.1, 1e-6
COVARIANCES: tuple[Covariance, ...] = get_args(Covariance)
ROUNDING = 1e-12  # of eigenvalues, relative to the largest absolute one
SMALLEST_STD = 1e-6, 1e-3  # of a live channel: over its own size, over the average channel's std


class Discriminants(NamedTuple):
    """The two losses of a batch (eqs. 10 and 11, without alpha and beta) and their eigenvalues.

    Attributes:
        loss_ld: L_LD, a scalar in the vectors' precision.
        loss_cov: L_cov, likewise.
        counts: [S] int64, K of each scale; no gradient.
        largest: [S] float64, the largest eigenvalue of each scale; no gradient.
    """

    loss_ld: Tensor
    loss_cov: Tensor
    counts: Tensor
    largest: Tensor


class Classes(NamedTuple):
    """The classes with at least two objects: a single object has no covariance.

    Its tensors are on the device of the vectors.

    Attributes:
        rows: [N] int64, the indices of their objects.
        which: [N] int64, the class of each of these objects, from 0 to G - 1.
        counts: [G] int64, the number of objects of each class.
    """

    rows: Tensor
    which: Tensor
    counts: Tensor

    def __len__(self) -> int:
        """Return the number of classes, G."""
        return len(self.counts)


def classes_of(labels: Tensor, device: torch.device | None = None) -> Classes:
    """Find the classes with two or more objects by labels on the CPU, and copy them to a device."""
    device = device or labels.device
    _, which, counts = labels.unique(return_inverse=True, return_counts=True)
    (rows,) = (counts[which] >= 2).nonzero(as_tuple=True)
    _, which, counts = labels[rows].unique(return_inverse=True, return_counts=True)
    return Classes(*(found.to(device, non_blocking=True) for found in (rows, which, counts)))


def within_root(x: Tensor, classes: Classes) -> Tensor:
    """Return A [.., N, C] with S_w = A^T A (eq. 5), in float64.

    `x` [.., N, C] are the vectors of the objects `classes.rows`, with any dimensions such as scales
    in front. S_w is the mean over classes of X_g^T X_g / (N_g - 1). Eq. 5 as printed lacks this
    division of Dorfer et al. (2016), on which the paper is based; without it, no eigenvalue would
    be positive for N > C.
    """
    every = torch.arange(len(classes), device=x.device)
    members_ng = (classes.which[:, None] == every).double()
    averaging_gn = (members_ng / classes.counts).mT
    weight_n1 = (len(classes) * (classes.counts - 1)).double().rsqrt()[classes.which, None]
    x = x.double()
    means = members_ng @ (averaging_gn @ x)
    return (x - means) * weight_n1


def total_root(x: Tensor) -> Tensor:
    """Return B [.., N, C] with S_t = B^T B (eqs. 7 and 8), in float64."""
    x = x.double()
    return (x - x.mean(-2, keepdim=True)) / (x.shape[-2] - 1) ** 0.5


def ridge_of(x: Tensor, classes: Classes, ridge: float, absolute: float) -> Tensor:
    """Return r = ridge * tr(S_w) / C + absolute: [..]; its first part follows x's scale.

    Raises:
        ValueError: the ridge is negative.
    """
    if ridge < 0 or absolute < 0:
        raise ValueError(
            f"ridge={ridge}, absolute={absolute}: neither may be negative; try {RIDGE}"
        )
    return ridge * within_root(x, classes).square().sum((-2, -1)) / x.shape[-1] + absolute


@torch.no_grad()
def solve(x: Tensor, classes: Classes, r: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Solve S_b v = lambda (S_w + r I) v (eq. 9) without gradient.

    If there are fewer objects than channels, the problem is solved in their span: outside of it,
    S_w and S_b are zero, and so are the eigenvalues. It has the symmetric form L^-1 S_b L^-T with
    the Cholesky factor L of S_w + r I. If there is none (features are not finite, or S_w is
    singular and r = 0), the result is NaN.

    Returns:
        The eigenvalues [.., min(N, C)] ascending, and the last `most` eigenvectors, [.., C, most].
    """
    x, basis = total_root(x) * (x.shape[-2] - 1) ** 0.5, None
    if x.shape[-2] < x.shape[-1]:
        basis, coordinates = torch.linalg.qr(x.mT)
        x = coordinates.mT
    A, B = within_root(x, classes), total_root(x)
    S_w = A.mT @ A
    eye = torch.eye(S_w.shape[-1], dtype=S_w.dtype, device=S_w.device)
    L, failed = torch.linalg.cholesky_ex(S_w + r[..., None, None] * eye)
    half = torch.linalg.solve_triangular(L, B.mT @ B - S_w, upper=False)
    whitened = torch.linalg.solve_triangular(L, half.mT, upper=False)
    sound = (whitened.isfinite().all(-1).all(-1) & (failed == 0))[..., None]
    # eigh raises on NaN, so unsound matrices are replaced before and marked afterwards.
    eigs, vectors = torch.linalg.eigh(whitened.where(sound[..., None], 0.0))
    top = vectors[..., vectors.shape[-1] - most :]
    top = torch.linalg.solve_triangular(L.mT, top, upper=True)
    top = top if basis is None else basis @ top
    return eigs.where(sound, torch.nan), top.where(sound[..., None], torch.nan)


def top_k(eigs: Tensor, n_classes: int, phi: float = PHI) -> Tensor:
    """Return a bool mask [.., C] of the top K eigenvalues; `mask.sum(-1)` is K.

    `eigs` [.., C] are ascending. K = min(#{lambda > phi * max}, n_classes - 1), and only positive
    eigenvalues count. Sec. 3.1 has at most G - 1 discriminants; phi alone would keep many more for
    unbalanced classes.

    Raises:
        ValueError: phi is not in [0, 1).
    """
    check_phi(phi)
    # Zeros (directions without objects) have either sign after rounding, and never count.
    rounding = ROUNDING * eigs.abs().amax(-1, keepdim=True)
    K = (eigs > rounding.maximum(phi * eigs[..., -1:])).sum(-1, keepdim=True)
    C = eigs.shape[-1]
    return torch.arange(C, device=eigs.device) >= C - K.clamp(max=n_classes - 1)


def ld_loss(
    x: Tensor, classes: Classes, phi: float, ridge: float, absolute: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return L_LD (eq. 10) of `x` [S, N, C], K [S], and the largest eigenvalue [S].

    L_LD is minus the sum over scales of the mean of the top K eigenvalues. Each is the quotient
    v^T S_b v / v^T (S_w + r I) v of its eigenvector v. There, the quotient is stationary in v, so v
    is a constant for the gradient: no factorisation is differentiated, and S_w and S_b are needed
    along v only. K is a constant too; a scale without positive eigenvalues adds zero.
    """
    r = ridge_of(x, classes, ridge, absolute)
    most = min(len(classes) - 1, *x.shape[-2:])
    eigs, vectors = solve(x, classes, r, most)
    along = x.double() @ vectors
    within = within_root(along, classes).square().sum(-2)
    total = total_root(along).square().sum(-2)
    quotients = (total - within) / (within + r[..., None] * vectors.square().sum(-2))
    mask = top_k(eigs, len(classes), phi)
    counts = mask.sum(-1)
    loss = -((quotients * mask[..., -most:]).sum(-1) / counts.clamp(min=1)).sum()
    return loss, counts, eigs[..., -1]


def covariance_penalty(S_t: Tensor, reduction: str = "mean") -> Tensor:
    """Return L_cov (eq. 11): absolute off-diagonal entries of S_t [S, C, C], summed over scales.

    "sum" is eq. 11 as printed. "mean" divides it by C (C - 1), because with hundreds of channels
    the sum dominates the detection loss and drives the features to zero.
    """
    C = S_t.shape[-1]
    total = S_t.abs().sum() - S_t.diagonal(dim1=-2, dim2=-1).abs().sum()
    return total / max(C * (C - 1), 1) if reduction == "mean" else total


def mean_abs_correlation(x: Tensor) -> Tensor:
    """Return the mean |correlation| between the channels of `x` [.., N, C]: [..] float64.

    It does not depend on the channels' scales. Dead channels are excluded: their standard deviation
    is below a millionth of their size (float32 rounding) or a thousandth of the average channel's.
    With fewer than two other channels the result is 0.
    """
    x = x.double()
    centred = x - x.mean(-2, keepdim=True)
    var, size = centred.square().mean(-2), x.square().mean(-2)
    of_size, of_others = (share**2 for share in SMALLEST_STD)
    live = (var > of_size * size) & (var > of_others * var.mean(-1, keepdim=True))
    scale = var.where(live, 1.0).rsqrt() * live
    unit = centred * scale[..., None, :] / max(x.shape[-2], 1) ** 0.5
    correlations = (unit.mT @ unit).abs().sum((-2, -1))
    C = live.sum(-1)
    return (correlations - C) / (C * (C - 1)).clamp(min=1)


def location_aware_discriminants(
    features: Sequence[Tensor],
    objects: Objects,
    *,
    phi: float = PHI,
    ridge: float = RIDGE,
    absolute: float = RIDGE_ABSOLUTE,
    covariance: str = "mean",
    memory: Memory | None = None,
) -> Discriminants:
    """Apply `discriminants_of` to feature maps, NCHW per scale; every scale uses all objects."""
    return discriminants_of(
        [object_vectors(feat_nchw, objects) for feat_nchw in features],
        objects.labels,
        phi=phi,
        ridge=ridge,
        absolute=absolute,
        covariance=covariance,
        memory=memory,
    )


def discriminants_of(
    vectors: Vectors,
    labels: Tensor,
    *,
    phi: float = PHI,
    ridge: float = RIDGE,
    absolute: float = RIDGE_ABSOLUTE,
    covariance: str = "mean",
    memory: Memory | None = None,
) -> Discriminants:
    """Compute both losses from object vectors, [N, C_s] per scale or [S, N, C] (eqs. 4-11).

    `memory`, the vectors of earlier batches, is appended without gradient before classes with a
    single object are excluded. Scales of equal width are solved in one call. With fewer than two
    classes both losses are zeros that are part of the autograd graph, so that all ranks of a
    distributed run have the same backward pass. Features that are not finite, or a singular S_w
    without ridge, make L_LD NaN, and training stops with an error that names it.

    Raises:
        ValueError: the memory has other widths, or an option is not allowed.
    """
    if covariance not in COVARIANCES:
        allowed = " or ".join(f'"{name}"' for name in COVARIANCES)
        raise ValueError(f"covariance={covariance!r} is unknown; use {allowed}")
    if memory is not None:
        vectors, labels = _append(vectors, labels, memory)
    with _full_precision(vectors[0].device.type):
        return _discriminants(vectors, labels, covariance, phi, ridge, absolute)


def _full_precision(kind: str) -> AbstractContextManager[object]:
    """Switch autocast off on a kind of device, within the context."""
    known = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if known else nullcontext()


def _discriminants(
    vectors: Vectors, labels: Tensor, covariance: str, phi: float, ridge: float, absolute: float
) -> Discriminants:
    loss_ld = loss_cov = torch.stack([v.sum() for v in vectors]).sum() * 0.0
    classes, widths = classes_of(labels, loss_ld.device), [v.shape[1] for v in vectors]
    # Two classes of two objects each are enough: N >= 2 G implies the N > G that S_w needs.
    if len(classes) < 2:
        counts = torch.zeros(len(widths), dtype=torch.int64, device=loss_ld.device)
        return Discriminants(loss_ld, loss_cov, counts, counts.double())
    found: dict[int, tuple[Tensor, Tensor]] = {}  # per scale, K and the largest eigenvalue
    for width in dict.fromkeys(widths):
        scales = [s for s, c in enumerate(widths) if c == width]
        x_snc = torch.stack([vectors[s] for s in scales]).index_select(-2, classes.rows).double()
        one_ld, counts, largest = ld_loss(x_snc, classes, phi, ridge, absolute)
        found |= zip(scales, zip(counts.unbind(), largest.unbind(), strict=True), strict=True)
        loss_ld = loss_ld + one_ld.to(loss_ld.dtype)
        loss_cov = loss_cov + _cov_loss(x_snc, covariance).to(loss_cov.dtype)
    counts, largest = (torch.stack([found[s][i] for s in range(len(widths))]) for i in (0, 1))
    return Discriminants(loss_ld, loss_cov, counts, largest)


def _cov_loss(x: Tensor, covariance: str) -> Tensor:
    """Return L_cov of `x` [S, N, C], in one of its forms."""
    if covariance == "correlation":
        return mean_abs_correlation(x).sum()
    B = total_root(x)
    return covariance_penalty(B.mT @ B, covariance)


def _append(vectors: Vectors, labels: Tensor, memory: Memory) -> tuple[Vectors, Tensor]:
    """Append the detached vectors and labels of earlier batches."""
    old_vectors, old_labels = memory
    widths, old = [v.shape[1] for v in vectors], [v.shape[1] for v in old_vectors]
    if widths != old:
        raise ValueError(
            f"the memory has vectors of widths {old}, the neck now has {widths}: clear the memory "
            "when the neck changes"
        )
    both = [torch.cat([v, m.detach().to(v)]) for v, m in zip(vectors, old_vectors, strict=True)]
    return both, torch.cat([labels, old_labels.to(labels)])


def check_phi(phi: float) -> None:
    """Raise ValueError unless phi is in [0, 1)."""
    if not 0 <= phi < 1:
        raise ValueError(f"phi={phi} must be in [0, 1); the paper has phi={PHI}")
