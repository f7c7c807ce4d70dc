"""Images of like shapes in a batch, and the training images that mmdet's data sets leave out."""

import json

import cv2
import numpy as np
import pytest
import torch
from real_data import COCO, YOLOX_NANO, needs

import ldt
from ldt.data.coco import CocoDataModule
from ldt.data.sampling import EpochSampler, SizeSampler
from ldt.detectors.models import input_settings
from ldt.detectors.opening import open_detector

SIZES = [(64, 48), (48, 64), (64, 40), (40, 64), (64, 48), (64, 48), (20, 64), (64, 64), (48, 64)]
NAMES = ("cat", "dog")


class Images:
    seed = 3

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


def steps(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return [[draw.index for draw in batch] for batch in sampler]


# Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [4, 8, 64])
def test_batches_of_one_orientation_hold_every_image_once(batch_size):
    rng = np.random.default_rng(0)
    portrait = (rng.random(101) < 0.3).tolist()
    grouped = EpochSampler(Images(101), batch_size, portrait=portrait)
    found = steps(grouped)
    assert len(found) == len(grouped) == len(EpochSampler(Images(101), batch_size))
    assert sorted(index for step in found for index in step) == list(range(101))
    mixed = [len({portrait[index] for index in step}) > 1 for step in found]
    assert sum(mixed) <= 1  # what is left of both
    assert steps(grouped, 1) != found == steps(grouped)


def test_grouping_changes_nothing_where_all_shapes_are_alike():
    plain = EpochSampler(Images(21), 4)
    for alike in ([False] * 21, [True] * 21):
        assert steps(EpochSampler(Images(21), 4, portrait=alike)) == steps(plain)


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_processes_share_the_steps_of_one(world, accumulate):
    portrait = [index % 3 == 0 for index in range(50)]
    whole = steps(EpochSampler(Images(50), 8, portrait=portrait))
    ranks = [
        steps(EpochSampler(Images(50), 8, rank, world, accumulate, portrait=portrait))
        for rank in range(world)
    ]
    for number, step in enumerate(whole):
        parts = slice(number * accumulate, (number + 1) * accumulate)
        assert set(step) == {index for rank in ranks for part in rank[parts] for index in part}


# Validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 5])
def test_validation_batches_have_one_size_and_ranks_as_many(world):
    sizes = SIZES * 3
    samplers = [SizeSampler(Images(len(sizes)), sizes, 4, rank, world) for rank in range(world)]
    found = [list(sampler) for sampler in samplers]
    assert len({len(batches) for batches in found}) == 1
    assert [len(sampler) for sampler in samplers] == [len(batches) for batches in found]
    batches = [batch for own in found for batch in own]
    assert {index for batch in batches for index in batch} == set(range(len(sizes)))
    assert all(len({sizes[index] for index in batch}) == 1 for batch in batches)
    distinct = {tuple(batch) for batch in batches}
    assert sum(map(len, distinct)) == len(sizes)
    assert len(batches) - len(distinct) < world


def write(root, split, sizes, empty=()):
    """Images of these sizes, each with a box but for those that are empty."""
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    rng = np.random.default_rng(len(split))
    for index, (width, height) in enumerate(sizes):
        pixels = rng.integers(0, 255, (height, width, 3), np.uint8)
        assert cv2.imwrite(str(root / split / f"{index}.png"), pixels)
        size = {"width": width, "height": height}
        images.append({"id": index, "file_name": f"{index}.png", **size})
        if index not in empty:
            box = {"bbox": [4, 4, 12, 12], "area": 144, "iscrowd": 0}
            more = {"id": index + 1, "image_id": index, "category_id": index % 2}
            annotations.append(box | more)
    categories = [{"id": label, "name": name} for label, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))


def module(root, **options):
    return CocoDataModule(root=str(root), scale=(96, 64), classes=NAMES, augment="none", **options)


@pytest.fixture
def root(tmp_path):
    write(tmp_path, "train2017", SIZES, empty=(1, 5))
    write(tmp_path, "val2017", SIZES)
    return tmp_path


def detections(model, data):
    found = {}
    with torch.no_grad():
        for batch in data.val_dataloader():
            for sample in model.test_step(batch):
                found[sample.img_id] = sample.pred_instances
    return found


@pytest.mark.slow
def test_detections_do_not_depend_on_the_batch_size(root):
    torch.manual_seed(0)
    part = {"in_channels": 16, "feat_channels": 16, "stacked_convs": 1}
    norm = {"type": "GN", "num_groups": 4, "requires_grad": True}
    options = {
        "backbone": {"depth": 18, "base_channels": 8, "init_cfg": None},
        "neck": {"in_channels": [8, 16, 32, 64], "out_channels": 16},
        "bbox_head": {**part, "norm_cfg": norm, "num_classes": 2},
        "test_cfg": {"score_thr": 0.0},
    }
    file = root / "small.py"
    file.write_text(f"_base_ = 'mmdet::gfl/gfl_r50_fpn_1x_coco.py'\nmodel = dict(**{options})\n")
    model = open_detector(str(file)).model
    alone = detections(model, module(root, val_batch_size=1))
    grouped = detections(model, module(root, val_batch_size=4, group_shapes=True))
    mixed = detections(model, module(root, val_batch_size=4))
    assert sorted(alone) == sorted(grouped) == list(range(len(SIZES)))
    differs = []
    for image, expected in alone.items():
        torch.testing.assert_close(grouped[image].scores, expected.scores, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(grouped[image].bboxes, expected.bboxes, atol=1e-2, rtol=1e-3)
        same = len(mixed[image]) == len(expected) and torch.allclose(
            mixed[image].scores, expected.scores, atol=1e-5, rtol=1e-4
        )
        differs.append(not same)
    assert any(differs)  # which is why they are grouped


@pytest.mark.slow
@needs(COCO)
@needs(YOLOX_NANO)
def test_ap_of_published_weights_does_not_depend_on_the_batch_size():
    config = "mmdet::yolox/yolox_nano_8xb8-300e_coco.py"
    model, settings = open_detector(config, YOLOX_NANO).model, input_settings(config)
    found = []
    for batch_size in (1, 16):
        data = CocoDataModule(
            root=str(COCO), val_batch_size=batch_size, group_shapes=True, **settings
        )
        data._datasets["val"] = data.dataset("val").get_subset(32)
        found.append(ldt.evaluate(model, data.val_dataloader(), data.classes))
    assert found[0] == pytest.approx(found[1], abs=1e-6, nan_ok=True)
    assert found[0]["AP"] > 0.25


# The filter -----------------------------------------------------------------------------------


def ids(loader):
    return sorted(sample.img_id for batch in loader for sample in batch["data_samples"])


def test_training_leaves_out_what_mmdets_data_sets_do(root):
    every = list(range(len(SIZES)))
    assert ids(module(root, batch_size=4).train_dataloader()) == every
    full = [index for index in every if index not in (1, 5)]
    assert ids(module(root, batch_size=1, filter_empty_gt=True).train_dataloader()) == full
    large = [index for index in full if min(SIZES[index]) >= 32]
    data = module(root, batch_size=1, filter_empty_gt=True, min_size=32, group_shapes=True)
    assert ids(data.train_dataloader()) == large
    assert set(ids(data.calibration_dataloader(4, 2))) <= set(large)
    assert ids(data.val_dataloader()) == every
    assert data.split_ids()["train"] == every  # the filter is a key, not another data set
    with pytest.raises(ValueError, match=r"no training image is left .*min_size=99"):
        module(root, min_size=99).train_dataloader()


def test_mosaic_keeps_images_without_objects(root):
    data = module(root, batch_size=1, filter_empty_gt=True)
    data.augment = "mosaic"
    assert len(data.train_dataloader().dataset) == len(SIZES)
