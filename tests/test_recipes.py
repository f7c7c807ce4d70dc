"""Recipes that have a counterpart in mmdet are compared with mmdet's configs, value by value."""

import copy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError
from short_runs import tiny
from small import CONF, composed
from torch import nn

from ldt import experiment
from ldt.build import check_config
from ldt.callbacks.yolox_mode_switch import YOLOXModeSwitch
from ldt.cli.hydra_app import explained
from ldt.config import RecipeConfig
from ldt.data.datamodule import DetectionDataModule
from ldt.detectors.models import build, input_settings, model_config, read_config
from ldt.detectors.recipes import OPTIMIZER, _warn_once
from ldt.module import DetectorModule, build_optimizer
from ldt.recipe import PARAMWISE, check_recipe, learning_rate, set_keys
from ldt.runs import identity

GFL = "gfl/gfl_r50_fpn_1x_coco"
FASTER = "faster_rcnn/faster-rcnn_r50_fpn_1x_coco"
YOLOF = "yolof/yolof_r50-c5_8xb8-1x_coco"
YOLOX = "yolox/yolox_s_8xb8-300e_coco"
NANO = "yolox/yolox_nano_8xb8-300e_coco"
RTMDET = "rtmdet/rtmdet_tiny_8xb32-300e_coco"
DEFORMABLE = "deformable_detr/deformable-detr_r50_16xb2-50e_coco"
DINO = "dino/dino-4scale_r50_8xb2-12e_coco"
FCOS = "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco"  # a constant warm-up, biases of their own
LSJ = "atss/atss_r50_fpn_8xb8-amp-lsj-200e_coco"  # an epoch passes the data several times
BY_ITERATION = "boxinst/boxinst_r50_fpn_ms-90k_coco"
OURS = ("retrain_epochs", "retrain_lr", "channels_last")  # keys that mmdet does not have


def plain(*overrides: str) -> dict[str, Any]:
    """A composed recipe without its null and empty keys."""
    found: Any = OmegaConf.to_container(composed(*overrides).recipe, resolve=True)
    check_recipe(found)
    return found | {key: set_keys(found[key]) for key in ("optimizer", "paramwise")}


def of_config(packaged: str, *overrides: str) -> dict[str, Any]:
    return copy.deepcopy(_of_config(packaged, *overrides))


@cache
def _of_config(packaged: str, *overrides: str) -> dict[str, Any]:
    name = f"detector.config=mmdet::{packaged}.py"
    return plain("detector=mmdet", name, "recipe=config", *overrides)


def theirs(packaged: str) -> Any:
    return copy.deepcopy(_theirs(packaged))


@cache
def _theirs(packaged: str) -> Any:
    return read_config(f"mmdet::{packaged}.py")


# Values -----------------------------------------------------------------------------------------

PACKAGED = [
    ("mmdet_1x", GFL),
    ("mmdet_1x", "atss/atss_r50_fpn_1x_coco"),
    ("mmdet_1x", "retinanet/retinanet_r50_fpn_1x_coco"),
    ("mmdet_yolof", YOLOF),
    ("mmdet_yolox", YOLOX),
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "packaged"), PACKAGED)
def test_a_recipe_of_mmdet_is_that_of_its_config(recipe, packaged):
    ours, read = plain(f"recipe={recipe}"), of_config(packaged)
    if read["schedule"] == "cosine":  # keys without effect on the schedule
        ours["milestones"] = read["milestones"] = []
    if read["warmup_epochs"]:
        ours["warmup"] = read["warmup"] = 0
    assert {k: v for k, v in ours.items() if k not in OURS} == {
        key: value for key, value in read.items() if key not in OURS
    }


EVERY = [GFL, FASTER, YOLOF, YOLOX, NANO, RTMDET, DEFORMABLE, DINO, FCOS, LSJ]


@pytest.mark.slow
@pytest.mark.parametrize("packaged", EVERY)
def test_what_is_read_is_what_the_config_says(packaged):
    found, config = of_config(packaged), theirs(packaged)
    wrapper, kinds = config.optim_wrapper, {h.type: h for h in config.get("custom_hooks") or []}
    assert found["optimizer"] == _lists(wrapper.optimizer)
    assert found["paramwise"] == _lists(wrapper.get("paramwise_cfg") or {})
    assert found["clip_grad"] == (wrapper.get("clip_grad") or {}).get("max_norm")
    repeated = config.train_dataloader.dataset.get("times", 1)
    assert found["epochs"] == found["retrain_epochs"] == config.train_cfg.max_epochs * repeated
    assert found["ema"] == (kinds["EMAHook"].momentum if "EMAHook" in kinds else None)
    assert found["base_batch_size"] == found["batch_size"]
    if packaged != RTMDET:
        assert found["batch_size"] == config.auto_scale_lr.base_batch_size


def _lists(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _lists(value) for key, value in node.items()}
    return [_lists(item) for item in node] if isinstance(node, (list, tuple)) else node


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packaged", "expected"),
    [
        (FASTER, {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4, "type": "SGD"}),
        (DEFORMABLE, {"lr": 2e-4, "weight_decay": 1e-4, "type": "AdamW"}),
        (DINO, {"lr": 1e-4, "weight_decay": 1e-4, "type": "AdamW"}),
        (RTMDET, {"lr": 4e-3, "weight_decay": 0.05, "type": "AdamW"}),
    ],
)
def test_optimizers_known_by_heart(packaged, expected):
    assert of_config(packaged)["optimizer"] == expected


@pytest.mark.slow
def test_a_batch_below_that_of_a_single_gpu_is_that_of_eight():
    assert theirs(RTMDET).auto_scale_lr.base_batch_size == 16  # inherited: lr is not for it
    assert of_config(RTMDET)["batch_size"] == 8 * theirs(RTMDET).train_dataloader.batch_size == 256


@pytest.mark.slow
@pytest.mark.parametrize(("packaged", "epochs"), [(YOLOX, 15), (NANO, 15), (RTMDET, 20), (GFL, 0)])
def test_the_last_epochs_are_those_of_the_hook(packaged, epochs):
    found, config = of_config(packaged), theirs(packaged)
    assert found["plain_epochs"] == epochs
    for hook in config.get("custom_hooks") or []:
        if hook.type == "PipelineSwitchHook":
            assert epochs == config.train_cfg.max_epochs - hook.switch_epoch
        if hook.type == "YOLOXModeSwitchHook":
            assert epochs == hook.num_last_epochs


@pytest.mark.slow
def test_the_papers_recipes_share_with_mmdet_what_the_paper_does_not_say():
    paper, one = plain("recipe=paper"), of_config(GFL)
    assert paper["optimizer"] == one["optimizer"]
    for key in (
        "schedule",
        "milestones",
        "gamma",
        "warmup",
        "warmup_shape",
        "clip_grad",
        "augment",
    ):
        assert paper[key] == one[key], key
    for key in ("momentum", "weight_decay", "type"):
        assert paper["optimizer"][key] == of_config(YOLOF)["optimizer"][key]
    yolox, theirs_ = plain("recipe=paper_yolox"), of_config(YOLOX)
    shared = ("optimizer", "paramwise", "schedule", "min_lr", "warmup_shape", "ema", "augment")
    for key in (*shared, "plain_epochs", "clip_grad"):
        assert yolox[key] == theirs_[key], key


# Schedules --------------------------------------------------------------------------------------


def curve_of_mmengine(config: Any, steps: int, epochs: int) -> list[float]:
    """The learning rate of every step, as a share of that of the config, by mmengine itself."""
    lr = config.optim_wrapper.optimizer.lr
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedulers = []
    for each in copy.deepcopy(config.param_scheduler):
        each.setdefault("end", epochs if each.get("by_epoch", True) else steps)
        arguments = {"optimizer": optimizer, "epoch_length": steps // epochs}
        schedulers.append(PARAM_SCHEDULERS.build(each, default_args=arguments))
    found = []
    optimizer.step()  # once, as schedulers warn otherwise: the rates do not depend on it
    for step in range(1, steps + 1):
        found.append(optimizer.param_groups[0]["lr"] / lr)
        for scheduler in schedulers:
            if not scheduler.by_epoch or step % (steps // epochs) == 0:
                scheduler.step()
    return found


CURVES = [
    ("mmdet_1x", GFL, 250),
    ("mmdet_yolof", YOLOF, 625),
    ("mmdet_yolox", YOLOX, 10),
    ("config", FASTER, 250),
    ("config", FCOS, 250),
    ("config", DEFORMABLE, 20),
    ("config", DINO, 20),
    ("config", NANO, 10),
    ("config", RTMDET, 20),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "packaged", "steps_of_an_epoch"), CURVES)
def test_the_learning_rate_of_every_step_is_mmengines(name, packaged, steps_of_an_epoch):
    recipe = of_config(packaged) if name == "config" else plain(f"recipe={name}")
    config = theirs(packaged)
    epochs = config.train_cfg.max_epochs
    steps = epochs * steps_of_an_epoch
    found = learning_rate(recipe, steps, epochs)
    wanted = curve_of_mmengine(config, steps, epochs)
    assert [found(step) for step in range(steps)] == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_schedule_by_iterations_keeps_its_shares():
    recipe = of_config(BY_ITERATION, "recipe.epochs=10", "recipe.retrain_epochs=10")
    config = theirs(BY_ITERATION)
    steps = config.train_cfg.max_iters
    wanted = curve_of_mmengine(config, steps, 10)
    found = learning_rate(recipe, steps, 10)
    assert [found(step) for step in range(steps)] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_a_shorter_training_keeps_the_shape():
    long, short = of_config(FASTER), of_config(FASTER, "recipe.epochs=3", "recipe.warmup=0")
    assert short["milestones"] == long["milestones"]
    found = learning_rate(short, 36, 3)
    assert [round(found(step), 9) for step in range(36)] == [1.0] * 24 + [0.1] * 9 + [0.01] * 3


# Optimizer --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("packaged", [FASTER, DEFORMABLE, NANO, RTMDET, YOLOF, FCOS])
def test_every_parameter_has_mmengines_rate_and_decay(packaged):
    detector = build(model_config(f"mmdet::{packaged}.py", {}, 3, pretrained=False), False)
    wanted = build_optim_wrapper(detector, theirs(packaged).optim_wrapper).optimizer
    found = build_optimizer(detector, of_config(packaged))
    assert type(found) is type(wanted)
    assert _by_parameter(found) == _by_parameter(wanted)


def _by_parameter(optimizer):
    return {
        id(parameter): {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


# What is given on top, and what cannot be read --------------------------------------------------

CHANGED = ["recipe.epochs=3", "recipe.batch_size=8", "recipe.optimizer.lr=0.5", "recipe.ema=0.01"]


@pytest.mark.slow
def test_keys_on_top_win():
    more = ["recipe.paramwise.norm_decay_mult=0", "recipe.milestones=[0.5]", "recipe.augment=none"]
    found, read = of_config(FASTER, *CHANGED, *more), of_config(FASTER)
    assert (found["epochs"], found["batch_size"], found["ema"]) == (3, 8, 0.01)
    assert found["base_batch_size"] == 16  # the learning rate follows the batch
    assert found["optimizer"] == read["optimizer"] | {"lr": 0.5}
    assert found["paramwise"] == {"norm_decay_mult": 0}
    assert (found["milestones"], found["augment"]) == ([0.5], "none")


def own_config(folder: Path, text: str, base: str = FASTER) -> str:
    file = folder / "own.py"
    file.write_text(f"_base_ = ['mmdet::{base}.py']\n{text}\n")
    return str(file)


ONE_CYCLE = "param_scheduler = dict(_delete_=True, type='OneCycleLR', eta_max=1, total_steps=9)"
TWO_STEPS = "param_scheduler = [dict(type='MultiStepLR', milestones=[3])] * 2"
POLY = "param_scheduler = [dict(type='PolyLR', power=0.9)]"
DECAY = "param_scheduler = [dict(type='LinearLR', start_factor=1.0, end_factor=0.1, end=12)]"
EMA_LIKE_RTMDET = "dict(type='EMAHook', ema_type='ExpMomentumEMA', update_buffers=True)"
HOOK = "custom_hooks = [dict(type='MeanTeacherHook')]"
EMA = "custom_hooks = [dict(type='EMAHook')]"
CLIP = "optim_wrapper = dict(clip_grad=dict(clip_value=3))"
ACCUMULATED = "optim_wrapper = dict(accumulative_counts=4)"
APEX = "optim_wrapper = dict(type='ApexOptimWrapper')"
COSINE = "param_scheduler = [dict(type='CosineAnnealingLR', eta_min=1e-4, T_max=12, by_epoch=True)]"
RATES = f"optim_wrapper = dict(paramwise_cfg=dict(bias_lr_mult=2.0))\n{COSINE}"
KEY_RATES = (
    f"optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(neck=dict(lr_mult=0.1))))\n{COSINE}"
)
NO_LR = f"optim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD'))\n{COSINE}"
NO_MILESTONES = "param_scheduler = [dict(type='MultiStepLR')]"
NO_TYPE = "custom_hooks = [dict(priority=1)]"
NO_HOOK = "custom_hooks = ['EMAHook']"
NESTED = """
train_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile'),
    dict(type='RandomApply', transforms=[dict(type='CachedMosaic')])]))"""
KEYS = "optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.9))"
PASTE = """
train_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile'),
    dict(type='CopyPaste'), dict(type='PackDetInputs')]))"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (POLY, r"recipe.schedule of .*own.py: the scheduler PolyLR\(power=0.9\) cannot be express"),
        (TWO_STEPS, r"the scheduler MultiStepLR\(milestones=\[3\]\) cannot be expressed"),
        (DECAY, r"the scheduler LinearLR\(.*end=12\) cannot be expressed"),
        (
            HOOK,
            r"recipe.ema of .*: the hook MeanTeacherHook is not run here: recipe.ema=null, or a",
        ),
        (
            EMA.replace("custom_hooks = [", "default_hooks = dict(ema=").replace(")]", "))"),
            r"recipe.ema of .*ExponentialMovingAverage.* cannot be expressed",
        ),
        (ACCUMULATED, r"optim_wrapper.accumulative_counts=4 is not read: remove it, multiply"),
        (APEX, r"optim_wrapper.type=ApexOptimWrapper is not known"),
        ("optim_wrapper = dict(use=1)", r"optim_wrapper has the key use"),
        (RATES, r"eta_min=0.0001 together with bias_lr_mult of .*: write eta_min_ratio=0.005"),
        (KEY_RATES, r"eta_min=0.0001 together with neck.lr_mult of paramwise_cfg"),
        (NO_LR, r"recipe.schedule of .*eta_min=0.0001 is a share of an lr that its optimizer lack"),
        (
            NO_MILESTONES,
            r"recipe.schedule of .*own.py: the config cannot be read \(it lacks the ke",
        ),
        (NO_TYPE, r"recipe.ema of .*own.py: the config cannot be read \(it lacks the key 'type'\)"),
        (NO_HOOK, r"recipe.ema of .*own.py: the config cannot be read \("),
        (NESTED, r"the transform CachedMosaic mixes images, .* inside of RandomApply"),
        (EMA, r"recipe.ema of .*ExponentialMovingAverage.* cannot be expressed, only .*ExpMoment"),
        (CLIP, r"recipe.clip_grad of .*clip_value.* is not clipping by the norm"),
        (KEYS, r"recipe.paramwise.* of .*: paramwise_cfg has the key decay_rate"),
        ("optim_wrapper = dict(constructor='Layers')", r"optim_wrapper.constructor=Layers is not"),
        ("optim_wrapper = dict(optimizer=dict(rho=1))", r"its optimizer has the key rho"),
        ("auto_scale_lr = dict(_delete_=True, enable=False)", r"recipe.batch_size of .*what lr is"),
        (PASTE, r"recipe.augment of .*: the transform CopyPaste needs more than images with boxes"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_name_and_what_to_type(tmp_path, text, message):
    path = own_config(tmp_path, text)
    with pytest.raises(InterpolationResolutionError, match=message) as raised:
        plain("detector=mmdet", f"detector.config={path}")
    assert "give it on top, or choose another recipe (e.g. recipe=mmdet_1x)" in str(raised.value)
    plain("detector=mmdet", f"detector.config={path}", "recipe=mmdet_1x")


@pytest.mark.slow
@pytest.mark.parametrize("packaged", [NANO, RTMDET, FASTER])
def test_what_is_inherited_from_a_package_is_what_the_package_says(tmp_path, packaged):
    path = own_config(tmp_path, "model = dict()", packaged)
    assert plain("detector=mmdet", f"detector.config={path}") == of_config(packaged)


@pytest.mark.slow
def test_an_unknown_hook_is_left_out_by_a_key(tmp_path):
    path = own_config(tmp_path, HOOK)
    assert plain("detector=mmdet", f"detector.config={path}", "recipe.ema=null")["ema"] is None


@pytest.mark.slow
@pytest.mark.parametrize("hooks", ["custom_hooks = [{}]", "default_hooks = dict(ema={})"])
def test_the_moving_average_is_read_wherever_the_hook_is(tmp_path, hooks):
    path = own_config(tmp_path, hooks.format(EMA_LIKE_RTMDET.replace(")", ", momentum=0.01)")))
    assert plain("detector=mmdet", f"detector.config={path}")["ema"] == 0.01


@pytest.mark.slow
def test_a_guessed_batch_is_told_once(caplog):
    _warn_once.cache_clear()
    for _ in range(2):
        _of_config.__wrapped__(RTMDET)
    told = [each.message for each in caplog.records if "base_batch_size" in each.message]
    assert len(told) == 1
    assert told[0].endswith("taken to be for 8 GPUs (recipe.base_batch_size=256)")


@pytest.mark.slow
@pytest.mark.parametrize("ratio", ["eta_min=0.0", "eta_min_ratio=0.05"])
def test_a_share_may_come_with_other_rates(tmp_path, ratio):
    path = own_config(tmp_path, RATES.replace("eta_min=1e-4", ratio))
    found = plain("detector=mmdet", f"detector.config={path}")
    assert found["min_lr"] == (0.05 if "ratio" in ratio else 0)


RESIZE = """
test_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile'),
    dict(type='Resize', {}), dict(type='PackDetInputs')]))"""


def test_an_input_size_is_a_scale(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(RESIZE.format("scale=640"))
    assert input_settings(str(file))["scale"] == (640, 640)
    file.write_text(RESIZE.format("scale_factor=0.5"))
    with pytest.raises(ValueError, match="no test pipeline with a scale in its Resize"):
        input_settings(str(file))


@pytest.mark.slow
@pytest.mark.parametrize(("packaged", "l1"), [(NANO, True), (RTMDET, False), (FASTER, True)])
def test_a_switch_of_the_pipeline_alone_brings_no_l1_loss(packaged, l1):
    assert of_config(packaged)["plain_l1"] is l1


@pytest.mark.parametrize("l1", [True, False])
def test_the_l1_loss_of_the_last_epochs_follows_its_key(l1):
    trainer, module = Mock(current_epoch=3), Mock(spec=DetectorModule)
    trainer.datamodule = Mock(spec=DetectionDataModule)
    head = SimpleNamespace(use_l1=False)
    module.detector = SimpleNamespace(bbox_head=head)
    YOLOXModeSwitch(lambda epoch: epoch == 4, 2, l1).on_train_epoch_start(trainer, module)
    trainer.datamodule.augment_off.assert_called_once()
    assert head.use_l1 is l1


@pytest.mark.slow
def test_what_is_given_need_not_be_read():
    with pytest.raises(InterpolationResolutionError) as raised:
        of_config(BY_ITERATION)
    told = f"recipe.epochs of mmdet::{BY_ITERATION}.py: train_cfg counts 90000 iterations"
    assert explained(raised.value).startswith(told)
    found = of_config(BY_ITERATION, "recipe.epochs=3", "recipe.retrain_epochs=2")
    assert (found["epochs"], found["retrain_epochs"]) == (3, 2)


@pytest.mark.slow
def test_a_pipeline_of_another_size_is_told():
    name = f"detector.config=mmdet::{DEFORMABLE}.py"
    config = composed("detector=mmdet", name, "dataset.scale=[640,360]", "run_name=x")
    with pytest.raises(ValueError, match=r"type dataset.scale=\[1333,800\], or recipe.augment=fl"):
        check_config(config)
    check_config(composed("detector=mmdet", name, "dataset.scale=[1333,800]", "run_name=x"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packaged", "pad", "scale"), [(YOLOX, "square", [640, 640]), (GFL, "none", [1333, 800])]
)
def test_the_input_follows_the_config(packaged, pad, scale):
    name = f"detector.config=mmdet::{packaged}.py"
    config = composed("detector=mmdet", name, "dataset=kitti")
    assert (config.detector.pad, config.dataset.scale) == (pad, scale)


# Identity ---------------------------------------------------------------------------------------

SMALL = """
model = dict(
    backbone=dict(depth=18, base_channels=8, frozen_stages=-1),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1))
optim_wrapper = dict(optimizer=dict(lr=0.001))
"""


@pytest.mark.slow
@pytest.mark.long
def test_an_edited_recipe_is_another_run(tmp_path):
    keys = ("detector=mmdet", "method=none", "report.pictures=0")
    base = "retinanet/retinanet_r50_fpn_1x_coco"
    path = own_config(tmp_path, SMALL, base)
    again = tiny(tmp_path, *keys, f"detector.config={path}")
    experiment.run(again, tmp_path / "run")
    stored = OmegaConf.load(tmp_path / "run/config.yaml").recipe
    assert (stored.optimizer.lr, stored.schedule, stored.base_batch_size) == (0.001, "step", 16)
    experiment.run(tiny(tmp_path, *keys, f"detector.config={path}"), tmp_path / "run")
    own_config(tmp_path, SMALL.replace("0.001", "0.002"), base)
    with pytest.raises(
        identity.OtherRunError, match=r"recipe.optimizer.lr: 0.001 there, 0.002 now"
    ):
        experiment.run(tiny(tmp_path, *keys, f"detector.config={path}"), tmp_path / "run")


def test_every_key_of_a_recipe_is_read():
    known = set(OmegaConf.to_container(OmegaConf.structured(RecipeConfig)))
    read = OmegaConf.to_container(OmegaConf.load(Path(CONF) / "recipe/config.yaml"), resolve=False)
    assert set(read) == known - {"retrain_lr", "channels_last"}
    assert set(read["paramwise"]) == set(PARAMWISE)
    assert set(read["optimizer"]) == set(OPTIMIZER)
