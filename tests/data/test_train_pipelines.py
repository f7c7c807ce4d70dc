"""Laws of the training pipelines of mmdet's configs, and of YOLOX's mosaics."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmdet.registry import TRANSFORMS
from omegaconf import OmegaConf
from small import composed

from ldt.build import build_data
from ldt.data.mixing import PipelineImages, _tuples
from ldt.data.pipelines import build_transforms, plain_steps
from ldt.data.sampling import Draw, seeded
from ldt.detectors.models import read_config
from ldt.detectors.train_pipelines import (
    UnknownTransformError,
    augmentation,
    mosaic_steps,
    resize_steps,
)

RTMDET = "rtmdet/rtmdet_tiny_8xb32-300e_coco"
DINO = "dino/dino-4scale_r50_8xb2-12e_coco"
SSD = "ssd/ssd300_coco"
GFL = "gfl/gfl_r50_fpn_1x_coco"
YOLOX = "yolox/yolox_s_8xb8-300e_coco"
PACKAGED = {  # every kind of training pipeline among mmdet's detectors
    GFL: "flip",
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco": "flip",
    "yolof/yolof_r50-c5_8xb8-1x_coco": "shift",
    YOLOX: "mosaic",
    "yolox/yolox_nano_8xb8-300e_coco": "mosaic",
    RTMDET: "config",
    DINO: "config",
    SSD: "config",
    "retinanet/retinanet_r50_fpn_ms-640-800-3x_coco": "config",
    "centernet/centernet_r18_8xb16-crop512-140e_coco": "config",
    "yolo/yolov3_d53_8xb8-ms-608-273e_coco": "config",
    "atss/atss_r50_fpn_8xb8-amp-lsj-200e_coco": "config",
}


def read(packaged: str) -> Any:
    return read_config(f"mmdet::{packaged}.py")


@pytest.mark.parametrize(("packaged", "name"), PACKAGED.items())
def test_every_pipeline_is_named_or_built_by_mmdet_as_it_is(packaged, name):
    config = read(packaged)
    found = augmentation(config)
    assert found.augment == name
    if name == "config":
        stored = OmegaConf.to_container(OmegaConf.create(found.pipeline))  # as in config.yaml
        built = build_transforms([_tuples(step) for step in stored])
        given = config.train_dataloader.dataset
        wanted = [TRANSFORMS.build(s) for s in (given.get("dataset") or given).pipeline]
        for mine, packaged_ in zip(built, wanted, strict=True):
            if not type(packaged_).__name__.startswith(("Load", "Pack")):
                assert repr(mine) == repr(packaged_)
    elif name != "mosaic":
        resize = resize_steps((1333, 800), keep_ratio=True, pad="none")
        kinds = [step["type"] for step in plain_steps(resize, name)]
        assert kinds[1:] == [step.type for step in config.train_pipeline][1:]


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["yolox_nano", "yolox_s"])
def test_mosaics_are_those_of_mmdets_yolox(detector):
    config = composed(f"detector={detector}", "recipe=mmdet_yolox").detector
    theirs = read_config(config.config).train_pipeline
    scale = (640, 640)
    resize = resize_steps(scale, keep_ratio=True, pad=config.pad)
    ours = mosaic_steps(scale, resize, tuple(config.mosaic_scale), config.mixup)
    for mine, packaged in zip(ours, theirs, strict=True):
        if mine["type"] == "Pad":  # they pad to a square, we to `scale`: the same at 640x640
            image = np.zeros((300, 640, 3), np.uint8)
            done = [TRANSFORMS.build(s)({"img": image})["img"] for s in (mine, packaged)]
            np.testing.assert_array_equal(*done)
        else:
            assert TRANSFORMS.build(mine).__dict__ == TRANSFORMS.build(packaged).__dict__


@pytest.mark.slow
@pytest.mark.parametrize(("packaged", "ratios"), [("nano", [0.5, 1.5]), ("x", [0.1, 2.0])])
def test_a_config_brings_its_mosaic(packaged, ratios):
    name = f"detector.config=mmdet::yolox/yolox_{packaged}_8xb8-300e_coco.py"
    config = composed("detector=mmdet", name)
    assert config.recipe.augment == "mosaic"
    assert list(config.detector.mosaic_scale) == ratios
    assert config.detector.mixup is (packaged == "x")


def end_of(steps: Any, kind: str) -> Any:
    return next(step for step in steps if step["type"] == kind)


def changed(packaged: str, kind: str, **arguments: Any) -> Any:
    """A packaged config with other arguments of one of its training transforms."""
    config = read(packaged)
    outer = config.train_dataloader.dataset
    steps = [*(outer.get("dataset") or {}).get("pipeline", []), *outer.pipeline]
    end_of(steps, kind).update(arguments)
    return config


@pytest.mark.parametrize(
    ("packaged", "kind", "arguments", "name"),
    [
        (YOLOX, "Resize", {"keep_ratio": False}, "config"),
        (YOLOX, "Resize", {"scale": (320, 320)}, "config"),
        (YOLOX, "Pad", {"size_divisor": 32}, "config"),
        (YOLOX, "Pad", {"pad_to_square": False, "size": (320, 320)}, "config"),
        (YOLOX, "LoadImageFromFile", {"color_type": "grayscale"}, "config"),
        (GFL, "LoadImageFromFile", {"to_float32": True}, "config"),
        (GFL, "LoadImageFromFile", {"backend_args": {"backend": "petrel"}}, "flip"),
        (GFL, "LoadAnnotations", {"box_type": "qbox"}, "config"),
        (GFL, "LoadAnnotations", {"with_mask": True, "poly2mask": False}, "flip"),
    ],
)
def test_other_arguments_are_not_left_out(packaged, kind, arguments, name):
    found = augmentation(changed(packaged, kind, **arguments))
    assert found.augment == name
    if name == "config":
        kind = kind.replace("LoadImageFromFile", "ReadImage")
        assert arguments.items() <= end_of(found.pipeline, kind).items()


def test_a_mosaic_without_a_size_has_mmdets():
    config = read(YOLOX)
    del end_of(config.train_dataloader.dataset.pipeline, "Mosaic")["img_scale"]
    assert augmentation(config).augment == "mosaic"


def test_what_the_last_epochs_skip_is_what_the_hook_says():
    config = read(YOLOX)
    end_of(config.custom_hooks, "YOLOXModeSwitchHook")["skip_type_keys"] = ("Mosaic",)
    found = augmentation(config)
    assert found.augment == "config"
    skipped = [step for step in found.pipeline if step not in found.plain_pipeline]
    assert [step["type"] for step in skipped] == ["Mosaic"]


def test_a_pipeline_of_the_last_epochs_is_kept():
    config = read(GFL)
    last = [step for step in config.train_pipeline if step["type"] != "RandomFlip"]
    config.custom_hooks = [
        {"type": "PipelineSwitchHook", "switch_epoch": 9, "switch_pipeline": last}
    ]
    found = augmentation(config)
    assert found.augment == "config"
    assert len(found.plain_pipeline) == len(found.pipeline) - 1


@pytest.mark.parametrize("kind", ["Mosaic", "MixUp", "CachedMosaic", "CachedMixUp"])
@pytest.mark.parametrize("around", ["RandomApply", "RandomChoice"])
def test_a_transform_of_several_images_is_not_run_inside_of_another(kind, around):
    transforms = [{"type": kind}] if around == "RandomApply" else [[{"type": kind}], []]
    config = read(GFL)
    config.train_dataloader.dataset.pipeline.insert(2, {"type": around, "transforms": transforms})
    message = f"{kind} mixes images, which it cannot do inside of {around}"
    with pytest.raises(UnknownTransformError, match=message):
        augmentation(config)
    with pytest.raises(ValueError, match=message):
        PipelineImages(Any, [{"type": around, "transforms": transforms}])  # type: ignore


# Images -----------------------------------------------------------------------------------------

SCENES = ("dataset.train=6", "dataset.val=2", "dataset.height=64", "dataset.width=128")


def data_of(packaged: str, folder: Path, *overrides: str) -> Any:
    name = f"detector.config=mmdet::{packaged}.py"
    keys = (*SCENES, f"dataset.cache={folder}", *overrides)
    data = build_data(composed("detector=mmdet", name, "run_name=x", *keys))
    data.prepare_data()
    data.setup("fit")
    return data


def pixels(found: Any) -> list:
    return [(image["inputs"].sum().item(), image["data_samples"].img_id) for image in found]


@pytest.mark.slow
@pytest.mark.parametrize("packaged", [RTMDET, DINO, SSD])
def test_images_are_a_function_of_seed_epoch_and_index(packaged, tmp_path):
    data = data_of(packaged, tmp_path)
    images, other = (data.train_dataloader().dataset for _ in range(2))
    there = [Draw(index, 3, True) for index in range(6)]
    first = pixels(images[there])
    assert pixels(other[there[::-1]])[::-1] == first  # whatever was drawn before
    assert pixels(images[[Draw(index, 4, True) for index in range(6)]]) != first
    if packaged == RTMDET:
        plain = images[[Draw(index, 3, False) for index in range(6)]]
        assert pixels(plain) != first
        assert all(image["inputs"].shape[1:] == (640, 640) for image in plain)


def steps_to(packaged: str, kind: str) -> list[dict[str, Any]]:
    """The steps of a pipeline up to and with a transform."""
    steps = augmentation(read(packaged)).pipeline
    return steps[: [step["type"] for step in steps].index(kind) + 1]


@pytest.mark.slow
@pytest.mark.parametrize(("packaged", "images"), [(RTMDET, 8), (YOLOX, 5)])
def test_a_cached_mixup_mixes_mosaics_and_another_one_an_image(packaged, images, tmp_path):
    """RTMDet's own second image went through the earlier transforms, YOLOX's was only loaded."""
    training = data_of(RTMDET, tmp_path).training_set()
    if packaged == RTMDET:
        steps = steps_to(packaged, "CachedMixUp")
    else:
        load = [{"type": "ReadImage"}, {"type": "LoadAnnotations", "with_bbox": True}]
        steps = [*load, *mosaic_steps((640, 640), [])[:3]]
    always = [{**step, "prob": 1.0} if "Cached" in step["type"] else step for step in steps]
    found = PipelineImages(training, always)
    applied: list[str] = []
    for transform in found.transforms:
        _count(transform, applied)
    with seeded(0):
        assert found[0]["img"].dtype == np.uint8
    assert (applied.count("Mosaic") > 1) is (packaged == RTMDET)
    assert applied.count("MixUp") == 1
    assert applied.count("ReadImage") >= images


def _count(transform, applied):
    run = transform.transform

    def count(results):
        applied.append(type(transform).__name__)
        return run(results)

    transform.transform = count


@pytest.mark.slow
def test_an_image_that_is_dropped_is_replaced(tmp_path):
    training = data_of(SSD, tmp_path).training_set()
    drop = {"type": "FilterAnnotations", "min_gt_bbox_wh": (1e4, 1e4), "keep_empty": True}
    with pytest.raises(RuntimeError, match="drops every one of 1000 images"):
        PipelineImages(training, [*augmentation(read(SSD)).pipeline[:2], drop])[0]
