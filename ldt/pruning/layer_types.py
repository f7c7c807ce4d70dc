"""The kinds of layers that pruning tells apart."""

from typing import Any

from mmcv.cnn.bricks import HSwish, Swish
from torch import nn
from torch.nn.modules import activation

from ldt.pruning.dependency import DEFORMABLE

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
STATISTICS = (nn.GroupNorm, nn.LayerNorm)
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, *DEFORMABLE)
ACTIVATIONS = (
    activation.ReLU, activation.ReLU6, activation.LeakyReLU, activation.PReLU, activation.ELU,
    activation.SiLU, activation.Mish, activation.GELU, activation.Hardswish, Swish, HSwish,
)  # fmt: skip


def width_of(layer: Any, side: str) -> int:
    """Channels on a side of a layer."""
    names = ("in_channels", "in_features") if side == "in" else ("out_channels", "out_features")
    found = (getattr(layer, name, None) for name in names)
    return next((width for width in found if width), 0) or layer.num_channels
