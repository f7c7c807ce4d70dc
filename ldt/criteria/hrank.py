"""HRank: the average rank of a channel's feature map (Lin et al., CVPR 2020)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from ldt.config.values import Count, Share, checked
from ldt.criteria.base import Batch, Criterion, NoScoresError, Target, visit_maps
from ldt.pruning.graph import PruningGraph


class HRankCriterion(Criterion):
    """Channel importance = mean rank of its feature map after the activation, over images.

    There are two deviations from the paper, because nearly every feature map of a detector (25x42
    positions and more) has full rank, so that all channels would tie. First, the rank is that of
    the map pooled to at most ``size`` x ``size``, counting singular values above ``tolerance`` of
    the largest. Second, equal ranks are ordered by the nuclear norm, whose contribution to the
    score is smaller than the difference between any two ranks. ``notes["tied_channels"]`` is the
    share of channels that have the same rank as another channel of their layer. The paper uses 640
    images.

    Args:
        size: larger maps are average-pooled to this height and width.
        tolerance: share of the largest singular value above which a singular value counts.

    Raises:
        ValueError: a value is not allowed; the message names its key.
    """

    @checked("method.criterion")
    def __init__(self, size: Count = 14, tolerance: Share = 1e-2) -> None:
        self.size, self.tolerance = size, tolerance
        self._scores: dict[nn.Module, Tensor] = {}

    def channel_scores(self, layer: nn.Module) -> Tensor:
        """Return the mean rank, plus a smaller term for the nuclear norm."""
        if layer not in self._scores:
            raise NoScoresError("its channels are no feature maps, which HRank ranks")
        return self._scores[layer]

    def collect(self, target: Target, graph: PruningGraph, batches: Iterable[Batch]) -> None:
        """Sum ranks and nuclear norms over all images and calls."""
        ranks: dict[nn.Module, Tensor] = {}
        norms: dict[nn.Module, Tensor] = {}
        maps: dict[nn.Module, int] = {}

        def add(layer: nn.Module, x: Tensor, located: bool) -> None:
            if not located:  # the rank of a column tells nothing
                return
            sides = min(x.shape[2], self.size), min(x.shape[3], self.size)
            values = torch.linalg.svdvals(adaptive_avg_pool2d(x.float(), sides))
            rank = (values > self.tolerance * values[..., :1]).sum(-1)
            ranks[layer] = ranks.get(layer, 0) + rank.sum(0).cpu()
            norms[layer] = norms.get(layer, 0) + values.double().sum((0, 2)).cpu()
            maps[layer] = maps.get(layer, 0) + len(x)

        visit_maps(graph, batches, add)
        tied = channels = 0
        for layer, summed in ranks.items():
            share = norms[layer] / norms[layer].max().clamp(min=torch.finfo(torch.double).tiny)
            self._scores[layer] = (summed + share / 2) / maps[layer]
            _, counts = summed.unique(return_counts=True)
            tied += int(counts[counts > 1].sum())
            channels += len(summed)
        self.notes = {"tied_channels": tied / channels}
