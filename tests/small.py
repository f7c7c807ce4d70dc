"""Detectors for tests of pruning and criteria: three-part networks of a few channels, and mmdet's.

Every case has a backbone, a neck and a head, implements `Target` and comes with random norm
statistics, since fresh ones (mean 0, variance 1) hide mistakes.
"""

import ldt  # noqa: F401  (first: mmdet imports only once mmcv's operators are in place)

# isort: split
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hydra import compose, initialize_config_dir
from mmdet.models.backbones.res2net import Bottle2neck
from mmdet.models.backbones.resnest import SplitAttentionConv2d
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from ldt.config import register
from ldt.detectors.adapter import PreparedBatch
from ldt.detectors.forward import raw_forward
from ldt.detectors.models import model_config
from ldt.module import DetectorModule
from ldt.objects import Objects
from ldt.pruning.dependency import ModulatedDeformConv2dPack
from ldt.pruning.graph import Forward, PruningGraph
from ldt.pruning.layer_types import CONVOLUTIONS, NORMS

register()
CONF = str(Path(__file__).parents[1] / "conf")
METHODS = sorted(  # that have a criterion
    file.stem
    for file in Path(CONF, "method").glob("*.yaml")
    if yaml.safe_load(file.read_text()).get("criterion", "inherited")
)
REAL = ("gfl_tiny", "atss_tiny", "yolof_tiny", "yolox_nano")
SCOPE = ("backbone", "neck")
# one's own mmdet config, made small
RETINANET = (
    "detector=mmdet",
    "detector.config=mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
    "+detector.options.backbone={depth:18,base_channels:8,frozen_stages:-1}",
    "+detector.options.neck={in_channels:[8,16,32,64],out_channels:16}",
    "+detector.options.bbox_head={in_channels:16,feat_channels:16,stacked_convs:1}",
)


def block(
    ins: int, outs: int, stride: int = 1, groups: int = 1, norm: nn.Module | None = None
) -> nn.Sequential:
    """Convolution 3x3, normalisation, in-place ReLU."""
    conv = nn.Conv2d(ins, outs, 3, stride, 1, groups=groups, bias=False)
    return nn.Sequential(conv, norm or nn.BatchNorm2d(outs), nn.ReLU(inplace=True))


class Stages(nn.Sequential):
    """Gives every stage's output."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x := stage(x) for stage in self]


class Shared(nn.Sequential):
    """The same layers on every map."""

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [super(Shared, self).forward(x) for x in maps]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = block(width, width)
        self.second = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.first(x))
        out += x
        return out.relu_()


class Branches(nn.Module):
    """Two branches and a pooled copy of the first, concatenated."""

    def __init__(self, ins: int, left: int, right: int) -> None:
        super().__init__()
        self.left, self.right = block(ins, left), block(ins, right)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        return torch.cat([left, self.right(x), max_pool2d(left, 3, 1, 1)], 1)


class Pyramid(nn.Module):
    """Top-down additions, as an FPN has them; with biases and without norms."""

    def __init__(self, ins: Sequence[int], outs: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, outs, 1) for width in ins)
        self.out = nn.ModuleList(nn.Conv2d(outs, outs, 3, 1, 1) for _ in ins)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        sums = [conv(x) for conv, x in zip(self.lateral, maps, strict=True)]
        for i in reversed(range(len(sums) - 1)):
            sums[i] = sums[i] + interpolate(sums[i + 1], size=sums[i].shape[2:], mode="nearest")
        return [conv(x) for conv, x in zip(self.out, sums, strict=True)]


class Split(nn.Module):
    """One lateral convolution per scale."""

    def __init__(self, ins: Sequence[int], outs: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, outs, 1) for width in ins)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [conv(x) for conv, x in zip(self.lateral, maps, strict=True)]


class SmallDetector(nn.Module):
    def __init__(self, backbone: nn.Module, neck: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head

    def extract(self, images: Tensor) -> list[Tensor]:
        return self.neck(self.backbone(images))

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.head(self.extract(images))


class LayerNorm2d(nn.LayerNorm):
    """Normalises the channels of every position."""

    def forward(self, x: Tensor) -> Tensor:
        # contiguous: an in-place ReLU on a view would hide the norm from tracing
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def _predict(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, 5, 1)


def _upsampling() -> nn.Sequential:
    """A transposed convolution and a normalisation without weights."""
    up = nn.ConvTranspose2d(8, 12, 4, 2, 1)
    return nn.Sequential(block(3, 8, 4), up, nn.BatchNorm2d(12, affine=False), nn.ReLU())


class Deformable(nn.Sequential):
    """A modulated deformable convolution that does deform, normalisation, ReLU."""

    def __init__(self, ins: int, outs: int, deform_groups: int) -> None:
        conv = ModulatedDeformConv2dPack(ins, outs, 3, 2, 1, deform_groups=deform_groups)
        nn.init.normal_(conv.conv_offset.weight, std=0.1)
        super().__init__(conv, nn.BatchNorm2d(outs), nn.ReLU(inplace=True))


class Gated(nn.Module):
    """Half of the channels weigh the other half."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(ins, 2 * outs, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        values, gates = self.conv(x).chunk(2, 1)
        return values * gates.sigmoid()


class Stepwise(nn.Module):
    """Both halves of the channels, and more made of the second, concatenated."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.first, self.second = block(ins, outs), Residual(outs // 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, 1)
        return torch.cat([left, right, self.second(right)], 1)


class Parametric(nn.Module):
    """A factor for each channel, a bias for each position too, and weights of a fusion."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.first, self.second = block(ins, outs, 2), Residual(outs)
        self.scale = nn.Parameter(torch.rand(outs, 1, 1) + 0.5)
        self.gamma = nn.Parameter(torch.rand(outs) + 0.5)
        self.places = nn.Parameter(torch.rand(1, outs, 4, 6))
        self.weights = nn.Parameter(torch.tensor([0.4, 0.7]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.scale + self.places
        left, right = self.weights.relu() / self.weights.sum()
        return left * x + right * self.second(x) * self.gamma.view(1, -1, 1, 1)


class ShuffledGroups(nn.Module):
    """Grouped convolutions with a channel shuffle between them, as in ShuffleNet."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.first, self.shuffle = block(ins, 12, groups=2), nn.ChannelShuffle(2)
        self.each, self.last = block(12, 12, 2, groups=12), block(12, outs, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.each(self.shuffle(self.first(x))))


class ShuffledHalves(nn.Module):
    """Two steps: half of the channels pass, half are convolved, then both are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.steps = nn.ModuleList(nn.Sequential(block(half, 5), block(5, half)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            first, second = x.chunk(2, 1)
            x = torch.cat([first, step(second)], 1)
            x = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return x


def _res2net(stage_type: str) -> nn.Module:
    """A block of three parts, four channels each."""
    stride = 2 if stage_type == "stage" else 1  # as in the first block of a stage and in others
    side = nn.Sequential(nn.Conv2d(8, 32, 1, stride, bias=False), nn.BatchNorm2d(32))
    options: dict[str, Any] = {"scales": 3, "base_width": 32, "stage_type": stage_type}
    return Bottle2neck(8, 8, stride=stride, downsample=side, **options)


# As in an FPN, no neck ends in a ReLU: a channel that never fires discriminates nothing.
SMALL: dict[str, Callable[[], SmallDetector]] = {
    "chain": lambda: SmallDetector(
        Stages(nn.Sequential(block(3, 8, 2), block(8, 12, 2))),
        Shared(nn.Conv2d(12, 10, 3, 1, 1)),
        Shared(_predict(10)),
    ),
    "residual": lambda: SmallDetector(
        Stages(nn.Sequential(block(3, 10, 4), Residual(10)), block(10, 12, 2)),
        Split([10, 12], 10),
        Shared(_predict(10)),
    ),
    "concat": lambda: SmallDetector(
        Stages(nn.Sequential(block(3, 8, 4), Branches(8, 6, 8))),
        Shared(*block(20, 10)[:2]),
        Shared(_predict(10)),
    ),
    "depthwise": lambda: SmallDetector(
        Stages(nn.Sequential(block(3, 8, 4), block(8, 8, groups=8), block(8, 12, 2))),
        Shared(*block(12, 10)[:2]),
        Shared(*block(10, 10, groups=10), _predict(10)),
    ),
    "shared": lambda: SmallDetector(
        Stages(block(3, 8, 4), block(8, 12, 2)),
        nn.Sequential(Split([8, 12], 8), Shared(*block(8, 10)[:2])),
        Shared(*block(10, 8), _predict(8)),
    ),
    "groupnorm": lambda: SmallDetector(
        Stages(block(3, 16, 4, norm=nn.GroupNorm(4, 16)), block(16, 12, 2)),
        nn.Sequential(Split([16, 12], 16), Shared(*block(16, 24, norm=nn.GroupNorm(8, 24))[:2])),
        Shared(*block(24, 8, norm=nn.GroupNorm(2, 8)), _predict(8)),
    ),
    "pyramid": lambda: SmallDetector(
        Stages(block(3, 8, 4), block(8, 12, 2)), Pyramid([8, 12], 10), Shared(_predict(10))
    ),
    "layernorm": lambda: SmallDetector(
        Stages(block(3, 8, 4), block(8, 12, 2, norm=LayerNorm2d(12))),
        Split([8, 12], 8),
        Shared(_predict(8)),
    ),
    "grouped": lambda: SmallDetector(
        Stages(nn.Sequential(block(3, 12, 4), block(12, 18, groups=3), block(18, 12, 2, groups=2))),
        Shared(*block(12, 10)[:2]),
        Shared(_predict(10)),
    ),
    "deformable": lambda: SmallDetector(
        Stages(block(3, 8, 4), Deformable(8, 12, 2)),
        Split([8, 12], 10),
        Shared(_predict(10)),
    ),
    "upsampling": lambda: SmallDetector(
        Stages(_upsampling()), Shared(*block(12, 10)[:2]), Shared(_predict(10))
    ),
    "gated": lambda: SmallDetector(
        Stages(block(3, 8, 4), Gated(8, 12)), Split([8, 12], 10), Shared(_predict(10))
    ),
    "stepwise": lambda: SmallDetector(
        Stages(block(3, 8, 4), Stepwise(8, 12)), Split([8, 18], 10), Shared(_predict(10))
    ),
    "parametric": lambda: SmallDetector(
        Stages(block(3, 8, 4), Parametric(8, 12)), Split([8, 12], 10), Shared(_predict(10))
    ),
    "shuffled_groups": lambda: SmallDetector(
        Stages(block(3, 8, 4), ShuffledGroups(8, 12)), Split([8, 12], 10), Shared(_predict(10))
    ),
    "shuffled_halves": lambda: SmallDetector(
        Stages(nn.Sequential(block(3, 16, 4), ShuffledHalves(16))),
        Shared(*block(16, 10)[:2]),
        Shared(_predict(10)),
    ),
    "res2net": lambda: SmallDetector(
        Stages(block(3, 8, 4), _res2net("normal")), Split([8, 32], 10), Shared(_predict(10))
    ),
    "res2net_stage": lambda: SmallDetector(
        Stages(block(3, 8, 4), _res2net("stage")), Split([8, 32], 10), Shared(_predict(10))
    ),
    "resnest": lambda: SmallDetector(
        Stages(block(3, 8, 4), SplitAttentionConv2d(8, 12, 3, 2, 1)),
        Split([8, 12], 10),
        Shared(_predict(10)),
    ),
}


@dataclass
class Batch:
    images: Tensor
    objects: Objects

    def of_image(self, index: int) -> "Batch":
        return Batch(self.images[index : index + 1], self.objects.of_image(index))


@dataclass
class SmallTarget:
    """A small detector as criteria see it; its loss has a mean over images, as mmdet's have."""

    model: SmallDetector

    def features(self, batch: Batch) -> list[Tensor]:
        return self.model.extract(batch.images)

    def detection_loss(self, batch: Batch) -> Tensor:
        return torch.stack([m.sigmoid().square().mean() for m in self.model(batch.images)]).sum()


@dataclass
class Case:
    """A network in eval mode, all it takes to trace it, and batches with three classes."""

    target: Any
    forward: Forward
    example: Tensor
    predictors: list[str]
    batches: list[Any]

    @property
    def model(self) -> nn.Module:
        return self.target.model

    def graph(self, scope: Sequence[str] = SCOPE) -> PruningGraph:
        return PruningGraph(self.model, self.forward, self.example, scope, self.predictors)

    def outputs(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(self.forward(self.model, images))


def randomise_norms(model: nn.Module, generator: torch.Generator) -> None:
    """Random weights, biases and running statistics for every normalisation layer."""
    for module in model.modules():
        if isinstance(module, NORMS):
            for name, tensor in module.state_dict(keep_vars=True).items():
                if tensor.is_floating_point():
                    low = 0.5 if name in ("weight", "running_var") else -0.5
                    tensor.data.uniform_(low, low + 1, generator=generator)


def objects(images: int, shape: tuple[int, int], generator: torch.Generator) -> Objects:
    """Four boxes of three classes in every image but the second, which has none."""
    image = torch.arange(images).repeat_interleave(4)
    image = image[image != 1]
    sides = torch.tensor([shape[1], shape[0]])
    corner = torch.rand(len(image), 2, generator=generator) * sides * 0.7
    size = (0.1 + 0.4 * torch.rand(len(image), 2, generator=generator)) * sides
    boxes = torch.cat([corner, (corner + size).minimum(sides)], 1)
    labels = torch.arange(len(image)) % 3
    return Objects(boxes, labels, image, shape)


def scenes(
    images: int, shape: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Objects]:
    """Noise with objects in it: each class has its own colour, so that features can tell them."""
    found = objects(images, shape, generator)
    pixels = torch.randn(images, 3, *shape, generator=generator)
    for box, label, image in zip(found.boxes.long(), found.labels, found.image, strict=True):
        x1, y1, x2, y2 = box.tolist()
        pixels[image, label, y1:y2, x1:x2] += 4
    return pixels, found


def case(name: str, seed: int = 1) -> Case:
    """A fresh copy of a small network or of one of mmdet's."""
    return deepcopy(_small(name, seed) if name in SMALL else _real(name, seed))


@cache
def _small(name: str, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SMALL[name]().eval()
    randomise_norms(model, generator)
    shape = (32, 48)
    batches = [Batch(*scenes(n, shape, generator)) for n in (3, 2)]
    predictors = [
        layer
        for layer, module in model.head.named_modules(prefix="head")
        if isinstance(module, CONVOLUTIONS) and module.weight.shape[0] == 5
    ]
    example = torch.zeros(1, 3, *shape)
    return Case(SmallTarget(model), lambda net, x: net(x), example, predictors, batches)


def composed(*overrides: str) -> Any:
    """The configuration of a run with these overrides."""
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", overrides=list(overrides))


@cache
def _real(name: str, seed: int) -> Case:
    config = composed(*(RETINANET if name == "retinanet" else [f"detector={name}"]))
    chosen: Any = OmegaConf.to_container(config.detector, resolve=True)
    recipe: Any = OmegaConf.to_container(config.recipe, resolve=True)
    model = model_config(chosen["config"], chosen["options"], n_classes=3, pretrained=False)
    generator = torch.Generator().manual_seed(seed)
    shape = (64, 128)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = DetectorModule(model, ("Car", "Pedestrian", "Cyclist"), recipe, shape).eval()
    module.requires_grad_(True)
    randomise_norms(module.detector, generator)
    batches = [prepared(n, shape, generator) for n in (3, 2)]
    detector = module.adapter
    return Case(detector, raw_forward, detector.example(), detector.predictors, batches)


def prepared(images: int, shape: tuple[int, int], generator: torch.Generator) -> PreparedBatch:
    """A batch of scenes as an mmdet detector takes it."""
    pixels, found = scenes(images, shape, generator)
    samples = []
    for index in range(images):
        own = found.image == index
        truth: Any = InstanceData(bboxes=found.boxes[own], labels=found.labels[own])
        about = {"img_shape": shape, "batch_input_shape": shape, "pad_shape": shape}
        sample = DetDataSample(metainfo={**about, "ori_shape": shape, "scale_factor": (1.0, 1.0)})
        sample.gt_instances = truth
        sample.ignored_instances = InstanceData(bboxes=truth.bboxes[:0], labels=truth.labels[:0])
        samples.append(sample)
    return PreparedBatch(pixels, samples, found)


def random_channels(graph: PruningGraph, seed: int, share: float = 0.5) -> dict[str, list[int]]:
    """Channels of every group, the same number from each of its parts; one stays in each."""
    rng = np.random.default_rng(seed)
    chosen = {}
    for name, group in graph.groups.items():
        size = group.size // group.parts
        count = rng.integers(0, max(1, round(share * size)), endpoint=True) if size > 1 else 0
        count = min(count, size - 1)
        parts = [first + rng.permutation(size)[:count] for first in range(0, group.size, size)]
        chosen[name] = sorted(np.concatenate(parts).tolist())
    return chosen
