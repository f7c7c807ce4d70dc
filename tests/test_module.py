"""Laws of the wrapper around a detector: its losses, its optimizer and its checkpoints."""

from contextlib import nullcontext
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from omegaconf import OmegaConf
from short_runs import SCENES
from small import composed
from torch import nn
from torch.utils.data import DataLoader

from ldt.build import build_data, build_module
from ldt.callbacks.ldt_loss import LDTLoss
from ldt.config import RecipeConfig
from ldt.config.values import check_against_schema
from ldt.detectors.forward import find_neck
from ldt.detectors.models import model_config
from ldt.module import DetectorModule, NonFiniteLossError
from ldt.recipe import check_recipe, learning_rate

SIZE = (64, 128)
MANY = [[8, 8, 40, 40], [50, 10, 90, 50], [20, 20, 60, 60], [2, 30, 30, 60]]


@pytest.mark.slow
@pytest.mark.parametrize(("given", "limit"), [((), 100), (("50",), 100), (("300",), 300)])
def test_the_detections_that_count_are_returned_by_the_detector(tmp_path, given, limit):
    options = [f"dataset.max_detections={number}" for number in given]
    config = composed(*SCENES, *options, "run_name=x", f"dataset.cache={tmp_path}")
    plain = OmegaConf.to_container(config, resolve=True)
    module = build_module(config, plain, build_data(config))
    assert module.metrics.max_detections == int(given[0] if given else 100)
    assert module.detector.bbox_head.test_cfg.max_per_img == limit
    assert module.model_config["test_cfg"]["max_per_img"] == limit


def collated(boxes, labels):
    """A batch of two images as a loader gives it; the objects are on the first one."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (3, *SIZE), generator=generator).byte() for _ in range(2)]
    samples = []
    for corners, classes in ((boxes, labels), ([], [])):
        sample = DetDataSample(metainfo={"img_shape": SIZE, "ori_shape": SIZE})
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(corners).float().reshape(-1, 4), labels=torch.tensor(classes).long()
        )
        sample.ignored_instances = sample.gt_instances[:0]
        samples.append(sample)
    return {"inputs": images, "data_samples": samples}


def many():
    return collated(MANY, [0, 0, 1, 1])


def module_of(name="gfl_tiny", **recipe):
    config = composed(f"detector={name}")
    detector = OmegaConf.to_container(config.detector, resolve=True)
    plain = OmegaConf.to_container(config.recipe, resolve=True) | recipe
    model = model_config(detector["config"], detector["options"], 3, pretrained=False)
    torch.manual_seed(0)
    return DetectorModule(model, ("Car", "Pedestrian", "Cyclist"), plain, SIZE)


def fit(module, batches, *callbacks, epochs=1, **options):
    """Train on the given batches; the trainer, for its metrics."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None, num_workers=0))
    return trainer


@pytest.mark.slow
def test_the_total_is_mmdets_sum_and_the_terms():
    module, batch = module_of().train(), many()
    ready = module.adapter.prepare(batch, training=True)
    own = module.adapter.detection_loss(ready)
    squared = sum(f.square().mean() for f in module.adapter.features(ready))

    def terms(maps, objects, detection):
        assert objects.boxes.tolist() == MANY
        return {"loss_x": sum(f.square().mean() for f in maps), "note_x": torch.tensor(1e6)}

    module.loss_terms["x"] = terms
    total = module.training_step(batch, 0)
    torch.testing.assert_close(total, own + squared)
    total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.slow
def test_a_batch_is_scored_with_padded_masks_and_without_augmentation():
    from mmdet.structures.mask import BitmapMasks  # needs ldt's operators, in a new process too

    module, data = module_of(), many()
    preprocess: Any = module.detector.data_preprocessor
    preprocess.pad_mask = True
    preprocess.batch_augments = [lambda inputs, samples: (2 * inputs, samples)]
    size = data["inputs"][0].shape[-2:]
    for sample in data["data_samples"]:
        ones = np.ones((len(sample.gt_instances), size[0] - 8, size[1]), dtype=np.uint8)
        sample.gt_instances.masks = BitmapMasks(ones, size[0] - 8, size[1])
    ready = module.adapter.prepare(data)
    assert all(s.gt_instances.masks.masks.shape[1:] == size for s in ready.samples)
    trained = module.adapter.prepare(data, training=True)
    assert torch.equal(trained.images, 2 * ready.images)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_terms_are_logged_with_their_share_of_the_detection_loss():
    module = module_of()
    module.loss_terms["x"] = lambda maps, *_: {"loss_x": maps[0].square().mean()}
    logged = fit(module, [many()]).callback_metrics
    detection = logged["train/loss"] - logged["train/loss_x"]
    torch.testing.assert_close(logged["train/share_x"], logged["train/loss_x"] / detection)


@pytest.mark.slow
def test_the_hook_on_the_neck_does_not_stay():
    module = module_of().train()
    neck = find_neck(module.detector)
    module.training_step(many(), 0)
    assert not neck._forward_hooks
    module.detector.bbox_head.gfl_cls.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.training_step(many(), 0)
    assert not neck._forward_hooks


@pytest.mark.slow
@pytest.mark.parametrize("source", ["term", "detector"])
def test_a_loss_that_is_not_finite_is_named_with_its_step(source):
    module = module_of().train()
    if source == "term":
        module.loss_terms["x"] = lambda maps, *_: {"loss_x": maps[0].sum() * torch.nan}
    else:
        nn.init.constant_(module.detector.bbox_head.gfl_cls.bias, torch.nan)
    culprit = r"loss_x" if source == "term" else r"loss_cls\b.*"
    with pytest.raises(
        NonFiniteLossError, match=rf"^{culprit} is not finite at step 0 .*clip_grad"
    ):
        module.training_step(many(), 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gfl_tiny", "atss_tiny", "yolox_nano", "yolof_tiny"])
@pytest.mark.parametrize(
    ("boxes", "labels"),
    [([], []), (MANY[:1], [2]), (MANY[:3], [0, 1, 1]), (MANY, [0, 0, 1, 1])],
    ids=["no object", "one object", "one class with one object", "two classes"],
)
def test_ldt_trains_on_any_number_of_objects(name, boxes, labels):
    module = module_of(name)
    before = [p.detach().clone() for p in module.parameters()]
    terms = LDTLoss(alpha=5e-4, beta=7.5, warmup_epochs=0)
    logged = fit(module, [collated(boxes, labels)], terms).callback_metrics
    assert all(value.isfinite() for value in logged.values())
    assert bool(logged["train/loss_ld"] != 0) == (len(boxes) == 4)
    assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mixed_precision_keeps_ldt_finite():
    seen = {}

    class Watch(LDTLoss):
        def __call__(self, features, *rest):
            seen["maps"] = {f.dtype for f in features}
            return super().__call__(features, *rest)

    module = module_of()
    terms = Watch(alpha=5e-4, beta=7.5, warmup_epochs=0)
    logged = fit(module, [many()], terms, precision="bf16-mixed").callback_metrics
    assert torch.bfloat16 in seen["maps"]
    assert logged["train/loss_ld"].isfinite()
    assert logged["train/loss_ld"] < 0 < logged["train/loss_cov"]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in module.parameters())


# Schedules ------------------------------------------------------------------------------------


def rates(steps, scale=1.0, plain=0, **recipe):
    known = OmegaConf.to_container(OmegaConf.structured(RecipeConfig))
    factor = learning_rate(
        known | {"schedule": "constant", "warmup": 0} | recipe, steps, scale=scale, plain=plain
    )
    return [factor(step) for step in range(steps)]


def test_steps_fall_tenfold_at_the_milestones():
    found = rates(24, schedule="step")
    assert found == pytest.approx([1.0] * 16 + [0.1] * 6 + [0.01] * 2)


def test_a_cosine_falls_from_one_to_its_floor():
    found = rates(1000, schedule="cosine", min_lr=0.05)
    assert found[0] == 1.0
    assert found == sorted(found, reverse=True)
    assert found[500] == pytest.approx((1 + 0.05) / 2)
    assert found[-1] == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("quadratic", 0.25)])
def test_warm_up_rises_to_one(shape, half):
    found = rates(100, warmup=10, warmup_shape=shape)
    assert found[4] == pytest.approx(half)
    assert found[9:] == [1.0] * 91
    assert found[:10] == sorted(found[:10])


def test_warm_up_takes_a_fifth_of_a_short_phase_at_most():
    assert rates(10, warmup=500) == rates(10, warmup=2) == [0.5] + [1.0] * 9


def test_a_phase_scales_its_whole_schedule():
    recipe = {"schedule": "cosine", "warmup": 5, "min_lr": 0.1}
    assert rates(50, 0.3, **recipe) == pytest.approx([0.3 * r for r in rates(50, **recipe)])


def test_a_cosine_stays_at_its_floor_for_the_plain_epochs():
    found = rates(100, plain=20, schedule="cosine", min_lr=0.05)
    assert found[:80] == pytest.approx(rates(80, schedule="cosine", min_lr=0.05))
    assert found[80:] == [pytest.approx(0.05)] * 20


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "poly"}, r"recipe.schedule='poly'.*step, cosine, constant"),
        ({"warmup_shape": "cubic"}, r"recipe.warmup_shape='cubic'.*linear, quadratic"),
        ({"warmup_shape": "constant"}, r"recipe.warmup_shape=constant needs recipe.warmup_start"),
        ({"cosine": [0.5, 1.0]}, r"recipe.cosine=\[0.5, 1.0\]"),
        ({"optimizer": {"lr": "abc"}}, r"recipe.optimizer.lr='abc'"),
        ({"optimizer": {}}, r"recipe.optimizer.lr=None"),
    ],
)
def test_a_wrong_recipe_is_told(wrong, message):
    known = OmegaConf.to_container(OmegaConf.structured(RecipeConfig(1, 1, 1)))
    known["optimizer"] = {"lr": 0.1}
    for recipe in (known, known | wrong):
        told = pytest.raises(ValueError, match=message) if recipe is not known else nullcontext()
        with told:
            check_against_schema({"recipe": recipe})
            check_recipe(recipe)


# Optimizer ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_paramwise_keys_reach_their_parameters():
    sgd = {"type": "SGD", "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
    keys = {"norm_decay_mult": 0.0, "custom_keys": {"backbone": {"lr_mult": 0.5}}}
    module = module_of(optimizer=sgd, paramwise=keys, warmup=0, schedule="constant")
    (optimizer,) = fit(module, [many()]).optimizers
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    detector = module.detector
    assert set(groups) == {id(p) for p in module.parameters()}
    assert groups[id(detector.backbone.layer1[0].conv1.weight)]["lr"] == pytest.approx(0.005)
    assert groups[id(detector.bbox_head.gfl_cls.weight)]["lr"] == pytest.approx(0.01)
    assert groups[id(detector.bbox_head.gfl_cls.weight)]["weight_decay"] == 1e-4
    norm = detector.bbox_head.cls_convs[0].gn.weight
    assert groups[id(norm)]["weight_decay"] == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("base", "lr"), [(None, 0.01), (16, 0.00125)])
def test_the_learning_rate_follows_the_batch(base, lr):
    sgd = {"type": "SGD", "lr": 0.01}
    more = {"warmup": 0, "schedule": "constant", "batch_size": 2, "base_batch_size": base}
    (optimizer,) = fit(module_of(optimizer=sgd, **more), [many()]).optimizers
    assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)


# Checkpoints ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_foreign_checkpoint_is_refused():
    module = module_of()
    with pytest.raises(ValueError, match="not written by ldt"):
        module.on_load_checkpoint({"state_dict": {}})
    checkpoint = {"state_dict": module.state_dict()}
    module_of("atss_tiny").on_save_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="another detector"):
        module.on_load_checkpoint(checkpoint)


@pytest.mark.slow
def test_a_checkpoint_brings_its_phase_along():
    module, other, checkpoint = module_of(), module_of(), {}
    module.phase_epochs, module.lr_scale = 7, 0.25
    module.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint | {"state_dict": module.state_dict()})
    assert (other.phase_epochs, other.lr_scale) == (7, 0.25)
