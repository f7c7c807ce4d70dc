"""Eqs. 1-11 and 15 as the paper prints them: numpy, loops, no shortcut. Slow on purpose."""

from fractions import Fraction

import numpy as np
import scipy.linalg


def mask(box, shape, map_hw):
    """Eq. 1: M_ij = 1 where cell (i, j) and the box overlap; without any, the nearest cell."""
    inside = [_touched(box[1], box[3], shape[0], map_hw[0])]
    inside += [_touched(box[0], box[2], shape[1], map_hw[1])]
    return np.outer(*inside).astype(bool)


def _touched(low, high, pixels, n_cells):
    stride = Fraction(pixels, n_cells)
    low, high = Fraction(float(low)), Fraction(float(high))
    touched = np.zeros(n_cells)
    for i in range(n_cells):
        touched[i] = i * stride < high and (i + 1) * stride > low
    if not touched.any():
        touched[min(max(int(low // stride), 0), n_cells - 1)] = 1
    return touched


def object_vectors(feat_nchw, boxes, image, shape):
    """Eqs. 2-3: v_n = the largest F over the cells where M = 1, channel by channel."""
    vectors = np.zeros((len(boxes), feat_nchw.shape[1]))
    for n, box in enumerate(boxes):
        M = mask(box, shape, feat_nchw.shape[2:])
        for c in range(feat_nchw.shape[1]):
            cells = [feat_nchw[image[n], c, i, j] for i, j in np.argwhere(M)]
            vectors[n, c] = max(cells)
    return vectors


def centred(X):
    """Eq. 8: (I - 1 1^T / N) X."""
    N = len(X)
    return (np.eye(N) - np.ones((N, 1)) @ np.ones((1, N)) / N) @ X


def scatter(X, labels):
    """Eqs. 5-7, with the covariance of each class in eq. 5 (Dorfer et al., 2016)."""
    classes = np.unique(labels)
    S_w = np.zeros((X.shape[1], X.shape[1]))
    for g in classes:
        X_g = centred(X[labels == g])
        S_w += X_g.T @ X_g / (len(X_g) - 1) / len(classes)
    S_t = centred(X).T @ centred(X) / (len(X) - 1)
    return S_w, S_t - S_w, S_t


def eigenvalues(S_w, S_b, ridge, absolute):
    """Eq. 9 by a general-purpose solver, with S_w + r I for S_w."""
    C = len(S_w)
    r = ridge * np.trace(S_w) / C + absolute
    return scipy.linalg.eigh(S_b, S_w + r * np.eye(C), eigvals_only=True)


def losses(X_per_scale, labels, phi, ridge, absolute, reduction):
    """Eqs. 10 and 11, summed over scales, and K of each scale."""
    several = np.array([np.sum(labels == g) >= 2 for g in labels], dtype=bool)
    labels = labels[several]
    G = len(np.unique(labels))
    loss_ld, loss_cov, counts = 0.0, 0.0, []
    for X in X_per_scale:
        S_w, S_b, S_t = scatter(X[several], labels)
        eigs = sorted(eigenvalues(S_w, S_b, ridge, absolute), reverse=True)
        top = [e for e in eigs if e > 0 and e > phi * eigs[0]][: G - 1]
        loss_ld -= sum(top) / max(len(top), 1)
        counts.append(len(top))
        off_diagonal = np.abs(S_t - np.diag(np.diag(S_t))).sum()
        C = len(S_t)
        loss_cov += off_diagonal / (C * (C - 1)) if reduction == "mean" else off_diagonal
    return loss_ld, loss_cov, counts


def attention(boxes, image, shape, map_hw, n_images, a, b):
    """Eq. 15, cell by cell; the largest value over the objects of the cell's image."""
    M = np.zeros((n_images, *map_hw))
    strides = shape[0] / map_hw[0], shape[1] / map_hw[1]
    for n, box in enumerate(boxes):
        inside = mask(box, shape, map_hw)
        y_n, x_n = (box[1] + box[3]) / 2 / strides[0], (box[0] + box[2]) / 2 / strides[1]
        for i in range(map_hw[0]):
            for j in range(map_hw[1]):
                d2 = (i + 0.5 - y_n) ** 2 + (j + 0.5 - x_n) ** 2
                value = 1.0 if inside[i, j] else min(1.0, a * d2**-b)
                M[image[n], i, j] = max(M[image[n], i, j], value)
    return M
