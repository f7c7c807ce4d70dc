"""Eqs. 13-16 as the paper prints them: image by image, scale by scale, position by position."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import reference
import scipy.linalg
import torch
from small import Batch, SmallTarget
from torch import Tensor, nn

from ldt.objects import Objects
from ldt.pruning.layer_types import CONVOLUTIONS, NORMS

Traced = list[tuple[np.ndarray, np.ndarray]]  # F and dF'/dF, both [C, h, w], of each call


def points(model: nn.Module) -> dict[str, nn.Module]:
    """The module whose output is F^(l): the norm behind a convolution in its Sequential, or it."""
    found: dict[str, nn.Module] = {}
    for prefix, parent in model.named_modules():
        for (name, child), (_, after) in pairwise([*parent.named_children(), ("", None)]):
            if isinstance(child, CONVOLUTIONS):
                norm = after if isinstance(after, NORMS) else None
                found[f"{prefix}.{name}"] = norm or child
    return found


def single_images(batches: Sequence[Batch]) -> list[Batch]:
    """One batch per image."""
    found = []
    for batch in batches:
        for d, image in enumerate(batch.images):
            own = batch.objects.image == d
            boxes, labels = batch.objects.boxes[own], batch.objects.labels[own]
            at = torch.zeros(len(boxes), dtype=torch.long)
            found.append(Batch(image[None], Objects(boxes, labels, at, batch.objects.shape)))
    return found


def discriminative(target: SmallTarget, batches: Sequence[Batch], phi: float) -> list[np.ndarray]:
    """D_s of every scale: channels whose (S_b)_cc / (S_w)_cc exceeds phi times the largest."""
    chosen = []
    for X, labels in _vectors(target, batches):
        S_w, S_b, _ = reference.scatter(X, labels)
        within, between = np.diag(S_w), np.diag(S_b).clip(0)
        ratio = np.array([b / w if w > 0 else 0 for b, w in zip(between, within, strict=True)])
        best = np.argsort(-ratio)[: len(np.unique(labels)) - 1].tolist()
        assert ratio[best].min() > 0, "objects that no channel tells apart leave D_s to chance"
        above = {c for c in range(len(ratio)) if ratio[c] > phi * ratio.max()}
        chosen.append(np.array(sorted({*best, *above})))
    return chosen


def directions(
    target: SmallTarget, batches: Sequence[Batch], phi: float, ridge: float
) -> list[np.ndarray]:
    """Eigenvectors of the top K eigenvalues of every scale, [C, K]."""
    found = []
    for X, labels in _vectors(target, batches):
        S_w, S_b, _ = reference.scatter(X, labels)
        r = ridge * np.trace(S_w) / len(S_w) + 1e-6
        eigs, W = scipy.linalg.eigh(S_b, S_w + r * np.eye(len(S_w)))
        K = min(int((eigs > phi * eigs.max()).sum()), len(np.unique(labels)) - 1)
        found.append(W[:, -K:])
    return found


def _vectors(target: SmallTarget, batches: Sequence[Batch]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Object vectors and labels of every scale; classes with one object are dropped."""
    rows: list[list[np.ndarray]] = []
    labels = []
    for one in single_images(batches):
        with torch.no_grad():
            maps = [f.double().numpy() for f in target.features(one)]
        boxes, image = one.objects.boxes.numpy(), one.objects.image.numpy()
        rows.append([reference.object_vectors(f, boxes, image, one.objects.shape) for f in maps])
        labels.append(one.objects.labels.numpy())
    y = np.concatenate(labels)
    several = np.array([np.sum(y == g) >= 2 for g in y], dtype=bool)
    return [(np.concatenate(s)[several], y[several]) for s in zip(*rows, strict=True)]


def power(maps: Sequence[Tensor], objects: Objects, phi: float, ridge: float) -> Tensor:
    """Eqs. 1-10 with autograd: the mean of the top K eigenvalues of every scale, summed."""
    total = maps[0].new_zeros(())
    for F in maps:
        rows = []
        for box, d in zip(objects.boxes.numpy(), objects.image.tolist(), strict=True):
            M = torch.as_tensor(reference.mask(box, objects.shape, tuple(F.shape[2:])))
            rows.append(torch.stack([F[d, c][M].max() for c in range(F.shape[1])]))
        y = objects.labels
        several = torch.tensor([int((y == g).sum()) >= 2 for g in y])
        X, y = torch.stack(rows)[several], y[several]
        classes = y.unique()
        S_w = torch.stack([torch.cov(X[y == g].T) for g in classes]).mean(0)
        S_b = torch.cov(X.T) - S_w
        r = ridge * S_w.trace() / len(S_w) + 1e-6
        eigs = torch.linalg.eigvals(torch.linalg.inv(S_w + r * torch.eye(len(S_w))) @ S_b).real
        top = eigs.sort(descending=True).values[: len(classes) - 1]
        total = total + top[(top > 0) & (top > phi * eigs.max())].mean()
    return total


def trace(
    target: SmallTarget, one: Batch, source: str, chosen: Any, image: int = 0
) -> dict[str, Traced]:
    """F and dF'/dF of every layer that F' depends on, for one image of a batch."""
    calls: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            calls.append((name, output))
            return output * 1  # what follows may work in place

        return hook

    hooks = [m.register_forward_hook(keep(n)) for n, m in points(target.model).items()]
    zs = _scalars(target, one, source, chosen)
    for hook in hooks:
        hook.remove()
    found: dict[str, Traced] = {}
    for name, F in calls:
        total = np.zeros(tuple(F.shape[1:]))
        reached = False
        for z_s in zs:  # the sum over scales of eq. 13
            (gradient,) = torch.autograd.grad(z_s, F, retain_graph=True, allow_unused=True)
            if gradient is not None:
                reached = True
                total += gradient[image].double().numpy()
        if reached:
            found.setdefault(name, []).append((F[image].detach().double().numpy(), total))
    return found


def _scalars(target: SmallTarget, one: Batch, source: str, chosen: Any) -> list[Tensor]:
    """F'_neck,s of every scale."""
    if source == "detection":
        return [target.detection_loss(one)]
    maps = target.features(one)
    if source == "power":
        return [power(maps, one.objects, *chosen)]
    if source == "neck_all":
        return [f.sum() for f in maps]
    if source == "neck_energy":
        return [(f**2).sum() / 2 for f in maps]
    if source == "neck":
        return [f[:, channels].sum() for f, channels in zip(maps, chosen, strict=True)]
    assert source == "discriminant"
    pairs = zip(maps, chosen, strict=True)
    return [((f.double().mT.transpose(1, 3) @ torch.as_tensor(W)) ** 2).sum() / 2 for f, W in pairs]


def image_score(calls: Traced, M_of: Any, reduce: str) -> np.ndarray:
    """The inner sums of eq. 16 for one image, [C]; a shared layer sums over its calls."""
    score = np.zeros(len(calls[0][0]))
    for F, gradient in calls:
        h, w = F.shape[1:]
        M = M_of((h, w))
        u = np.zeros(len(F))
        for i in range(h):
            for j in range(w):
                u += gradient[:, i, j] / (h * w)  # eq. 13
        for i in range(h):
            for j in range(w):
                slope = gradient[:, i, j] if reduce.startswith("position") else u
                term = M[i, j] * slope * F[:, i, j]  # eq. 14 within eq. 16
                both = reduce in ("sum_absolute", "position_absolute")
                score += np.abs(term) if both else term
    return score if reduce == "signed" else np.abs(score)


def scores(
    target: SmallTarget,
    batches: Sequence[Batch],
    *,
    source: str,
    reduce: str,
    location: bool,
    phi: float = 5e-3,
    ridge: float = 0.1,
    a: float = 1.2,
    b: float = 0.062,
) -> dict[str, np.ndarray]:
    """I_c of eq. 16 for every layer, the mean over the images that count."""
    chosen = None
    if source == "neck":
        chosen = discriminative(target, batches, phi)
    elif source == "discriminant":
        chosen = directions(target, batches, phi, ridge)
    total: dict[str, np.ndarray] = {}
    used = 0
    for one in single_images(batches):
        boxes, image, shape = (
            one.objects.boxes.numpy(),
            one.objects.image.numpy(),
            one.objects.shape,
        )
        if location and not len(boxes):
            continue
        used += 1

        def M_of(size: tuple[int, int], boxes: Any = boxes, image: Any = image, shape: Any = shape):
            if not location:
                return np.ones(size)
            return reference.attention(boxes, image, shape, size, 1, a, b)[0]

        for name, calls in trace(target, one, source, chosen).items():
            total[name] = total.get(name, 0) + image_score(calls, M_of, reduce)
    return {name: value / used for name, value in total.items()}
