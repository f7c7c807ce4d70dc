"""CHIP: channel independence (Sui et al., NeurIPS 2021)."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ldt.config.values import checked
from ldt.criteria.base import Batch, Criterion, Target, visit_maps
from ldt.pruning.graph import PruningGraph

STEP, REACH = 0.25, 35.0  # of the quadrature in log t; errors exp(-pi^2/STEP) and exp(-REACH)


class CHIPCriterion(Criterion):
    """Channel importance = decrease in nuclear norm when the channel is zeroed.

    With the channels of one image's feature map as rows of X, CI_c = ||X||_* - ||X with row c
    zeroed||_*, averaged over images. A low value means that the channel depends linearly on the
    others. X is the output of the layer's activation. Only one Gram matrix is in memory at a time,
    and no feature maps. The paper uses 640 images.

    Args:
        normalise: divide by the layer's mean ||X||_*, which makes layers comparable. The paper
            ranks each layer separately, where this changes nothing.
    """

    @checked("method.criterion")
    def __init__(self, normalise: bool = True) -> None:
        self.normalise = normalise
        self._scores: dict[nn.Module, Tensor] = {}

    def channel_scores(self, layer: nn.Module) -> Tensor:
        """Return the mean channel independence of every channel."""
        return self._scores[layer]

    def collect(self, target: Target, graph: PruningGraph, batches: Iterable[Batch]) -> None:
        """Average the channel independence over images; sum it over calls of a shared layer."""
        sums: dict[nn.Module, Tensor] = {}
        norms: dict[nn.Module, Tensor] = {}

        def add(layer: nn.Module, x: Tensor, _located: bool) -> None:
            for rows in x.flatten(2):
                independence, norm = channel_independence(rows)
                sums[layer] = sums.get(layer, 0) + independence
                norms[layer] = norms.get(layer, 0) + norm

        images = visit_maps(graph, batches, add)
        self._scores = {}
        for layer, summed in sums.items():
            tiny = torch.finfo(torch.double).tiny
            divisor = norms[layer].clamp(min=tiny) if self.normalise else images
            self._scores[layer] = summed / divisor


def channel_independence(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Compute CI_c = ||X||_* - ||X with row c zeroed||_* of all channels by one decomposition.

    The singular values of X are the roots of the eigenvalues of its Gram matrix G = X X^T, and
    zeroing a row of X removes a row and a column of G. For a positive semidefinite A,
    tr(A^(1/2)) = 2/pi int_0^inf tr(A (A + t^2)^-1) dt, and by the derivative of
    log det(A_c + s) = log det(A + s) + log [(A + s)^-1]_cc the minor A_c is expressed by A:

        CI_c = 2/pi int_0^inf [A (A + t^2)^-2]_cc / [(A + t^2)^-1]_cc dt.

    The integrand lies between 0 and 1 and is analytic in log t, where the trapezoid rule converges
    exponentially. All channels together take O(C^3) operations, an SVD for each one O(C^4).

    Args:
        x: one image's feature map, [C, positions].

    Returns:
        CI, [C], and ||X||_*, a scalar; both float64.
    """
    x = x.double()
    channels, positions = x.shape
    if positions < channels:  # the smaller Gram matrix has the same positive eigenvalues
        values, vectors = torch.linalg.eigh(x.T @ x)
        shares = (x @ vectors).square()  # lambda_k V_ck^2
    else:
        values, vectors = torch.linalg.eigh(x @ x.T)
        shares = vectors.square() * values
    kept = values > values[-1].clamp(min=0) * max(x.shape) * torch.finfo(x.dtype).eps
    values, shares = values[kept], shares[:, kept]
    if not len(values):
        return x.new_zeros(channels), x.new_zeros(())
    shares = shares / values  # V_ck^2
    null = (1 - shares.sum(1, keepdim=True)).clamp(min=0)
    if len(values) == channels:
        null = torch.zeros_like(null)  # full rank: the rest is rounding error
    t = values[-1].sqrt() * torch.arange(-REACH, REACH, STEP, device=x.device).double().exp()
    shifted = 1 / (values[:, None] + t.square())
    above = shares @ (values[:, None] * shifted.square())
    below = shares @ shifted + null / t.square()
    return (2 / math.pi * STEP) * (above / below) @ t, values.sqrt().sum()
