"""Small detectors of transformers and torchvision, whole ones as these libraries build them."""

from collections import OrderedDict
from copy import deepcopy
from typing import Any

import torch
from small import prepared, randomise_norms
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.ssd import SSD, DefaultBoxGenerator
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ldt.detectors.opening import open_detector

CLASSES = 3
SIZE = (64, 96)
RESNET = {
    "model_type": "rt_detr_resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 64, 64],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_indices": [2, 3, 4],
}
HGNET = {
    "model_type": "hgnet_v2",
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16, 32, 64],
    "stage_mid_channels": [8, 8, 16, 16],
    "stage_out_channels": [16, 32, 64, 64],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 32, 64, 64],
    "out_indices": [2, 3, 4],
}
DETR: dict[str, Any] = {
    "model_type": "rt_detr",
    "backbone_config": RESNET,
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [32, 64, 64],
    "decoder_in_channels": [32, 32, 32],
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_layers": 2,
    "num_queries": 20,
    "num_denoising": 8,
}
FINE = {"max_num_bins": 8, "lqe_hidden_dim": 8, "depth_mult": 0.34, "hidden_expansion": 0.5}
CONFIGS: dict[str, dict[str, Any]] = {
    "rt_detr": DETR,
    "rt_detr_v2": DETR | {"model_type": "rt_detr_v2"},
    "d_fine": DETR | FINE | {"model_type": "d_fine", "backbone_config": HGNET},
}
ALL = (*CONFIGS, "fcos", "retinanet", "faster_rcnn", "ssd")


def whole(name: str) -> nn.Module:
    """The library's own model, in eval mode, with random weights that all matter."""
    torch.manual_seed(0)
    model: Any = _transformers(name) if name in CONFIGS else _torchvision(name)
    generator = torch.Generator().manual_seed(0)
    randomise_norms(model, generator)
    for parameter in model.parameters():  # last layers are zeros, or have low scores
        if not parameter.any() or (parameter < -2).any():
            parameter.data.normal_(0, 0.1, generator=generator)
    return model.eval()


def wrapped(name: str, model: nn.Module | None = None) -> Any:
    """The same as an mmdet detector; the model stays whole."""
    return open_detector(whole(name) if model is None else model).model


def batch(images: int = 2, seed: int = 0) -> Any:
    return prepared(images, SIZE, torch.Generator().manual_seed(seed))


def raw_batch(images: int = 2, seed: int = 0) -> dict[str, Any]:
    """A batch as mmdet's loaders give it: images of whole numbers."""
    found = batch(images, seed)
    pixels = (128 + 20 * found.images).clamp(0, 255).to(torch.uint8)
    return {"inputs": list(pixels), "data_samples": found.samples}


def _transformers(name: str) -> nn.Module:
    import transformers

    kind = {"rt_detr": "RTDetr", "rt_detr_v2": "RTDetrV2", "d_fine": "DFine"}[name]
    own = {key: value for key, value in CONFIGS[name].items() if key != "model_type"}
    config = getattr(transformers, f"{kind}Config")(
        **deepcopy(own), num_labels=CLASSES, freeze_backbone_batch_norms=False
    )
    return getattr(transformers, f"{kind}ForObjectDetection")(config)


def _stage(ins: int, outs: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(ins, outs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outs), nn.ReLU())


class _Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([_stage(3, 16, 8), _stage(16, 24, 2), _stage(24, 32, 2)])
        self.out_channels = [16, 24, 32]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return OrderedDict((str(i), x := stage(x)) for i, stage in enumerate(self.stages))


def _torchvision(name: str) -> nn.Module:
    body = nn.Sequential(
        OrderedDict(one=_stage(3, 16, 8), two=_stage(16, 24, 2), three=_stage(24, 32, 2))
    )
    layers = {"one": "0", "two": "1", "three": "2"}
    width = 64 if name == "fcos" else 16  # two channels for each of the 32 groups of its norms
    more = None if name == "faster_rcnn" else LastLevelP6P7(width, width)
    backbone = BackboneWithFPN(body, layers, [16, 24, 32], width, more)
    own: dict[str, Any] = {"min_size": SIZE[0], "max_size": SIZE[1], "num_classes": CLASSES}
    if name == "fcos":
        return FCOS(backbone, score_thresh=0.0, **own)
    if name == "retinanet":
        return RetinaNet(backbone, score_thresh=0.0, **own)
    background = own | {"num_classes": CLASSES + 1}
    if name == "faster_rcnn":
        anchors = AnchorGenerator(((16,), (24,), (32,), (48,)), ((0.5, 1.0, 2.0),) * 4)
        few = {"rpn_post_nms_top_n_test": 20, "box_score_thresh": 0.0, "box_nms_thresh": 0.9}
        return FasterRCNN(backbone, rpn_anchor_generator=anchors, **background, **few)
    boxes = DefaultBoxGenerator([[2], [2], [2]], scales=[0.2, 0.4, 0.6, 0.8])
    return SSD(_Features(), boxes, (SIZE[1], SIZE[0]), CLASSES + 1, score_thresh=0.0)
