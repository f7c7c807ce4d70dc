"""Location-aware discriminant analysis: the mathematics of eqs. 1-12 and 15, on plain tensors.

Symbols, as in "Visual Detector Compression via Location-Aware Discriminant Analysis":

    S_w, S_b, S_t   within-class, between-class and total scatter matrices (eqs. 5-7)
    G, N, C, S      classes, objects, channels, neck scales;  K discriminants kept on a scale
    phi             an eigenvalue counts when it exceeds phi times the largest one of its scale
    a, b            strength and decay of the attention around objects (eq. 15)

Shape suffixes, one letter per dimension: s scales, n objects (in `nchw` and `nhw`: images),
c channels, g classes, k boxes, h rows, w columns.

Scatter matrices and eigenvalues are float64 with autocast off, whatever the detector computes in.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import roi_pool

from ldt.objects import Objects

Vectors = Sequence[Tensor] | Tensor  # [N, C_s] of each scale, or [S, N, C]
Memory = tuple[Vectors, Tensor]  # detached vectors of earlier batches, and their labels [M]
# The paper's values, and where it states none, ours. Everything that takes them refers to these;
# conf/ldt/default.yaml and conf/method/ldt.yaml say the same.
PHI = 5e-3
RIDGE, RIDGE_ABSOLUTE = 0.1, 1e-6
ATTENTION_A, ATTENTION_B = 1.2, 0.062
OBJECTS_AT_ONCE = 64  # attention: 64 distance maps of 208 x 336 cells are 18 MB


class Discriminants(NamedTuple):
    """The two losses of a batch (eqs. 10 and 11, before alpha and beta) and what they came from.

    `loss_ld` and `loss_cov` are scalars in the vectors' precision. `counts` [S] int64 is K of each
    scale, `largest` [S] float64 its largest eigenvalue; both without gradient.
    """

    loss_ld: Tensor
    loss_cov: Tensor
    counts: Tensor
    largest: Tensor


def cell_boxes(boxes: Tensor, shape: tuple[int, int], map_hw: tuple[int, int]) -> Tensor:
    """Cells that boxes touch (eq. 1): [K, 4] int64, (x1, y1, x2, y2), first and last inclusive.

    `boxes` [K, 4] are in pixels of the padded input of size `shape`; the stride, shape / map_hw, is
    fractional where a map was rounded up. First cell floor(x1 / stride), last
    ceil(x2 / stride) - 1, clamped to the map; never less than one cell.
    """
    (height, width), (h, w) = shape, map_hw
    edges = boxes.double()
    # Multiply, then divide, in float64: a box edge on a cell border then lands on it exactly.
    edges = edges * edges.new_tensor([w, h, w, h]) / edges.new_tensor([width, height] * 2)
    limit = torch.tensor([w - 1, h - 1], device=boxes.device)
    first = edges[:, :2].floor().long().clamp(min=0).minimum(limit)
    last = (edges[:, 2:].ceil().long() - 1).minimum(limit).maximum(first)
    return torch.cat([first, last], dim=1)


def object_vectors(feat_nchw: Tensor, objects: Objects) -> Tensor:
    """Largest value of every channel inside each object's box (eqs. 1-3): [K, C], with gradient.

    Only cells inside the box compete: neck outputs have no ReLU, so the zeros of a literal mask
    would clip negative channels. float64 features stay float64, all others become float32. K = 0
    gives an empty tensor that is part of the graph. ValueError for an image outside the batch.
    """
    n, _, h, w = feat_nchw.shape
    # The pooling operator does not check indices: a wrong one would read foreign memory.
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
    """Bool mask [N], True for the objects to keep: those whose class has at least two of them.

    One object has no covariance, so its class leaves S_w, S_t and G altogether.
    """
    _, which, counts = labels.unique(return_inverse=True, return_counts=True)
    return counts[which] >= 2


def stacked_vectors(
    batches: Iterable[tuple[Sequence[Tensor], Objects]],
) -> tuple[list[Tensor], Tensor]:
    """Object vectors of several batches of (maps NCHW per scale, objects), on the CPU.

    Returns [N, C_s] per scale, and the labels [N].
    """
    rows: list[list[Tensor]] = []
    labels: list[Tensor] = []
    for maps, objects in batches:
        rows.append([object_vectors(feat_nchw, objects).cpu() for feat_nchw in maps])
        labels.append(objects.labels.cpu())
    return [torch.cat(scale) for scale in zip(*rows, strict=True)], torch.cat(labels)


def scatter(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scatter matrices S_w, S_b, S_t (eqs. 5-8), each [.., C, C] in float64.

    `x` [.., N, C] holds object vectors (any leading dimensions, such as scales), `labels` [N].
    S_w is the mean over classes of X_g^T X_g / (N_g - 1). Eq. 5 as printed lacks the division that
    Dorfer et al. (2016), whom the paper follows, have: no eigenvalue would be positive once N > C.
    ValueError when a class has a single object.
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
    """Eigenvalues of S_b v = lambda (S_w + r I) v (eq. 9), [.., C] ascending, float64.

    r = ridge * tr(S_w) / C + absolute; the relative part follows the features' scale. Solved as the
    symmetric L^-1 S_b L^-T, L being the Cholesky factor, and without eigenvectors: gradients stay
    finite under equal eigenvalues. Where no factor exists (features not finite, or S_w singular and
    r = 0) the result is NaN, which training names and stops at. ValueError for a negative ridge.
    """
    with torch.autocast(S_w.device.type, enabled=False):
        _, whitened, failed = _whiten(S_w.double(), S_b.double(), ridge, absolute)
        sound = whitened.isfinite().all(-1).all(-1) & (failed == 0)
        # eigvalsh raises on NaN, so unsound matrices are taken out before and marked after.
        eigs = torch.linalg.eigvalsh(whitened.where(sound[..., None, None], 0.0))
        return eigs.where(sound[..., None], torch.nan)


def _whiten(
    S_w: Tensor, S_b: Tensor, ridge: float, absolute: float
) -> tuple[Tensor, Tensor, Tensor]:
    """L, L^-1 S_b L^-T and an error flag, with L L^T = S_w + (ridge * tr(S_w) / C + absolute) I."""
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
    """Eigenvectors of the top K eigenvalues of eq. 9, as columns: [C, K] float64, no gradient.

    `x_nc` [N, C] are the vectors of all calibration objects on one scale, `labels` [N]. Columns are
    scaled so that v^T (S_w + r I) v = 1. ValueError as `channel_ratio`.
    """
    x_nc, labels = _two_of_two(x_nc.detach(), labels)
    S_w, S_b, _ = scatter(x_nc, labels)
    L, whitened, failed = _whiten(S_w, S_b, ridge, absolute)
    if int(failed):
        raise ValueError(f"S_w is singular with ridge={ridge}: raise the ridge, e.g. to {RIDGE}")
    eigs, vectors = torch.linalg.eigh(whitened)
    kept = vectors[:, top_k(eigs, labels.unique().numel(), phi)]
    return torch.linalg.solve_triangular(L.mT, kept, upper=True)


def top_k(eigs: Tensor, n_classes: int, phi: float = PHI) -> Tensor:
    """Bool mask [.., C] of the K eigenvalues that count; `mask.sum(-1)` is K.

    `eigs` [.., C] ascending. K = min(#{lambda > phi * max}, n_classes - 1), and an eigenvalue of
    zero or less never counts: sec. 3.1 has at most G - 1 discriminants, and phi alone keeps many
    more when classes are unbalanced. ValueError unless 0 <= phi < 1.
    """
    _check_phi(phi)
    # This drops every lambda <= 0 too: where the maximum is negative, phi * max lies above it.
    K = (eigs > phi * eigs[..., -1:]).sum(-1, keepdim=True)
    C = eigs.shape[-1]
    return torch.arange(C, device=eigs.device) >= C - K.clamp(max=n_classes - 1)


def ld_loss(eigs: Tensor, n_classes: int, phi: float = PHI) -> Tensor:
    """L_LD (eq. 10), a scalar: minus the sum over scales of the mean of the top K eigenvalues.

    `eigs` [S, C] ascending. K is a constant to the gradient; a scale without a positive eigenvalue
    adds a zero that is still part of the graph.
    """
    mask = top_k(eigs, n_classes, phi)
    return -((eigs * mask).sum(-1) / mask.sum(-1).clamp(min=1)).sum()


def covariance_penalty(S_t: Tensor, reduction: str = "mean") -> Tensor:
    """L_cov (eq. 11), a scalar: size of the off-diagonal entries of S_t [S, C, C], over scales.

    "sum" is eq. 11 as printed; "mean" divides it by C (C - 1), for with hundreds of channels the
    sum drowns the detection loss and drives the features to zero. ValueError for other names.
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
    """`discriminants_of` the neck's outputs, one NCHW tensor per scale; each sees every object."""
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
    """Both losses from object vectors, [N, C_s] per scale or one tensor [S, N, C] (eqs. 4-11).

    `memory`, the vectors of earlier batches, is appended without gradient before classes with one
    object are dropped. Scales of equal width are solved in one call. With fewer than two classes
    both losses are zeros that are still part of the graph, so that every process of a distributed
    run has the same backward pass. ValueError for a memory of other widths, or a wrong option.
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
    """Discriminating power of each channel alone, (S_b)_cc / (S_w)_cc: [C] float64, at least 0.

    `x_nc` [N, C] are the vectors of all calibration objects on one scale, `labels` [N]. Where the
    covariance penalty has made S_w and S_b diagonal, these are the eigenvalues of eq. 9. Dormant
    channels get 0. ValueError with fewer than two classes of at least two objects.
    """
    S_w, S_b, _ = scatter(*_two_of_two(x_nc, labels))
    within, between = S_w.diagonal(), S_b.diagonal()
    floor = 1e-9 * within.mean() + torch.finfo(within.dtype).tiny
    return between.clamp(min=0) / within.maximum(floor)


def _two_of_two(x_nc: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Objects of the classes that have two or more; ValueError with fewer than two such classes."""
    keep = drop_singletons(labels)
    if labels[keep].unique().numel() < 2:
        raise ValueError(
            f"classes {labels.unique().tolist()} do not make two of two objects: use more images"
        )
    return x_nc[keep], labels[keep]


def discriminative_channels(ratio: Tensor, phi: float, at_least: int) -> Tensor:
    """Bool mask [C] of the channels whose `channel_ratio` [C] exceeds phi times the largest.

    At least the `at_least` best are chosen (G - 1, the number of discriminants of sec. 3.1).
    ValueError unless 0 <= phi < 1.
    """
    _check_phi(phi)
    mask = ratio > phi * ratio.max()
    mask[ratio.topk(min(at_least, ratio.numel())).indices] = True
    return mask


def discriminant_share(eigs: Tensor, k: int) -> Tensor:
    """Share of the discriminating power held by the `k` largest of `eigs` [.., C]: [..], in [0, 1].

    The power is the sum of the positive eigenvalues; the share is 0 where there is none.
    """
    power = eigs.clamp(min=0).sort(descending=True).values
    return power[..., :k].sum(-1) / power.sum(-1).clamp(min=torch.finfo(power.dtype).tiny)


def mean_abs_correlation(x_nc: Tensor) -> Tensor:
    """Mean |correlation| of distinct channels of the vectors `x_nc` [N, C]: a float64 scalar.

    Dormant channels, whose spread is below a millionth of their size (float32 rounding), are left
    out; with fewer than two others the result is 0.
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
    """Attention of each cell of a map (eq. 15): [n_images, h, w] float32, in [0, 1].

    1 in the cells of an object's box; outside min(1, a * d2^-b), with d2 the squared distance, in
    cells of this map, from the cell's centre (column + 0.5, row + 0.5) to the box centre divided by
    the stride. A cell takes the largest value over the objects of its image; an image without
    objects gets zeros. ValueError unless a > 0 and b > 0, for only then does attention decay.
    """
    if a <= 0 or b <= 0:
        raise ValueError(
            f"a={a} and b={b} must be positive; the paper has a={ATTENTION_A}, b={ATTENTION_B}"
        )
    # Attention falls with distance, so the largest one is that of the smallest distance.
    d2_nhw = torch.full((n_images, *map_hw), torch.inf, device=objects.boxes.device)
    for image, d2_hw in enumerate(d2_nhw):
        for boxes in objects.boxes[objects.image == image].split(OBJECTS_AT_ONCE):
            d2_khw = _squared_distances(boxes, objects.shape, map_hw)
            d2_hw.copy_(torch.cat([d2_hw[None], d2_khw]).amin(0))  # d2_khw may be empty
    return (a * d2_nhw.pow(-b)).clamp(max=1)


def _squared_distances(boxes: Tensor, shape: tuple[int, int], map_hw: tuple[int, int]) -> Tensor:
    """Squared distances of cells to box centres, in cells, 0 inside the boxes: [K, h, w]."""
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
    """Vectors and labels followed by the detached ones of earlier batches."""
    old_vectors, old_labels = memory
    widths, old = [v.shape[1] for v in vectors], [v.shape[1] for v in old_vectors]
    if widths != old:
        raise ValueError(
            f"the memory holds vectors of widths {old}, the neck now gives {widths}: clear the "
            "memory when the neck changes"
        )
    both = [torch.cat([v, m.detach().to(v)]) for v, m in zip(vectors, old_vectors, strict=True)]
    return both, torch.cat([labels, old_labels.to(labels)])


def _check_phi(phi: float) -> None:
    if not 0 <= phi < 1:
        raise ValueError(f"phi={phi} must be in [0, 1); the paper has phi={PHI}")
