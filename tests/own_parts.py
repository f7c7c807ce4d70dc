"""What a user has of one's own: a registered backbone, and an mmdet config that imports it."""

from typing import Any

from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn

CONFIG = """
custom_imports = dict(imports=["own_parts"], allow_failed_imports=False)
model = dict(
    type="FCOS",
    data_preprocessor=dict(
        type="DetDataPreprocessor", mean=[100, 110, 120], std=[50, 60, 70], pad_size_divisor=32
    ),
    backbone=dict(type="OwnBackbone", widths=(16, 24, 32)),
    neck=dict(type="FPN", in_channels=[16, 24, 32], out_channels=16, num_outs=3),
    bbox_head=dict(
        type="FCOSHead",
        num_classes=80,
        in_channels=16,
        feat_channels=16,
        stacked_convs=1,
        norm_cfg=dict(type="BN"),
        strides=[4, 8, 16],
        regress_ranges=((-1, 32), (32, 64), (64, 1e8)),
    ),
    test_cfg=dict(
        nms_pre=100, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=9
    ),
)
"""


@MODELS.register_module(force=True)
class OwnBackbone(BaseModule):
    """Strided convolutions, each stage's output a map."""

    def __init__(self, widths: Any) -> None:
        super().__init__()
        ins = (3, *widths[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 4 if i == 3 else 2, 1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in zip(ins, widths, strict=True)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(x := stage(x) for stage in self.stages)
