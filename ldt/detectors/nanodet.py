"""The parts of NanoDet-g (RangiLyu, 2021): plain convolutions and a head of GFL, 3.8 M parameters.

A cross-stage-partial backbone, path aggregation that adds maps of one width, and a head with a
tower for each scale. ``conf/detector/nanodet_g.yaml`` puts them into mmdet's GFL.
"""

from collections.abc import Sequence

import torch
from mmcv.cnn import ConvModule
from mmdet.models.dense_heads import GFLHead
from mmdet.models.utils import multi_apply
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.functional import interpolate

LEAKY_RELU = {"type": "LeakyReLU", "negative_slope": 0.1}


def _convolution(ins: int, outs: int, stride: int = 1) -> ConvModule:
    """Convolution 3x3, batch normalisation, leaky ReLU."""
    norm = {"type": "BN"}
    return ConvModule(ins, outs, 3, stride, padding=1, norm_cfg=norm, act_cfg=LEAKY_RELU)


class _Pair(nn.Module):
    """Two convolutions to half of the width, the outputs of both concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _convolution(width, width // 2)
        self.second = _convolution(width // 2, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        half = self.first(x)
        return torch.cat([self.second(half), half], 1)


class _Stage(nn.Module):
    """A convolution, and its output beside what pairs and a last convolution make of it."""

    def __init__(self, ins: int, width: int, pairs: int, stride: int) -> None:
        super().__init__()
        self.entry = _convolution(ins, width, stride)
        self.pairs = nn.Sequential(*(_Pair(width) for _ in range(pairs)))
        self.exit = _convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        return torch.cat([self.exit(self.pairs(x)), x], 1)


@MODELS.register_module()
class NanoDetBackbone(BaseModule):
    """Four cross-stage-partial stages of strides 4, 8, 16 and 32.

    Args:
        stem: channels of the first convolution, of stride 2; max pooling of stride 2 follows.
        widths: of the stages, which output twice as many channels.
        pairs: of convolutions in each stage.
        out_indices: the stages whose maps are the output.
        init_cfg: mmengine's.
    """

    def __init__(
        self,
        stem: int = 32,
        widths: Sequence[int] = (32, 64, 128, 256),
        pairs: Sequence[int] = (1, 2, 2, 3),
        out_indices: Sequence[int] = (1, 2, 3),
        init_cfg: dict | None = None,
    ) -> None:
        leaky = {"a": LEAKY_RELU["negative_slope"], "nonlinearity": "leaky_relu"}
        super().__init__(init_cfg or {"type": "Kaiming", "layer": "Conv2d", **leaky})
        self.out_indices = tuple(out_indices)
        self.stem, self.pool = _convolution(3, stem, 2), nn.MaxPool2d(3, 2, 1)
        ins = [stem, *(2 * width for width in widths)]
        self.stages = nn.ModuleList(
            _Stage(ins[i], widths[i], pairs[i], stride=2 if i else 1) for i in range(len(widths))
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of images [N, 3, H, W]."""
        x = self.pool(self.stem(images))
        maps = [x := stage(x) for stage in self.stages]
        return tuple(maps[i] for i in self.out_indices)


@MODELS.register_module()
class NanoDetPAN(BaseModule):
    """Path aggregation (1803.01534) without convolutions behind the additions.

    Args:
        in_channels: of the backbone's maps.
        out_channels: of all maps of the output.
        init_cfg: mmengine's.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, init_cfg: dict | None = None
    ) -> None:
        xavier = {"type": "Xavier", "layer": "Conv2d", "distribution": "uniform"}
        super().__init__(init_cfg or xavier)
        self.laterals = nn.ModuleList(
            ConvModule(ins, out_channels, 1, act_cfg=None) for ins in in_channels
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return as many maps of the same sizes."""
        sums = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        scales = range(len(sums))
        for onto, add in [(i - 1, i) for i in scales[:0:-1]] + [(i, i - 1) for i in scales[1:]]:
            size = sums[onto].shape[2:]
            sums[onto] = sums[onto] + interpolate(sums[add], size, mode="bilinear")
        return tuple(sums)


@MODELS.register_module()
class NanoDetHead(GFLHead):
    """GFL's head with its own convolutions on each scale, which classes and boxes share."""

    def _init_layers(self) -> None:
        ins = [self.in_channels, *[self.feat_channels] * (self.stacked_convs - 1)]
        each = [
            nn.Sequential(*(_convolution(n, self.feat_channels) for n in ins)) for _ in self._scales
        ]
        self.towers = nn.ModuleList(each)
        self.gfl_cls, self.gfl_reg = (
            nn.ModuleList(nn.Conv2d(self.feat_channels, outs, 1) for _ in self._scales)
            for outs in (self.cls_out_channels, 4 * (self.reg_max + 1))
        )

    @property
    def _scales(self) -> range:
        return range(self.prior_generator.num_levels)

    def forward(self, x: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the class scores and the distributions of the four distances, by scale."""

        def predict(
            x: Tensor, tower: nn.Module, classes: nn.Module, boxes: nn.Module
        ) -> tuple[Tensor, Tensor]:
            x = tower(x)
            return classes(x), boxes(x).float()

        scores, distances = multi_apply(predict, x, self.towers, self.gfl_cls, self.gfl_reg)
        return scores, distances
