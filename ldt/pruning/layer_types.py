"""The layer types that pruning distinguishes."""

from typing import Literal

from mmcv.cnn.bricks import HSwish, Swish
from torch import nn
from torch.nn.modules import activation

from ldt.pruning.dependency import DEFORMABLE

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
STATISTICS = (nn.GroupNorm, nn.LayerNorm)  # compute their statistics over several channels
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, *DEFORMABLE)
ACTIVATIONS = (
    activation.ReLU, activation.ReLU6, activation.LeakyReLU, activation.PReLU, activation.ELU,
    activation.SiLU, activation.Mish, activation.GELU, activation.Hardswish, Swish, HSwish,
)  # fmt: skip

Side = Literal["out", "in", "both"]


def width_of(layer: nn.Module, side: Side) -> int:
    """Return the number of channels on one side of a layer."""
    names = ("in_channels", "in_features") if side == "in" else ("out_channels", "out_features")
    widths = (getattr(layer, name, None) for name in (*names, "num_channels"))
    return next(width for width in widths if width)
