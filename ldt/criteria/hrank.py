"""HRank: the average rank of a channel's feature map (Lin et al., CVPR 2020)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from ldt.config.values import Count, Share, checked
from ldt.criteria.base import Criterion, Target, visit_maps
from ldt.pruning.graph import PruningGraph


class HRankCriterion(Criterion):
    """A channel is worth the mean rank, over images, of its map behind the activation.

    Two deviations, because nearly every map of a detector (25x42 positions and more) has full rank
    and a criterion that ties all channels chooses none: the rank is that of the map pooled to at
    most ``size`` x ``size``, counting singular values above ``tolerance`` of the largest; and equal
    ranks are ordered by the nuclear norm, whose part of the score is smaller than any difference
    between two ranks. ``notes["tied_channels"]`` is the share of channels whose rank another
    channel of their layer has too. The original ranks 640 images.

    Args:
        size: sides, in cells, above which a map is average-pooled.
        tolerance: share of the largest singular value that still counts.

    Raises:
        ValueError: a value outside of what is allowed, naming its key.
    """

    @checked("method.criterion")
    def __init__(self, size: Count = 14, tolerance: Share = 1e-2) -> None:
        self.size, self.tolerance = size, tolerance
        self._scores: dict[nn.Module, Tensor] = {}

    def channel_scores(self, layer: nn.Module) -> Tensor:
        """Mean rank, and less than the smallest difference of two for the nuclear norm."""
        return self._scores[layer]

    def collect(self, target: Target, graph: PruningGraph, batches: Iterable[Any]) -> None:
        """Sum up ranks and nuclear norms over all images and calls."""
        ranks: dict[nn.Module, Tensor] = {}
        norms: dict[nn.Module, Tensor] = {}
        maps: dict[nn.Module, int] = {}

        def receive(layer: nn.Module, x: Tensor) -> None:
            sides = min(x.shape[2], self.size), min(x.shape[3], self.size)
            values = torch.linalg.svdvals(adaptive_avg_pool2d(x.float(), sides))
            rank = (values > self.tolerance * values[..., :1]).sum(-1)
            ranks[layer] = ranks.get(layer, 0) + rank.sum(0).cpu()
            norms[layer] = norms.get(layer, 0) + values.double().sum((0, 2)).cpu()
            maps[layer] = maps.get(layer, 0) + len(x)

        visit_maps(graph, batches, receive)
        tied = channels = 0
        for layer, summed in ranks.items():
            share = norms[layer] / norms[layer].max().clamp(min=torch.finfo(torch.double).tiny)
            self._scores[layer] = (summed + share / 2) / maps[layer]
            _, counts = summed.unique(return_counts=True)
            tied += int(counts[counts > 1].sum())
            channels += len(summed)
        self.notes = {"tied_channels": tied / channels}
