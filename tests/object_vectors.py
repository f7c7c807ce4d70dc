"""Objects, feature maps and object vectors for tests of the paper's equations."""

import numpy as np
import torch

from ldt.objects import Objects

SHAPE = (96, 130)  # 130 is no multiple of 8: the maps below were rounded up, strides are fractional
MAPS = ((12, 17), (6, 9), (3, 5))
LABELS = torch.tensor([7, 0, 3, 0, 7, 3, 3, 0, 7, 0])
FEW = torch.tensor([0, 1, 1, 0])  # N <= C below: S_w is singular


def make_objects(n=14, n_images=3, n_classes=3, seed=0):
    rng = np.random.default_rng(seed)
    start = rng.uniform(-10, (120, 90), (n, 2))
    boxes = np.concatenate([start, start + rng.uniform(1, 60, (n, 2))], axis=1)
    labels = rng.permutation(np.arange(n) % n_classes)
    return Objects(
        torch.tensor(boxes, dtype=torch.float32),
        torch.tensor(labels),
        torch.tensor(rng.integers(0, n_images, n)),
        SHAPE,
    )


def make_features(widths=(6, 6, 6), n_images=3, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n_images, c, h, w, generator=rng, dtype=dtype).requires_grad_()
        for c, (h, w) in zip(widths, MAPS, strict=True)
    ]


def make_vectors(labels, n_channels=5, n_scales=2, seed=0):
    """Gaussian classes with separate means, [S, N, C] float64."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n_scales, len(labels), n_channels, generator=rng, dtype=torch.float64)
    means = torch.randn(n_scales, 100, n_channels, generator=rng, dtype=torch.float64)
    return (x + 2 * means[:, labels]).requires_grad_()


def grad_of(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True)[0]
