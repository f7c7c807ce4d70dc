"""L_LD by differentiating all eigenvalues of matrices [C, C]: slow, for any number of objects."""

import torch

from ldt.discriminant import covariance_penalty, top_k


def scatter(x, labels):
    """S_w, S_b and S_t of eqs. 5-8, [.., C, C] in float64; every class has two objects or more."""
    x = x.double()
    classes, which, counts = labels.unique(return_inverse=True, return_counts=True)
    members = torch.nn.functional.one_hot(which, len(classes)).double()
    within = x - members @ ((members / counts).mT @ x)
    S_w = within.mT @ (within / (len(classes) * (counts[which] - 1))[:, None])
    total = x - x.mean(-2, keepdim=True)
    S_t = total.mT @ total / (len(labels) - 1)
    return S_w, S_t - S_w, S_t


def eigenvalues(S_w, S_b, ridge, absolute):
    """Eq. 9 with S_w + r I for S_w, ascending, through Cholesky factor and `eigvalsh`."""
    C = S_w.shape[-1]
    r = ridge * S_w.diagonal(dim1=-2, dim2=-1).sum(-1) / C + absolute
    L = torch.linalg.cholesky(S_w + r[..., None, None] * torch.eye(C, dtype=S_w.dtype))
    half = torch.linalg.solve_triangular(L, S_b, upper=False)
    return torch.linalg.eigvalsh(torch.linalg.solve_triangular(L, half.mT, upper=False))


def ld_loss(S_w, S_b, n_classes, phi, ridge, absolute):
    """L_LD (eq. 10), and K of each scale."""
    eigs = eigenvalues(S_w, S_b, ridge, absolute)
    mask = top_k(eigs, n_classes, phi)
    means = (eigs * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return -means.sum(), mask.sum(-1)


def losses(x, labels, phi, ridge, absolute, covariance="mean"):
    """L_LD and L_cov (eqs. 10 and 11) of vectors [S, N, C], and K of each scale."""
    _, which, counts = labels.unique(return_inverse=True, return_counts=True)
    keep = counts[which] >= 2
    x, labels = x[:, keep], labels[keep]
    S_w, S_b, S_t = scatter(x, labels)
    loss, counts = ld_loss(S_w, S_b, len(labels.unique()), phi, ridge, absolute)
    return loss, covariance_penalty(S_t, covariance), counts
