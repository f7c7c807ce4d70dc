"""Check which of mmdet's detectors can be trained with LDT, scored, pruned, saved and loaded.

    python benchmarks/zoo.py                          # every family of mmdet's packaged configs
    python benchmarks/zoo.py fcos htc                 # some of them
    python benchmarks/zoo.py --jobs 8 --write docs/detectors.md
    python benchmarks/zoo.py --only exports --write docs/detectors.md   # that column alone

A family is a folder of configs, or another library. Each model of ``FAMILIES`` is built at full
width and depth from random weights, sees small synthetic images, and goes through ``STEPS`` in a
process of its own: a crash or a hang is one row. What is left out is in ``EXCLUDED``, with the
reason.
"""

import ldt  # first: mmdet.structures.mask needs its operators

# isort: split
import argparse
import multiprocessing
import resource
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import mmdet
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn
from torch_pruning.pruner.importance import GroupMagnitudeImportance

from ldt.callbacks.ldt_loss import LDTLoss
from ldt.config import RecipeConfig
from ldt.criteria.base import score_groups
from ldt.criteria.group_fisher import GroupFisherCriterion
from ldt.criteria.ldt import LDTCriterion, Source
from ldt.deployment.to_runtime import CANNOT, export_model, own_limit
from ldt.detectors.forward import eval_with_gradients, one_image, raw_forward
from ldt.detectors.models import model_config, quiet
from ldt.evaluation.profiling import count_parameters
from ldt.module import DetectorModule
from ldt.pruning.budget import TOLERANCE
from ldt.runtimes.about import About
from ldt.runtimes.detection_graph import MOST
from ldt.runtimes.parity import BOX, SCORE, compare
from ldt.runtimes.sessions import open_session

PARTS = {
    "head": ("roi_head", "bbox_head", "rpn_head", "mask_head", "panoptic_head"),
    "backbone": ("backbone",),
    "neck": ("neck",),
}
CONFIGS = Path(mmdet.__path__[0]) / ".mim" / "configs"
EXPORTS = 6  # column
STEPS = ("build", "train", "trace", "score", "cut", "run", "save", "load")
MEMORY = 14 * 2**30  # bytes that a model's process may take
RATE = 0.3  # of the parameters in scope
RECIPE = asdict(
    RecipeConfig(
        epochs=1,
        retrain_epochs=0,
        batch_size=2,
        optimizer={"type": "SGD", "lr": 1e-4},
        schedule="constant",
        warmup=0,
    )
)
THRESHOLDS = ("score_thr", "conf_thr", "filter_thr", "mask_thr")  # on scores
FEW_REGIONS = (("train_cfg", "rpn_proposal"), ("test_cfg", "rpn"))  # small images need 20

ONE_CLASS: dict[str, Any] = {"classes": 1, "source": "neck_energy"}  # has no discriminants
SYNC_BN = {  # torch's; mmcv's own cannot be built in a single process
    "roi_head": {f"{part}_head": {"norm_cfg": {"type": "SyncBN"}} for part in ("bbox", "mask")}
}
CORNERS: dict[
    str, Any
] = {  # pairs all corners of a class; norms need more than a cell of the last map
    "size": 256,
    "options": {"test_cfg": {"distance_threshold": float("inf")}},
}
POSITIVE_EPS = {"backbone": {"norm_cfg": {"eps": 1e-5}}}  # torch refuses the config's 0

LIBRARIES = {"torchvision": "ldt::torchvision.py", "transformers": "ldt::transformers.py"}
LOW: dict[str, float] = {"score_thresh": 0.0}
BUILDERS: dict[str, dict[str, float]] = {
    "fcos_resnet50_fpn": LOW,
    "retinanet_resnet50_fpn_v2": LOW,
    "fasterrcnn_resnet50_fpn": {"box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 20},
    "ssd300_vgg16": LOW,
    "ssdlite320_mobilenet_v3_large": LOW,
}


@dataclass(frozen=True)
class Model:
    """A packaged config or a model of another library, and what it takes to run on small images.

    Attributes:
        file: name of the config within its family's folder, without ``.py``; or of the model.
        scope: what is pruned, where it is not the default.
        size: height and width of the images, in pixels.
        options: merged into ``model``; nothing that changes the network's structure.
        neck: the module whose output LDT acts on.
        classes: number of classes.
        source: what LDT traces.
        masks: objects have masks.
        proposals: images come with regions.
    """

    file: str
    scope: tuple[str, ...] = ("backbone", "neck")
    size: int = 128
    options: dict[str, Any] = field(default_factory=dict)
    neck: str = "auto"
    classes: int = 80
    source: Source = "neck"
    masks: bool = True
    proposals: bool = False


FAMILIES: dict[str, tuple[Model, ...]] = {
    "atss": (Model("atss_r50_fpn_1x_coco"),),
    "autoassign": (Model("autoassign_r50-caffe_fpn_1x_coco"),),
    "boxinst": (Model("boxinst_r50_fpn_ms-90k_coco"),),
    "carafe": (Model("faster-rcnn_r50_fpn-carafe_1x_coco"),),
    "cascade_rcnn": (
        Model("cascade-rcnn_r50_fpn_1x_coco"),
        Model("cascade-mask-rcnn_x101-32x4d_fpn_1x_coco"),
    ),
    "cascade_rpn": (Model("cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco"),),
    "centernet": (
        Model("centernet_r18_8xb16-crop512-140e_coco"),
        Model("centernet_r18-dcnv2_8xb16-crop512-140e_coco"),
        Model("centernet-update_r50-caffe_fpn_ms-1x_coco"),
    ),
    "centripetalnet": (
        Model("centripetalnet_hourglass104_16xb6-crop511-210e-mstest_coco", **CORNERS),
    ),
    "condinst": (Model("condinst_r50_fpn_ms-poly-90k_coco_instance"),),
    "conditional_detr": (Model("conditional-detr_r50_8xb2-50e_coco"),),
    "convnext": (Model("mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco"),),
    "cornernet": (Model("cornernet_hourglass104_8xb6-210e-mstest_coco", **CORNERS),),
    "crowddet": (
        Model("crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman", **ONE_CLASS),
        Model("crowddet-rcnn_refine_r50_fpn_8xb2-30e_crowdhuman", **ONE_CLASS),
    ),
    "dab_detr": (Model("dab-detr_r50_8xb2-50e_coco"),),
    "dcn": (Model("faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco"),),
    "dcnv2": (Model("faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco"),),
    "ddod": (Model("ddod_r50_fpn_1x_coco"),),
    "ddq": (Model("ddq-detr-4scale_r50_8xb2-12e_coco"),),
    "deformable_detr": (Model("deformable-detr_r50_16xb2-50e_coco"),),
    "detectors": (
        Model("cascade-rcnn_r50-rfp_1x_coco"),
        Model("cascade-rcnn_r50-sac_1x_coco"),
    ),
    "detr": (Model("detr_r50_8xb2-150e_coco"),),
    "dino": (Model("dino-4scale_r50_8xb2-12e_coco", size=256),),
    "double_heads": (Model("dh-faster-rcnn_r50_fpn_1x_coco"),),
    "dyhead": (Model("atss_r50_fpn_dyhead_1x_coco"),),
    "dynamic_rcnn": (Model("dynamic-rcnn_r50_fpn_1x_coco"),),
    "efficientnet": (Model("retinanet_effb3_fpn_8xb4-crop896-1x_coco"),),
    "empirical_attention": (Model("faster-rcnn_r50-attn1111-dcn_fpn_1x_coco"),),
    "fast_rcnn": (Model("fast-rcnn_r50_fpn_1x_coco", proposals=True),),
    "faster_rcnn": (
        Model("faster-rcnn_r50_fpn_1x_coco"),
        Model("faster-rcnn_r50-caffe_c4-1x_coco"),
        Model("faster-rcnn_r50-caffe-dc5_1x_coco"),
    ),
    "fcos": (
        Model("fcos_r50-caffe_fpn_gn-head_1x_coco"),
        Model("fcos_r50-dcn-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco"),
    ),
    "foveabox": (
        Model("fovea_r50_fpn_4xb4-1x_coco"),
        Model("fovea_r50_fpn_gn-head-align_4xb4-2x_coco"),
    ),
    "fpg": (Model("faster-rcnn_r50_fpg_crop640-50e_coco"),),
    "free_anchor": (Model("freeanchor_r50_fpn_1x_coco"),),
    "fsaf": (Model("fsaf_r50_fpn_1x_coco"),),
    "gcnet": (Model("mask-rcnn_r50-syncbn-gcb-r4-c3-c5_fpn_1x_coco"),),
    "gfl": (Model("gfl_r50_fpn_1x_coco"),),
    "ghm": (Model("retinanet_r50_fpn_ghm-1x_coco"),),
    "gn": (Model("mask-rcnn_r50_fpn_gn-all_2x_coco"),),
    "gn+ws": (Model("faster-rcnn_r50_fpn_gn-ws-all_1x_coco"),),
    "grid_rcnn": (Model("grid-rcnn_r50_fpn_gn-head_1x_coco"),),
    "groie": (Model("mask-rcnn_r50_fpn_groie_1x_coco"),),
    "guided_anchoring": (
        Model("ga-retinanet_r50_fpn_1x_coco"),
        Model("ga-faster-rcnn_r50_fpn_1x_coco", options={"rpn_head": {"loc_filter_thr": 0.0}}),
    ),
    "hrnet": (Model("faster-rcnn_hrnetv2p-w18-1x_coco"),),
    "htc": (Model("htc_r50_fpn_1x_coco"),),
    "lad": (Model("lad_r50-paa-r101_fpn_2xb8_coco_1x", size=256, options={"teacher_ckpt": None}),),
    "ld": (
        Model(
            "ld_r18-gflv1-r101_fpn_1x_coco",
            options={
                "teacher_config": str(CONFIGS / "gfl/gfl_r101_fpn_ms-2x_coco.py"),
                "teacher_ckpt": None,
            },
        ),
    ),
    "legacy_1.x": (Model("retinanet_r50_fpn_1x_coco_v1"),),
    "libra_rcnn": (
        Model("libra-faster-rcnn_r50_fpn_1x_coco"),
        Model("libra-retinanet_r50_fpn_1x_coco"),
    ),
    "mask2former": (
        Model(
            "mask2former_r50_8xb2-lsj-50e_coco", size=64, options={"train_cfg": {"num_points": 512}}
        ),
    ),
    "mask_rcnn": (Model("mask-rcnn_r50_fpn_1x_coco"),),
    "ms_rcnn": (Model("ms-rcnn_r50_fpn_1x_coco"),),
    "nas_fcos": (
        Model("nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco", options=POSITIVE_EPS),
        Model("nas-fcos_r50-caffe_fpn_fcoshead-gn-head_4xb4-1x_coco", options=POSITIVE_EPS),
    ),
    "nas_fpn": (Model("retinanet_r50_nasfpn_crop640-50e_coco"),),
    "paa": (Model("paa_r50_fpn_1x_coco"),),
    "pafpn": (Model("faster-rcnn_r50_pafpn_1x_coco"),),
    "pisa": (
        Model("retinanet-r50_fpn_pisa_1x_coco"),
        Model("ssd300_pisa_coco", size=300),
        Model(
            "faster-rcnn_r50_fpn_pisa_1x_coco",
            options={"train_cfg": {"rcnn": {"sampler": {"score_thr": -1.0}}}},
        ),
    ),
    "point_rend": (
        Model(
            "point-rend_r50-caffe_fpn_ms-1x_coco",
            options={"test_cfg": {"rpn": {"max_per_img": 20}, "rcnn": {"score_thr": 0.0}}},
        ),
    ),
    "pvt": (Model("retinanet_pvt-t_fpn_1x_coco", scope=("neck",)),),
    "queryinst": (Model("queryinst_r50_fpn_1x_coco"),),
    "regnet": (Model("faster-rcnn_regnetx-3.2GF_fpn_1x_coco"),),
    "reppoints": (Model("reppoints-moment_r50_fpn-gn_head-gn_1x_coco"),),
    "res2net": (Model("faster-rcnn_res2net-101_fpn_2x_coco"),),
    "resnest": (Model("faster-rcnn_s50_fpn_syncbn-backbone+head_ms-range-1x_coco"),),
    "retinanet": (Model("retinanet_r50_fpn_1x_coco"),),
    "rpn": (Model("rpn_r50_fpn_1x_coco"),),
    "rtmdet": (
        Model("rtmdet_tiny_8xb32-300e_coco", masks=False),
        Model("rtmdet-ins_tiny_8xb32-300e_coco"),
    ),
    "sabl": (
        Model("sabl-retinanet_r50_fpn_1x_coco"),
        Model("sabl-faster-rcnn_r50_fpn_1x_coco"),
    ),
    "scnet": (Model("scnet_r50_fpn_1x_coco"),),
    "scratch": (Model("faster-rcnn_r50-scratch_fpn_gn-all_6x_coco"),),
    "seesaw_loss": (Model("mask-rcnn_r50_fpn_seesaw-loss_random-ms-2x_lvis-v1"),),
    "simple_copy_paste": (
        Model(
            "mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_32xb2-ssj-90k_coco", options=SYNC_BN
        ),
    ),
    "solo": (
        Model("solo_r50_fpn_1x_coco"),
        Model("decoupled-solo_r50_fpn_1x_coco"),
        Model("decoupled-solo-light_r50_fpn_3x_coco"),
    ),
    "solov2": (Model("solov2_r50_fpn_1x_coco"),),
    "sparse_rcnn": (Model("sparse-rcnn_r50_fpn_1x_coco"),),
    "ssd": (Model("ssd300_coco", size=300), Model("ssdlite_mobilenetv2-scratch_8xb24-600e_coco")),
    "strong_baselines": (
        Model(
            "mask-rcnn_r50-caffe_fpn_rpn-2conv_4conv1fc_syncbn-all_lsj-100e_coco", options=SYNC_BN
        ),
    ),
    "swin": (Model("retinanet_swin-t-p4-w7_fpn_1x_coco", scope=("neck",)),),
    "timm_example": (Model("retinanet_timm-tv-resnet50_fpn_1x_coco"),),
    "tood": (
        Model("tood_r50_fpn_1x_coco"),
        Model("tood_r50_fpn_anchor-based_1x_coco"),
    ),
    "torchvision": tuple(
        Model(name, size=320 if "ssd" in name else 128, options={"name": name, "builder": few})
        for name, few in BUILDERS.items()
    ),
    "transformers": tuple(
        Model(kind, options={"config": {"model_type": kind}})
        for kind in ("rt_detr", "rt_detr_v2", "d_fine")
    ),
    "tridentnet": (Model("tridentnet_r50-caffe_1x_coco"),),
    "vfnet": (Model("vfnet_r50_fpn_1x_coco"), Model("vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco")),
    "yolact": (Model("yolact_r50_1xb8-55e_coco"),),
    "yolo": (
        Model("yolov3_d53_8xb8-320-273e_coco"),
        Model("yolov3_mobilenetv2_8xb24-320-300e_coco"),
    ),
    "yolof": (Model("yolof_r50-c5_8xb8-1x_coco"),),
    "yolox": (Model("yolox_s_8xb8-300e_coco"),),
}

EXCLUDED = {
    "no model of their own": "_base_ common dsdl",
    "Mask R-CNN, Cascade R-CNN, Faster R-CNN or RetinaNet with other data, augmentation or initial "
    "weights": "albu_example cityscapes deepfashion instaboost lvis misc objects365 openimages "
    "pascal_voc resnet_strikes_back selfsup_pretrain v3det wider_face",
    "semi-supervised training of Faster R-CNN": "soft_teacher",
    "tracking or re-identification": "bytetrack deepsort mask2former_vis masktrack_rcnn ocsort "
    "qdtrack reid sort strongsort",
    "prompted by text": "glip grounding_dino mm_grounding_dino",
    "panoptic segmentation only": "maskformer panoptic_fpn",
    "detection of lanes, in the maintained fork": "clrnet",
}


def batch(model: Model, seed: int) -> dict[str, Any]:
    """Two noisy images with five objects of three classes each: boxes, masks, semantic map."""
    generator, size = torch.Generator().manual_seed(seed), model.size
    images, samples = [], []
    for _ in range(2):
        corner = torch.rand(5, 2, generator=generator) * size * 0.5
        extent = (0.25 + 0.25 * torch.rand(5, 2, generator=generator)) * size
        boxes, labels = (
            torch.cat([corner, corner + extent], 1),
            torch.arange(5) % min(3, model.classes),
        )
        image = torch.randint(0, 200, (3, size, size), generator=generator)
        masks = np.zeros((5, size, size), dtype=np.uint8)
        for mask, box, label in zip(masks, boxes.long().tolist(), labels, strict=True):
            x1, y1, x2, y2 = box
            mask[y1:y2, x1:x2] = 1
            image[label, y1:y2, x1:x2] += 55
        shape = (size, size)
        about = {"img_shape": shape, "ori_shape": shape, "scale_factor": (1.0, 1.0)}
        border = np.array([0, size, 0, size], dtype=np.float32)  # for CornerNet's family
        sample = DetDataSample(metainfo={**about, "border": border, "img_path": ""})
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        if model.masks:
            sample.gt_instances.masks = BitmapMasks(masks, size, size)
        sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=labels[:0])
        sample.gt_sem_seg = PixelData(sem_seg=torch.as_tensor(masks.max(0)[None]).long())
        if model.proposals:
            sample.proposals = InstanceData(bboxes=boxes + 4, scores=torch.ones(5))
        images.append(image.to(torch.uint8))
        samples.append(sample)
    return {"inputs": images, "data_samples": samples}


def build(family: str, model: Model) -> DetectorModule:
    """Build the module of a family's model with random weights."""
    name = LIBRARIES.get(family, f"mmdet::{family}/{model.file}.py")
    torch.manual_seed(0)
    first = model.options if family in LIBRARIES else {}
    plain = model_config(name, first, model.classes, pretrained=False)
    few = {
        config: {part: {"max_per_img": 20}}
        for config, part in FEW_REGIONS
        if "roi_head" in plain and (plain.get(config) or {}).get(part)
    }
    plain = model_config(name, {**few, **model.options}, model.classes, pretrained=False)
    lower_thresholds([plain.get("train_cfg"), plain.get("test_cfg")])
    classes = [f"class {i}" for i in range(model.classes)]
    module = DetectorModule(plain, classes, RECIPE, (model.size, model.size), neck=model.neck)
    for name, bias in module.named_parameters():
        if "_heat." in name and len(bias) == model.classes and bias.ndim == 1:
            bias.data[0] += 5  # corners make a box if they are of the same class
    return module


def lower_thresholds(node: Any) -> None:
    """Set the thresholds below a part of a config so that every box is a detection."""
    if isinstance(node, dict):
        node.update({key: -1.0 for key in THRESHOLDS if node.get(key)})
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, (dict, list, tuple)):
            lower_thresholds(child)


def train(module: DetectorModule, model: Model) -> L.Trainer:
    """One step with the LDT losses; the norms take the statistics of its batch as they are."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = 1.0
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        gradient_clip_val=35.0,
        callbacks=[LDTLoss(alpha=5e-4, beta=7.5, warmup_epochs=0)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data: Any = [batch(model, 1)]
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    return trainer


def outputs(detector: nn.Module, model: Model) -> list[Tensor]:
    """Raw maps and predictions of a detector in eval mode, on fixed images."""
    preprocess: Any = detector.data_preprocessor
    data = preprocess(batch(model, 3), False)
    detector.eval()
    with torch.no_grad():
        found = raw_forward(detector, data["inputs"])
        # with the statistics of other images the maps of random networks grow without bounds
        for layer in detector.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.train().momentum = 0.0
        for sample in detector(data["inputs"], data["data_samples"], mode="predict"):
            instances = sample.pred_instances
            if not len(instances):
                raise RuntimeError("no object is found, whatever its score")
            found += [instances.bboxes, instances.scores, instances.labels]
    return found


def check_gradients(module: DetectorModule, model: Model) -> None:
    """One backward in training mode."""
    module.train().zero_grad()
    module.adapter.detection_loss(module.adapter.prepare(batch(model, 4), training=True)).backward()
    gradients = [p.grad for p in module.detector.parameters() if p.grad is not None]
    if not gradients or not all(bool(g.isfinite().all()) for g in gradients):
        raise RuntimeError("a gradient is missing or not finite")


def examine(family: str, model: Model, folder: Path, row: dict[str, Any]) -> Iterator[str]:
    """Take a model through all steps but the last, and fill its row; yields the step to come."""
    yield "build"
    module = build(family, model)
    detector: Any = module.detector
    row.update({part: part_of(detector, names) for part, names in PARTS.items()})
    yield "train"
    trainer = train(module, model)
    yield "trace"
    whole = count_parameters(detector)
    with eval_with_gradients(detector):
        graph = module.adapter.trace(model.scope)
        cut, in_scope = graph.prunable_share()
        row["share"], row["left"] = cut / in_scope, dict(graph.excluded)
        if cut < in_scope / 2:
            reasons = ", ".join(sorted(set(graph.excluded.values())))
            raise RuntimeError(f"only {cut / in_scope:.0%} of the scope can be cut: {reasons}")
        yield "score"
        batches = [module.adapter.prepare(batch(model, 2))]
        for criterion in (GroupFisherCriterion(), GroupMagnitudeImportance(p=1)):
            score_groups(criterion, module.adapter, graph, batches)
    yield "cut"
    ldt.prune(
        detector,
        [batch(model, 2)],
        rate=RATE * in_scope / whole,
        criterion=LDTCriterion(model.source),
        scope=model.scope,
        input_size=(model.size, model.size),
        neck=model.neck,
        repair="none",
        inplace=True,
    )
    achieved = (whole - count_parameters(detector)) / in_scope
    if abs(achieved - RATE) > TOLERANCE:
        raise RuntimeError(f"{achieved:.1%} of the scope's parameters are gone, not {RATE:.0%}")
    yield "run"
    check_gradients(module, model)
    expected = outputs(detector, model)
    yield "save"
    trainer.save_checkpoint(folder / "model.ckpt", weights_only=True)
    torch.save(expected, folder / "outputs.pt")


def reload(family: str, model: Model, folder: Path, row: dict[str, Any]) -> Iterator[str]:
    """Load the saved model in a fresh process and compare its outputs."""
    yield "load"
    detector = ldt.load_pruned(folder / "model.ckpt")
    expected = torch.load(folder / "outputs.pt", weights_only=True)
    for one, other in zip(expected, outputs(detector, model), strict=True):
        if not torch.equal(one, other):
            raise RuntimeError("the loaded detector predicts something else")


def part_of(detector: nn.Module, names: tuple[str, ...]) -> str:
    """Return the type of the first of these modules that the detector has."""
    modules = dict(detector.named_modules())
    return next((type(modules[name]).__name__ for name in names if name in modules), "")


def export(family: str, model: Model, folder: Path, row: dict[str, Any]) -> Iterator[str]:
    """Export the unpruned model and compare the file with mmdet, on images it was not made with."""
    yield "build"
    module = build(family, model)
    detector = module.adapter
    for layer in module.modules():  # activations of a size that later layers can work with
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = 1.0
    images = [batch(model, seed)["inputs"][0][None].float() for seed in (5, 6)]
    shown = [one_image(image[0], detector.input_size) for image in images]
    module.train()
    with torch.no_grad():
        detector.raw_maps(torch.cat([detector.network_input(each) for each in shown]))
    module.eval()
    for config in parts_with(detector.model.test_cfg, "score_thr"):
        config["score_thr"] = 0.0  # random weights have low scores
    yield "export"
    about = About(
        outputs="detections",
        classes=[],
        size=list(detector.input_size),
        resize=[],
        pad_value=detector.pad_pixel(),
        max_detections=own_limit(detector) or MOST,
        parameters=0,
        macs=0,
    )
    (folder / "model.onnx").unlink(missing_ok=True)
    export_model(detector, about, folder / "model.onnx")
    yield "check"
    differences = compare(detector, open_session(folder / "model.onnx", threads=1), images)
    # random weights give many boxes of nearly equal score, of which either one may survive
    same = differences.box <= BOX and differences.score <= SCORE
    swapped = differences.ties + differences.missing
    row["exports"] = "yes" if same and swapped < differences.boxes / 2 else f"no: {differences}"


def parts_with(node: Any, key: str) -> Iterator[dict[str, Any]]:
    """Yield the dicts below a config that have a key."""
    if isinstance(node, dict):
        if key in node:
            yield node
        for value in node.values():
            yield from parts_with(value, key)


Work = Callable[[str, Model, Path, dict[str, Any]], Iterator[str]]


def _in_process(work: Work, given: tuple[str, Model, Path], row: dict[str, Any], pipe: Any) -> None:
    quiet()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    step = ""
    try:
        for step in work(*given, row):
            pipe.send((step, row))
        pipe.send(("ok", row))
    except Exception as error:
        traceback.print_exc()
        reason = " ".join(str(error).split())[:200]
        pipe.send(("failed", {**row, "outcome": f"{step}: {type(error).__name__}: {reason}"}))


def supervised(
    work: Work, given: tuple[str, Model, Path], row: dict[str, Any], seconds: float
) -> bool:
    """Run the steps in a process of their own and update the row; whether all went well."""
    context = multiprocessing.get_context("forkserver")  # a fork of threads may hang
    context.set_forkserver_preload(["ldt.module", "ldt.criteria.ldt"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_process, args=(work, given, row, sender))
    process.start()
    sender.close()
    step, end = "start", time.monotonic() + seconds
    try:
        while step not in ("ok", "failed"):
            if not receiver.poll(max(0.0, end - time.monotonic())):
                row["outcome"] = f"{step}: not done after {seconds:.0f} s"
                break
            step, found = receiver.recv()
            row.update(found)
    except EOFError:
        process.join()
        row["outcome"] = f"{step}: the process died (exit code {process.exitcode})"
    process.kill()
    process.join()
    return step == "ok"


def examined(family: str, model: Model, seconds: float = 300) -> dict[str, Any]:
    """Examine one model: its parts, the share that can be pruned, and the outcome."""
    row = {"family": family, "config": model.file, "scope": model.scope, "outcome": "ok"}
    with tempfile.TemporaryDirectory() as folder:
        given = (family, model, Path(folder))
        if supervised(examine, given, row, seconds):
            supervised(reload, given, row, seconds)
    return row


def exported(family: str, model: Model, seconds: float = 600) -> str:
    """Return ``yes`` if the model can be exported, or why not."""
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if supervised(export, (family, model, Path(folder)), row, seconds):
            return row["exports"]
    reason = row["outcome"].replace("|", "/")
    for known in ("export: ValueError: ", f"{CANNOT}: ValueError: ", f"{CANNOT}: "):
        reason = reason.partition(known)[2] or reason
    return f"no: {reason}"


def timed(given: tuple[str, Model], only: str | None = None) -> tuple[dict[str, Any], float]:
    """Examine one model, or renew one column of it; give the seconds that took."""
    start, (family, model) = time.monotonic(), given
    row = {"family": family, "config": model.file, "scope": Model.scope, "outcome": ""}
    if only != "exports":
        row = examined(family, model)
    row["exports"] = exported(family, model)
    return row, time.monotonic() - start


def line(row: dict[str, Any]) -> str:
    """Format a row of the table."""
    share = f"{row['share']:.0%}" if "share" in row else ""
    if row["scope"] != Model.scope:
        share = f"{share} of {', '.join(row['scope'])}"
    parts = [row.get(part, "") for part in PARTS]
    cells = [row["family"], row["config"], *parts, share, row.get("exports", ""), row["outcome"]]
    return "| " + " | ".join(cells) + " |"


def write(path: Path, found: list[str]) -> None:
    """Rewrite the table; rows of models that were not run are kept, and cells not measured."""
    known = path.read_text().splitlines() if path.exists() else []
    rows: dict[tuple[str, ...], str] = {}
    for row in known + found:
        if row.startswith("| "):
            earlier = rows.get(key := tuple(row.split(" | ")[:2]))
            rows[key] = row if earlier is None else updated(earlier, row)
    keys = [(f"| {family}", m.file) for family, models in FAMILIES.items() for m in models]
    lines = [rows[key] for key in keys if key in rows]
    failed = {row.split(" | ")[0] for row in lines if not row.endswith(" | ok |")}
    whole = len({row.split(" | ")[0] for row in lines})
    path.write_text(
        TEXT.format(
            ok=whole - len(failed),
            whole=whole,
            rows="\n".join(lines),
            excluded="\n".join(
                f"- {reason}: {', '.join(names.split())}" for reason, names in EXCLUDED.items()
            ),
        )
    )


def updated(earlier: str, row: str) -> str:
    """Return a row with the cells of an earlier one where it has none itself.

    A row with an outcome was examined: only what the export says may be missing in it.
    """
    before, after = earlier.split(" | "), row.split(" | ")
    if after[-1].strip() == "|":  # exported only
        return " | ".join([*before[:EXPORTS], after[EXPORTS], before[-1]])
    if not after[EXPORTS]:
        after[EXPORTS] = before[EXPORTS]
    return " | ".join(after)


TEXT = """# Detectors

What `python benchmarks/zoo.py --write docs/detectors.md` finds. A family is a folder of configs
that mmdet packages, for detecting or segmenting objects in single images, or another library
([own_detector.md](own_detector.md#detectors-of-other-libraries)). Its model, at full width
and depth and from random weights, takes one training step with LDT on small synthetic images; it is
scored with `ldt`, `group_fisher` and `l1`, loses 30 % of the parameters in scope, runs forward in
eval mode and forward and backward in training mode, is saved, and is loaded in a new process, where
it must predict the same; thresholds on scores are lowered, so that there are objects. {ok} of
{whole} families go through all of it.

The scope is `[backbone, neck]` where no other is named; the share that *can be cut* is that of its
convolutions and linear layers, in parameters. The rest is excluded, and a run lists it with the
reasons. An outcome other than ok is the step that failed, and why.

*Exports* tells whether the unpruned model can be written as an ONNX file with boxes, scores and
labels ([deployment.md](deployment.md)) that detects in ONNX Runtime what mmdet detects, on images
that it was not made with. Random weights give boxes of nearly equal scores: up to half of them may
be swapped or missing here, where `ldt export` allows 1 %. `--only exports` renews that column.

| family | config | head | backbone | neck | can be cut | exports | outcome |
|---|---|---|---|---|---|---|---|
{rows}

Folders that are left out:

{excluded}

## The maintained fork of mmdet

`onedl-mmdetection` continues mmdet and installs the same package; with it comes its own mmengine.
ldt depends on mmdet 3.3 and works with the fork in its place:

```sh
pip uninstall -y mmdet mmengine &&
  pip install --no-deps 'onedl-mmdetection==3.5.*' 'onedl-mmengine==0.10.*' imaug
```

A run's `environment.json` names the packages whose modules were imported.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", help="some families; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time, 14 GiB each at most")
    parser.add_argument("--write", type=Path, help="the file with the table")
    parser.add_argument("--debug", action="store_true", help="list the excluded layers")
    parser.add_argument("--only", choices=["exports"], help="renew this column alone")
    arguments = parser.parse_args()
    quiet()
    chosen = [(f, m) for f in arguments.families or FAMILIES for m in FAMILIES[f]]
    start = time.monotonic()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for row, seconds in pool.map(partial(timed, only=arguments.only), chosen):
            print(line(row), f"{seconds:.0f} s", flush=True)
            if arguments.debug:
                print("\n".join(f"    {k}: {v}" for k, v in row.get("left", {}).items()))
            if arguments.write:
                write(arguments.write, [line(row)])
    total = time.monotonic() - start
    print(f"{len(chosen)} models in {total / 60:.1f} minutes, {arguments.jobs} at a time")


if __name__ == "__main__":
    main()
