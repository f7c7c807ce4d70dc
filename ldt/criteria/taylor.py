"""Taylor expansions of the loss in the weights of coupled channels, of first and second order."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ldt.criteria.base import Batch, GroupCriterion, Target
from ldt.pruning.coupled_groups import CoupledGroup, Member
from ldt.pruning.graph import PruningGraph
from ldt.pruning.layer_types import width_of

Values = Mapping[nn.Parameter, Tensor]  # per parameter, a value of each of its entries


class TaylorCriterion(GroupCriterion):
    """Channel importance = estimated change of the loss by removal (Molchanov et al., CVPR 2019).

    The score is |sum theta dL/dtheta| over all parameters that go with the channel: filters and
    biases of the layers that produce it, weights of those that consume it, weights and biases of
    norms in between. L is the mean detection loss over the calibration images.
    """

    def collect(self, target: Target, graph: PruningGraph, batches: Iterable[Batch]) -> None:
        """Accumulate the gradient of the loss over all images."""
        images = 0
        for batch in batches:
            (target.detection_loss(batch) * len(batch.images)).backward()
            images += len(batch.images)
        values = {
            p: p.detach().double() * p.grad.double() / images
            for p in target.model.parameters()
            if p.grad is not None
        }
        target.model.zero_grad(set_to_none=True)
        self.scores = {
            group.members[0].layer: sum_per_channel(group, values).abs()
            for group in graph.groups.values()
        }


class OBDCriterion(GroupCriterion):
    """Channel importance = estimated change of the loss by removal (LeCun et al., NeurIPS 1989).

    The score is the sum of theta^2 E[(dL/dtheta)^2] over the parameters that go with the channel,
    as for :class:`TaylorCriterion`: the second-order term of the loss with the empirical Fisher
    information as its diagonal Hessian. L is the detection loss of a single image, and E the mean
    over the calibration images.
    """

    def collect(self, target: Target, graph: PruningGraph, batches: Iterable[Batch]) -> None:
        """Accumulate the squared gradients of every image."""
        squares: dict[nn.Parameter, Tensor] = {}
        images = 0
        for batch in batches:
            for index in range(len(batch.images)):
                target.detection_loss(batch.of_image(index)).backward()
                for p in target.model.parameters():
                    if p.grad is not None:
                        squares[p] = squares.get(p, 0) + p.grad.double().square()
                target.model.zero_grad(set_to_none=True)
                images += 1
        values = {p: p.detach().double().square() * s / images for p, s in squares.items()}
        self.scores = {
            group.members[0].layer: sum_per_channel(group, values)
            for group in graph.groups.values()
        }


def sum_per_channel(group: CoupledGroup, values: Values) -> Tensor:
    """Sum values of the parameters that go with each channel of a group: [channels], float64.

    Args:
        group: the coupled channels.
        values: of the model's parameters; those of missing ones are 0.
    """
    total = torch.zeros(group.size, dtype=torch.float64)
    for member in group.members:
        for parameter in member.layer.parameters(recurse=False):
            if parameter in values:
                own = _per_channel(member, values[parameter])
                if own is not None:
                    total.index_add_(0, torch.as_tensor(member.roots), own[member.channels].cpu())
    return total


def _per_channel(member: Member, values: Tensor) -> Tensor | None:
    """Sum values of a parameter over each channel of a side; None if all channels share it."""
    layer = member.layer
    if isinstance(layer, nn.ConvTranspose2d) and values.ndim > 1:
        values = values.transpose(0, 1)
    if member.side == "in":
        if values.ndim == 1:
            return None  # the bias of a consumer
        groups = width_of(layer, "in") // values.shape[1]
        values = values.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    if len(values) <= member.channels.max():
        return None  # such as the slope of a PReLU
    return values.reshape(len(values), -1).sum(1)
