"""Location-aware discriminant analysis: eqs. 1-12 and 15 on plain tensors.

Symbols, as in "Visual Detector Compression via Location-Aware Discriminant Analysis":

    S_w, S_b, S_t   within-class, between-class and total scatter matrices (eqs. 5-7)
    G, N, C, S      classes, objects, channels, neck scales;  K discriminants kept on a scale
    phi             an eigenvalue counts when it exceeds phi times the largest one of its scale
    a, b            strength and decay of the attention around objects (eq. 15)

Shape suffixes, one letter per dimension: s scales, n objects (in `nchw` and `nhw`: images),
c channels, g classes, k boxes, h rows, w columns.

Scatter matrices and eigenvalues are float64 without autocast, for any precision of the detector.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import roi_pool

from ldt.objects import Objects

Vectors = Sequence[Tensor] | Tensor  # [N, C_s] of each scale, or [S, N, C]
Memory = tuple[Vectors, Tensor]  # detached vectors of earlier batches, and their labels [M]
# Defaults, the paper's where it states them; the same as in conf/ldt/default.yaml and
# conf/method/ldt.yaml.
PHI = 5e-3
RIDGE, RIDGE_ABSOLUTE = 0.1, 1e-6
ATTENTION_A, ATTENTION_B = 1.2, 0.062
OBJECTS_AT_ONCE = 64  # attention: 64 distance maps of 208 x 336 cells are 18 MB


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


def cell_boxes(boxes: Tensor, shape: tuple[int, int], map_hw: tuple[int, int]) -> Tensor:
    """Return the cells that boxes touch (eq. 1): [K, 4] int64, (x1, y1, x2, y2), both inclusive.

    `boxes` [K, 4] are in pixels of the padded input of size `shape`; the stride, shape / map_hw, is
    fractional if the size of the map was rounded up. The first cell is floor(x1 / stride), the last
    ceil(x2 / stride) - 1, clamped to the map; every box has at least one cell.
    """
    (height, width), (h, w) = shape, map_hw
    edges = boxes.double()
    # Multiply before dividing, in float64, so that a box edge on a cell border is exactly on it.
    edges = edges * edges.new_tensor([w, h, w, h]) / edges.new_tensor([width, height] * 2)
    limit = torch.tensor([w - 1, h - 1], device=boxes.device)
    first = edges[:, :2].floor().long().clamp(min=0).minimum(limit)
    last = (edges[:, 2:].ceil().long() - 1).minimum(limit).maximum(first)
    return torch.cat([first, last], dim=1)


def object_vectors(feat_nchw: Tensor, objects: Objects) -> Tensor:
    """Return each channel's maximum inside each object's box (eqs. 1-3): [K, C], with gradient.

    Only cells inside the box are considered: neck outputs have no ReLU, so the zeros of a mask
    would clip negative values. float64 features stay float64, all others become float32. For K = 0
    the result is an empty tensor that is part of the autograd graph.

    Raises:
        ValueError: an object's image is outside the batch.
    """
    n, _, h, w = feat_nchw.shape
    # The pooling operator does not check indices: a wrong one would read out of bounds.
    if objects.image.numel() and not 0 <= int(objects.image.min()) <= int(objects.image.max()) < n:
        raise ValueError(
            f"objects.image goes from {int(objects.image.min())} to {int(objects.image.max())}, "
            f"but the features hold {n} images: give each object its index in the batch, from 0"
        )
    feat_nchw = feat_nchw.to(torch.promote_types(feat_nchw.dtype, torch.float32))
    cells = cell_boxes(objects.boxes, objects.shape, (h, w))
    rois = torch.cat([objects.image[:, None], cells], dim=1).to(feat_nchw)
    return roi_pool(feat_nchw, rois, output_size=1, spatial_scale=1.0).flatten(1)


def drop_singletons(labels: Tensor) -> Tensor:
    """Return a bool mask [N] of the objects whose class has at least two objects.

    A single object has no covariance, so its class is excluded from S_w, S_t and G.
    """
    _, which, counts = labels.unique(return_inverse=True, return_counts=True)
    return counts[which] >= 2


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


def scatter(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scatter matrices S_w, S_b, S_t (eqs. 5-8), each [.., C, C] in float64.

    `x` [.., N, C] are object vectors (with any leading dimensions, such as scales), `labels` [N].
    S_w is the mean over classes of X_g^T X_g / (N_g - 1). Eq. 5 as printed lacks this division of
    Dorfer et al. (2016), on which the paper is based; without it, no eigenvalue would be positive
    for N > C.

    Raises:
        ValueError: a class has a single object.
    """
    classes, which, counts = labels.unique(return_inverse=True, return_counts=True)
    if labels.numel() == 0 or int(counts.min()) < 2:
        raise ValueError(
            f"{labels.numel()} objects with {counts.tolist()} per class, but each class needs at "
            "least 2: keep = drop_singletons(labels), then scatter(x[..., keep, :], labels[keep])"
        )
    with torch.autocast(x.device.type, enabled=False):
        x = x.double()
        one_hot_ng = torch.nn.functional.one_hot(which, len(classes)).double()
        means = (one_hot_ng / counts).mT @ x
        within = x - one_hot_ng @ means
        weight_n1 = 1 / (len(classes) * (counts[which] - 1).double())[:, None]
        S_w = within.mT @ (weight_n1 * within)
        total = x - x.mean(-2, keepdim=True)
        S_t = total.mT @ total / (len(labels) - 1)
    return S_w, S_t - S_w, S_t


def eigenvalues(
    S_w: Tensor, S_b: Tensor, ridge: float = RIDGE, absolute: float = RIDGE_ABSOLUTE
) -> Tensor:
    """Return the eigenvalues of S_b v = lambda (S_w + r I) v (eq. 9): [.., C] ascending, float64.

    r = ridge * tr(S_w) / C + absolute, whose relative part follows the features' scale. The problem
    is solved in the symmetric form L^-1 S_b L^-T with the Cholesky factor L, and without
    eigenvectors, so that gradients are finite for equal eigenvalues. If there is no factor
    (features are not finite, or S_w is singular and r = 0), the result is NaN, and training stops
    with an error that names the loss.

    Raises:
        ValueError: the ridge is negative.
    """
    with torch.autocast(S_w.device.type, enabled=False):
        _, whitened, failed = _whiten(S_w.double(), S_b.double(), ridge, absolute)
        sound = whitened.isfinite().all(-1).all(-1) & (failed == 0)
        # eigvalsh raises on NaN, so unsound matrices are replaced before and marked afterwards.
        eigs = torch.linalg.eigvalsh(whitened.where(sound[..., None, None], 0.0))
        return eigs.where(sound[..., None], torch.nan)


def _whiten(
    S_w: Tensor, S_b: Tensor, ridge: float, absolute: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return L, L^-1 S_b L^-T and an error flag; L L^T = S_w + (ridge tr(S_w) / C + absolute) I."""
    if ridge < 0 or absolute < 0:
        raise ValueError(
            f"ridge={ridge}, absolute={absolute}: neither may be negative; try {RIDGE}"
        )
    C = S_w.shape[-1]
    r = ridge * S_w.diagonal(dim1=-2, dim2=-1).sum(-1) / C + absolute
    eye = torch.eye(C, dtype=S_w.dtype, device=S_w.device)
    L, failed = torch.linalg.cholesky_ex(S_w + r[..., None, None] * eye)
    half = torch.linalg.solve_triangular(L, S_b, upper=False)
    return L, torch.linalg.solve_triangular(L, half.mT, upper=False), failed


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
    x_nc, labels = _drop_small_classes(x_nc.detach(), labels)
    S_w, S_b, _ = scatter(x_nc, labels)
    L, whitened, failed = _whiten(S_w, S_b, ridge, absolute)
    if int(failed):
        raise ValueError(f"S_w is singular with ridge={ridge}: raise the ridge, e.g. to {RIDGE}")
    eigs, vectors = torch.linalg.eigh(whitened)
    kept = vectors[:, top_k(eigs, labels.unique().numel(), phi)]
    return torch.linalg.solve_triangular(L.mT, kept, upper=True)


def top_k(eigs: Tensor, n_classes: int, phi: float = PHI) -> Tensor:
    """Return a bool mask [.., C] of the top K eigenvalues; `mask.sum(-1)` is K.

    `eigs` [.., C] are ascending. K = min(#{lambda > phi * max}, n_classes - 1), and only positive
    eigenvalues count. Sec. 3.1 has at most G - 1 discriminants; phi alone would keep many more for
    unbalanced classes.

    Raises:
        ValueError: phi is not in [0, 1).
    """
    _check_phi(phi)
    # This excludes every lambda <= 0 too: if the maximum is negative, phi * max is above it.
    K = (eigs > phi * eigs[..., -1:]).sum(-1, keepdim=True)
    C = eigs.shape[-1]
    return torch.arange(C, device=eigs.device) >= C - K.clamp(max=n_classes - 1)


def ld_loss(eigs: Tensor, n_classes: int, phi: float = PHI) -> Tensor:
    """Return L_LD (eq. 10): minus the sum over scales of the mean of the top K eigenvalues.

    `eigs` [S, C] are ascending. K is a constant for the gradient; a scale without positive
    eigenvalues adds a zero that is part of the autograd graph.
    """
    mask = top_k(eigs, n_classes, phi)
    return -((eigs * mask).sum(-1) / mask.sum(-1).clamp(min=1)).sum()


def covariance_penalty(S_t: Tensor, reduction: str = "mean") -> Tensor:
    """Return L_cov (eq. 11): absolute off-diagonal entries of S_t [S, C, C], summed over scales.

    "sum" is eq. 11 as printed. "mean" divides it by C (C - 1), because with hundreds of channels
    the sum dominates the detection loss and drives the features to zero.

    Raises:
        ValueError: unknown reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'covariance reduction {reduction!r} is unknown; use "mean" or "sum"')
    C = S_t.shape[-1]
    total = (S_t - S_t.diagonal(dim1=-2, dim2=-1).diag_embed()).abs().sum()
    return total / max(C * (C - 1), 1) if reduction == "mean" else total


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
    distributed run have the same backward pass.

    Raises:
        ValueError: the memory has other widths, or an option is not allowed.
    """
    if memory is not None:
        vectors, labels = _append(vectors, labels, memory)
    keep = drop_singletons(labels)
    labels = labels[keep]
    n_classes = labels.unique().numel()
    widths = [v.shape[1] for v in vectors]
    loss_ld = loss_cov = torch.stack([v.sum() for v in vectors]).sum() * 0.0
    counts = labels.new_zeros(len(widths))
    largest = labels.new_zeros(len(widths), dtype=torch.float64)
    # Two classes of two objects each are enough: N >= 2 G implies the N > G that S_w needs.
    for width in dict.fromkeys(widths) if n_classes >= 2 else ():
        scales = [s for s, c in enumerate(widths) if c == width]
        x_snc = torch.stack([vectors[s][keep] for s in scales])
        S_w, S_b, S_t = scatter(x_snc, labels)
        eigs = eigenvalues(S_w, S_b, ridge, absolute)
        loss_ld = loss_ld + ld_loss(eigs, n_classes, phi).to(loss_ld.dtype)
        loss_cov = loss_cov + covariance_penalty(S_t, covariance).to(loss_cov.dtype)
        counts[scales] = top_k(eigs, n_classes, phi).sum(-1)
        largest[scales] = eigs.detach()[:, -1]
    return Discriminants(loss_ld, loss_cov, counts, largest)


def channel_ratio(x_nc: Tensor, labels: Tensor) -> Tensor:
    """Return the discriminating power of each channel, (S_b)_cc / (S_w)_cc: [C] float64, >= 0.

    `x_nc` [N, C] are the vectors of all calibration objects on one scale, `labels` [N]. If S_w and
    S_b are diagonal due to the covariance penalty, these are the eigenvalues of eq. 9. Dead
    channels have 0.

    Raises:
        ValueError: there are fewer than two classes with two objects.
    """
    S_w, S_b, _ = scatter(*_drop_small_classes(x_nc, labels))
    within, between = S_w.diagonal(), S_b.diagonal()
    floor = 1e-9 * within.mean() + torch.finfo(within.dtype).tiny
    return between.clamp(min=0) / within.maximum(floor)


def _drop_small_classes(x_nc: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Select the objects of classes with two or more; ValueError for fewer than two classes."""
    keep = drop_singletons(labels)
    if labels[keep].unique().numel() < 2:
        raise ValueError(
            f"the objects have the classes {labels.unique().tolist()}, but two classes with two "
            "objects each are needed: use more images"
        )
    return x_nc[keep], labels[keep]


def discriminative_channels(ratio: Tensor, phi: float, at_least: int) -> Tensor:
    """Return a bool mask [C] of channels whose `channel_ratio` [C] exceeds phi times the largest.

    At least `at_least` channels are selected (G - 1, the number of discriminants in sec. 3.1).

    Raises:
        ValueError: phi is not in [0, 1).
    """
    _check_phi(phi)
    mask = ratio > phi * ratio.max()
    mask[ratio.topk(min(at_least, ratio.numel())).indices] = True
    return mask


def discriminant_share(eigs: Tensor, k: int) -> Tensor:
    """Return the share of the `k` largest of `eigs` [.., C] in the discriminating power: [..].

    The power is the sum of the positive eigenvalues; the share, in [0, 1], is 0 if there is none.
    """
    power = eigs.clamp(min=0).sort(descending=True).values
    return power[..., :k].sum(-1) / power.sum(-1).clamp(min=torch.finfo(power.dtype).tiny)


def mean_abs_correlation(x_nc: Tensor) -> Tensor:
    """Return the mean |correlation| between channels of the vectors `x_nc` [N, C], in float64.

    Dead channels, whose standard deviation is below a millionth of their size (float32 rounding),
    are excluded; with fewer than two other channels the result is 0.
    """
    x_nc = x_nc.double()
    live = x_nc[:, x_nc.var(0, correction=0) > 1e-12 * x_nc.square().mean(0)]
    if (C := live.shape[1]) < 2:
        return x_nc.new_zeros(())
    return (torch.corrcoef(live.mT).abs().sum() - C) / (C * (C - 1))


def attention(
    objects: Objects,
    map_hw: tuple[int, int],
    n_images: int,
    a: float = ATTENTION_A,
    b: float = ATTENTION_B,
) -> Tensor:
    """Return the attention of each cell of a map (eq. 15): [n_images, h, w] float32, in [0, 1].

    It is 1 in the cells of an object's box, and min(1, a * d2^-b) outside, where d2 is the squared
    distance, in cells of this map, from the cell's centre (column + 0.5, row + 0.5) to the box
    centre divided by the stride. A cell has the maximum over the objects of its image; images
    without objects have zeros.

    Raises:
        ValueError: a or b is not positive, so attention would not decay.
    """
    if a <= 0 or b <= 0:
        raise ValueError(
            f"a={a} and b={b} must be positive; the paper has a={ATTENTION_A}, b={ATTENTION_B}"
        )
    # Attention decreases with distance, so its maximum is at the smallest distance.
    d2_nhw = torch.full((n_images, *map_hw), torch.inf, device=objects.boxes.device)
    for image, d2_hw in enumerate(d2_nhw):
        for boxes in objects.boxes[objects.image == image].split(OBJECTS_AT_ONCE):
            d2_khw = _squared_distances(boxes, objects.shape, map_hw)
            d2_hw.copy_(torch.cat([d2_hw[None], d2_khw]).amin(0))  # d2_khw may be empty
    return (a * d2_nhw.pow(-b)).clamp(max=1)


def _squared_distances(boxes: Tensor, shape: tuple[int, int], map_hw: tuple[int, int]) -> Tensor:
    """Return squared distances of cells to box centres, in cells, 0 inside boxes: [K, h, w]."""
    cells = cell_boxes(boxes, shape, map_hw)
    squared, inside = [], []
    for axis, (pixels, n_cells) in ((1, (shape[0], map_hw[0])), (0, (shape[1], map_hw[1]))):
        index = torch.arange(n_cells, device=boxes.device)
        centre = boxes[:, axis::2].double().mean(1, keepdim=True) * n_cells / pixels
        squared.append((index + 0.5 - centre).square().float())
        inside.append((index >= cells[:, axis, None]) & (index <= cells[:, axis + 2, None]))
    d2_khw = squared[0][:, :, None] + squared[1][:, None, :]
    return d2_khw.masked_fill_(inside[0][:, :, None] & inside[1][:, None, :], 0)


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


def _check_phi(phi: float) -> None:
    if not 0 <= phi < 1:
        raise ValueError(f"phi={phi} must be in [0, 1); the paper has phi={PHI}")
