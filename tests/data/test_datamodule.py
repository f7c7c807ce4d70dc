"""Laws of the loaders: reproducible batches, and boxes where the network sees them."""

import random
from types import SimpleNamespace

import cv2
import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
from real_data import KITTI, needs
from small import composed
from torch import nn
from torch.utils.data._utils.pin_memory import pin_memory

from ldt.data.kitti import CLASSES, KittiDataModule
from ldt.data.sampling import Draw, EpochSampler, TrainingImages

REST = "1.5 1.6 3.7 1.0 1.5 20.0 -1.5"
SCALE = (64, 32)
DATASETS = ("coco", "kitti", "roadscenes")
AUGMENT = ("none", "flip", "mosaic")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Ten noise images, 8 to train on: two or three boxes each, one of them an ignore region."""
    return write_scenes(tmp_path_factory.mktemp("kitti"), empty=False)


@pytest.fixture(scope="module")
def empty_root(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("empty"), empty=True)


def write_scenes(root, empty):
    rng = np.random.default_rng(0)
    for folder in ("training/image_2", "training/label_2"):
        (root / folder).mkdir(parents=True)
    for index in range(10):
        pixels = rng.integers(0, 255, (40 + index, 100, 3), dtype=np.uint8)
        assert cv2.imwrite(str(root / f"training/image_2/{index:06d}.png"), pixels)
        names = [CLASSES[index % 3], "Car", "Misc"][: 2 + index % 2] + ["DontCare"]
        corners = [(rng.integers(0, 50), rng.integers(0, 20)) for _ in names]
        lines = [
            f"{name} 0 0 0 {x} {y} {x + 30} {y + 19} {REST}\n"
            for name, (x, y) in zip(names, corners, strict=True)
        ]
        (root / f"training/label_2/{index:06d}.txt").write_text("" if empty else "".join(lines))
    return root


def module(folder, **options):
    return KittiDataModule(**{"root": str(folder), "scale": SCALE, "batch_size": 3, **options})


def flatten(loader):
    """Everything in a loader's batches, as a flat list of comparable things."""
    return [item for batch in loader for item in parts(batch)]


def parts(batch):
    for image, sample in zip(batch["inputs"], batch["data_samples"], strict=True):
        yield image.tolist()
        yield sample.metainfo
        for instances in (sample.gt_instances, sample.ignored_instances):
            yield instances.bboxes.tensor.tolist()
            yield instances.labels.tolist()


def samples(loader):
    return [sample for batch in loader for sample in batch["data_samples"]]


def epoch(loader, number):
    loader.sampler.set_epoch(number)
    return flatten(loader)


# Order and chance


@pytest.mark.slow
@pytest.mark.parametrize("augment", AUGMENT)
def test_two_modules_of_one_seed_give_equal_batches_with_any_number_of_workers(root, augment):
    loader = module(root, augment=augment).train_dataloader()
    other = module(root, augment=augment, workers=2).train_dataloader()
    random.seed(7)  # what else the process drew does not matter
    np.random.seed(7)  # noqa: NPY002
    for number in (0, 1):
        assert epoch(loader, number) == epoch(other, number)


@pytest.mark.slow
@pytest.mark.parametrize("augment", AUGMENT)
def test_batches_are_a_function_of_seed_and_epoch(root, augment):
    loader = module(root, augment=augment).train_dataloader()
    first, second = epoch(loader, 0), epoch(loader, 1)
    assert first != second
    assert epoch(loader, 0) == first
    fresh = module(root, augment=augment).train_dataloader()
    assert epoch(fresh, 1) == second  # as in a run that resumes there
    # torch's sampler takes seed + epoch: neighbouring seeds must not repeat each other's epochs
    assert epoch(module(root, augment=augment, seed=1).train_dataloader(), 0) not in (first, second)


@pytest.mark.slow
def test_loading_leaves_the_global_generators_alone(root):
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = state()
    flatten(module(root, augment="mosaic").train_dataloader())
    assert state() == before


def test_two_processes_share_an_epoch_without_overlap(root):
    images = TrainingImages(module(root).dataset("train"), seed=0)
    halves = [drawn(EpochSampler(images, 4, rank, world=2)) for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == list(range(8))


def drawn(sampler):
    return [draw.index for batch in sampler for draw in batch]


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize(("batch_size", "steps"), [(4, 2), (6, 2), (12, 1)])
@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2), (3, 1), (2, 3)])
def test_however_a_step_is_shared_it_sees_the_same_images(
    root, batch_size, steps, world, accumulate, epoch
):
    images = TrainingImages(module(root).dataset("train"), seed=5)
    if batch_size % (world * accumulate):
        with pytest.raises(ValueError, match=rf"recipe.batch_size={batch_size} images .*multiples"):
            EpochSampler(images, batch_size, 0, world, accumulate)
        return
    whole = EpochSampler(images, batch_size)
    ranks = [EpochSampler(images, batch_size, rank, world, accumulate) for rank in range(world)]
    for sampler in (whole, *ranks):
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in ranks]
    assert [len(whole), *map(len, ranks)] == [steps] + [steps * accumulate] * world
    assert [len(found) for found in batches] == [len(sampler) for sampler in ranks]
    for step, alone in enumerate(whole):
        parts = slice(step * accumulate, (step + 1) * accumulate)
        shares = [batch for found in batches for batch in found[parts]]
        assert len({len(share) for share in shares}) == 1  # every gradient weighs the same
        together = [draw for share in shares for draw in share]
        assert set(together) == set(alone)
        assert len(together) - len(alone) < world * accumulate  # the last step is filled up
        assert len(alone) < batch_size or len(together) == batch_size


@pytest.mark.slow
def test_a_plain_index_is_epoch_0(root):
    images = module(root, augment="mosaic").train_dataloader().dataset
    assert torch.equal(images[3]["inputs"], images[Draw(3, 0, True)]["inputs"])


# Coordinates


def originals(data, split):
    """Boxes of the annotations: {img_id: (objects, ignore regions)}, each (n, 4)."""
    dataset, found = data.dataset(split), {}
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        boxes = [
            [item["bbox"] for item in info["instances"] if item["ignore_flag"] == flag]
            for flag in (0, 1)
        ]
        found[info["img_id"]] = [torch.tensor(kind).reshape(-1, 4) for kind in boxes]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("keep_ratio", [True, False])
@pytest.mark.parametrize("pad", ["none", "square"])
def test_boxes_are_in_network_coordinates_but_for_validation(root, keep_ratio, pad):
    data = module(root, augment="none", keep_ratio=keep_ratio, pad=pad)
    for loader, split in (
        (data.train_dataloader(), "train"),
        (data.probe_dataloader("train", 2), "train"),
        (data.calibration_dataloader(5, 2), "train"),
        (data.probe_dataloader("val", 2), "val"),
        (data.val_dataloader(), "val"),
    ):
        wanted = originals(data, split)
        validation = loader.batch_size == data.val_batch_size
        for sample in samples(loader):
            factor = torch.tensor([1.0] * 4 if validation else [*sample.scale_factor] * 2)
            for instances, boxes in zip(
                (sample.gt_instances, sample.ignored_instances), wanted[sample.img_id], strict=True
            ):
                torch.testing.assert_close(instances.bboxes.tensor, boxes * factor)


def test_scale_factor_leads_from_the_original_to_the_resized_image(root):
    for batch in module(root).val_dataloader():
        for image, sample in zip(batch["inputs"], batch["data_samples"], strict=True):
            assert tuple(image.shape[1:]) == sample.img_shape
            sides = [
                s * f for s, f in zip(sample.ori_shape, sample.scale_factor[::-1], strict=True)
            ]
            assert sides == pytest.approx(sample.img_shape)
            assert image.dtype == torch.uint8


def test_square_pads_to_the_scale_with_grey(root):
    plain = module(root).probe_dataloader("train", 1)
    padded = module(root, pad="square").probe_dataloader("train", 1)
    for small, large in zip(plain, padded, strict=True):
        (small,), (large,) = small["inputs"], large["inputs"]
        _, height, width = small.shape
        assert tuple(large.shape[1:]) == SCALE[::-1]
        assert torch.equal(large[:, :height, :width], small)
        assert (large[:, height:] == 114).all()
        assert (large[:, :, width:] == 114).all()


def test_flip_mirrors_pixels_and_boxes_of_half_the_images(root):
    plain = {s.img_id: (i, s) for i, s in images(module(root).probe_dataloader("train", 1))}
    loader = module(root, augment="flip").train_dataloader()
    mirrored = 0
    for number in range(4):
        loader.sampler.set_epoch(number)
        for image, sample in images(loader):
            still, reference = plain[sample.img_id]
            boxes = reference.gt_instances.bboxes.tensor
            if sample.flip:
                still, boxes = still.flip(-1), mirror(boxes, still.shape[-1])
                mirrored += 1
            assert torch.equal(image, still)
            torch.testing.assert_close(sample.gt_instances.bboxes.tensor, boxes)
    assert 0 < mirrored < 32


def mirror(boxes, width):
    return torch.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), 1)


def images(loader):
    for batch in loader:
        yield from zip(batch["inputs"], batch["data_samples"], strict=True)


@pytest.mark.parametrize("augment", AUGMENT)
def test_ignore_regions_are_never_objects(root, augment):
    found = samples(module(root, augment=augment).train_dataloader())
    assert all((sample.gt_instances.labels >= 0).all() for sample in found)
    assert all((sample.ignored_instances.labels == -1).all() for sample in found)
    assert sum(len(sample.ignored_instances) for sample in found) > 0
    assert sum(len(sample.gt_instances) for sample in found) > 0


@pytest.mark.slow
@pytest.mark.parametrize("augment", AUGMENT)
def test_images_without_any_object_are_kept(empty_root, augment):
    data = module(empty_root, augment=augment)
    found = samples(data.train_dataloader())
    assert sorted(sample.img_id for sample in found) == list(range(8))
    for sample in found + samples(data.val_dataloader()):
        assert sample.gt_instances.bboxes.shape == (0, 4)
        assert sample.ignored_instances.bboxes.shape == (0, 4)


# Calibration


def test_calibration_images_are_a_fixed_subset_of_the_training_images(root):
    data = module(root, augment="mosaic")
    subset = flatten(data.calibration_dataloader(4, 2))
    assert flatten(data.calibration_dataloader(4, 1)) == subset
    assert flatten(module(root, workers=2).calibration_dataloader(4, 2)) == subset
    assert flatten(data.calibration_dataloader(6, 4))[: len(subset)] == subset
    assert flatten(module(root, seed=1).calibration_dataloader(4, 2)) != subset
    plain = {s.img_id: i for i, s in images(data.probe_dataloader("train", 1))}
    chosen = list(images(data.calibration_dataloader(4, 1)))
    assert len({sample.img_id for _, sample in chosen}) == 4
    assert all(torch.equal(image, plain[sample.img_id]) for image, sample in chosen)


def test_too_few_or_too_many_calibration_images(root):
    data = module(root)
    with pytest.raises(ValueError, match="0 calibration images"):
        data.calibration_dataloader(0, 2)
    with pytest.warns(UserWarning, match="all 8 images of the training set are used, 9"):
        assert len(samples(data.calibration_dataloader(9, 2))) == 8


# Mosaic


@pytest.mark.slow
def test_mosaic_fills_the_scale(root):
    for image, sample in images(module(root, augment="mosaic").train_dataloader()):
        assert tuple(image.shape[1:]) == sample.img_shape == SCALE[::-1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_augment_off_drops_the_mixing_from_the_next_epoch_on(root, workers):
    data = module(root, augment="mosaic", workers=workers, pad="square")
    loader = data.train_dataloader()
    mixed = epoch(loader, 0)
    running = iter(loader)
    started = list(parts(next(running)))
    data.augment_off()  # the epoch that runs goes on as it began
    assert started + flatten(running) == mixed

    loader.sampler.set_epoch(0)
    wanted = originals(data, "train")
    for sample in samples(loader):  # every image is itself again, up to flip and colour
        boxes = wanted[sample.img_id][0] * torch.tensor([*sample.scale_factor] * 2)
        if sample.flip:  # padding comes after the flip
            boxes = mirror(boxes, sample.ori_shape[1] * sample.scale_factor[0])
        torch.testing.assert_close(sample.gt_instances.bboxes.tensor, boxes)

    plain = epoch(loader, 0)
    assert epoch(data.train_dataloader(), 0) == plain  # a reloaded loader stays switched
    data.augment_on()
    assert epoch(data.train_dataloader(), 0) == mixed


# Under Lightning


class Recorder(lightning.LightningModule):
    """Remembers what it is shown; switches mixing off when epoch 1 starts, if asked."""

    def __init__(self, switch=False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list] = {}
        self.switch = switch

    def on_train_epoch_start(self):
        if self.switch and self.current_epoch == 1:
            self.trainer.datamodule.augment_off()

    def training_step(self, batch, _):
        self.seen.setdefault(self.current_epoch, []).extend(parts(batch))
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data, folder, epochs, switch=False, checkpoint=None, **options):
    recorder = Recorder(switch)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(recorder, data, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "last.ckpt")
    return recorder.seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_advances_the_epoch_also_after_resuming(root, tmp_path, workers):
    loader = module(root).train_dataloader()
    wanted = {number: epoch(loader, number) for number in (0, 1, 2)}
    assert fit(module(root, workers=workers), tmp_path, 2) == {0: wanted[0], 1: wanted[1]}
    resumed = fit(module(root), tmp_path, 3, checkpoint=tmp_path / "last.ckpt")
    assert resumed == {2: wanted[2]}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_augment_off_takes_effect_in_the_epoch_that_starts(root, tmp_path, workers):
    data = module(root, augment="mosaic", workers=workers)
    seen = fit(data, tmp_path, 3, switch=True)
    reference = module(root, augment="mosaic")
    loader = reference.train_dataloader()
    assert seen[0] == epoch(loader, 0)
    reference.augment_off()
    assert seen[1] == epoch(loader, 1)
    assert seen[2] == epoch(loader, 2)


class Brightness(lightning.LightningModule):
    """A line from an image's mean colours to its number of boxes: no statistics of the batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def training_step(self, batch, _):
        colours = torch.stack([image.float().mean((1, 2)) / 255 for image in batch["inputs"]])
        boxes = torch.tensor([float(len(s.gt_instances)) for s in batch["data_samples"]])
        return (colours @ self.weight - boxes).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (4, 4), (6, 2)])
def test_accumulated_parts_of_a_step_train_as_the_whole_step(root, batch_size, accumulate):
    def trained(parts):
        model = Brightness()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_epochs=3,
            accelerator="cpu",
            accumulate_grad_batches=parts,
            enable_progress_bar=False,
            **quiet,
        )
        trainer.fit(model, module(root, batch_size=batch_size))
        return model.weight.detach(), trainer.global_step

    (whole, steps), (parts, same_steps) = trained(1), trained(accumulate)
    assert steps == same_steps == 3 * 2
    assert whole.abs().min() > 0.1
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_overfitting_repeats_the_first_batches(root, tmp_path):
    seen = fit(module(root, augment="none"), tmp_path, 2, overfit_batches=2)
    assert seen[0] == seen[1] != epoch(module(root, augment="none").train_dataloader(), 0)


# Options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale": (640,)}, r"dataset\.scale=\[640\]; .*dataset\.scale=\[640,192\]"),
        ({"scale": (640, 0)}, r"two positive whole numbers, width and height"),
        ({"augment": "mixup"}, r"recipe.augment='mixup'; allowed: none, flip, shift, mosaic"),
        ({"pad": "grey"}, r"detector.pad='grey'; allowed: none, square"),
        ({"batch_size": 0}, r"recipe.batch_size=0; allowed: a whole number of at least 1"),
        ({"val_batch_size": 0}, r"val_batch_size=0"),
        ({"workers": -1}, r"dataset.workers=-1; allowed: a whole number of at least 0"),
        ({"workers": "all"}, r"dataset.workers='all'; allowed: .* auto"),
        ({"seed": -1}, r"seed=-1"),
    ],
)
def test_bad_options_are_refused(root, options, said):
    with pytest.raises(ValueError, match=said):
        module(root, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cpus", "processes", "expected"), [(1, 1, 1), (2, 1, 1), (8, 1, 7), (8, 4, 1), (128, 1, 16)]
)
def test_workers_follow_from_the_cpus_at_hand(root, monkeypatch, cpus, processes, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cpus)), raising=False)
    data = module(root, workers="auto")
    data.trainer = SimpleNamespace(
        num_devices=processes,
        world_size=processes,
        global_rank=0,
        accumulate_grad_batches=1,
        overfit_batches=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    assert data.calibration_dataloader(4, 2).num_workers == expected
    assert module(root, workers=3).calibration_dataloader(4, 2).num_workers == 3


def test_workers_are_counted_in_full_sized_data_sets_and_not_in_small_ones():
    workers = {name: composed(f"dataset={name}").dataset.workers for name in DATASETS}
    assert workers == {"coco": "auto", "kitti": "auto", "roadscenes": 0}


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
def test_images_are_pinned_for_a_gpu_only(root, device, pinned):
    data = module(root)
    assert not data.calibration_dataloader(4, 2).pin_memory
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    assert data.calibration_dataloader(4, 2).pin_memory == pinned


def test_what_is_pinned_are_the_images(root, monkeypatch):
    """The boxes of a sample are too small to matter; torch leaves the samples as they are."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t, *_: pinned.append(t) or t)
    batch = next(iter(module(root).calibration_dataloader(4, 2)))
    found = pin_memory(batch)
    assert [t.dtype for t in pinned] == [torch.uint8] * 2
    assert found["data_samples"][0].gt_instances is batch["data_samples"][0].gt_instances


def test_an_unknown_split_is_refused(root):
    with pytest.raises(ValueError, match="split='test'; allowed: train, val"):
        module(root).probe_dataloader("test", 1)


def test_lists_serve_as_well_as_tuples(root):
    data = module(root, scale=[64, 32], classes=["Car", "Cyclist"])
    assert (data.scale, data.classes) == ((64, 32), ("Car", "Cyclist"))


@pytest.mark.slow
@needs(KITTI)
def test_real_images_give_equal_mosaics_with_any_number_of_workers():
    options = {"scale": (160, 64), "augment": "mosaic", "batch_size": 4}
    batches = [
        list(parts(next(iter(module(KITTI, workers=workers, **options).train_dataloader()))))
        for workers in (0, 2)
    ]
    assert batches[0] == batches[1]
