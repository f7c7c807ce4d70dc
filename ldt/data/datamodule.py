"""LightningDataModule for mmdet data sets and pipelines, with deterministic batches.

Shuffling and augmentation are a pure function of seed, epoch and image: they depend neither on
the number of workers nor on earlier random draws of the process, so a resumed run sees the same
batches as an uninterrupted one.
"""

import json
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import cv2
import torch
from lightning.fabric.utilities import suggested_max_num_workers
from lightning.pytorch import LightningDataModule
from mmdet.datasets import MultiImageMixDataset
from mmengine.dataset import BaseDataset, pseudo_collate
from torch.utils.data import DataLoader, Dataset, Subset

from ldt.config.kinds import LARGEST_SIDE, Augment, Pad, Workers
from ldt.config.values import Count, NaturalNumber, check_fields, check_value
from ldt.data.image_files import MAX_PIXELS
from ldt.data.mixing import PipelineImages
from ldt.data.pipelines import (
    limited,
    plain_steps,
    test_steps,
    with_pipeline,
)
from ldt.data.sampling import Batches, EpochSampler, SizeSampler, TrainingImages
from ldt.data.tally import Tally
from ldt.detectors.train_pipelines import mosaic_steps, resize_steps
from ldt.recipe import micro_batch
from ldt.runs.inputs import digest, split_record

MOST_WORKERS = 16  # of workers=auto: each holds two batches in memory
Split = Literal["train", "val"]
OPTIONS = {  # config key of each argument of the data module
    "batch_size": "recipe.batch_size",
    "val_batch_size": "dataset.val_batch_size",
    "workers": "dataset.workers",
    "max_pixels": "dataset.max_pixels",
    "seed": "seed",
    "augment": "recipe.augment",
    "pad": "detector.pad",
    "mixup": "detector.mixup",
}


def one_thread(worker: int) -> None:
    """Limit a data worker to one thread; OpenCV's thread pool does not survive a fork."""
    cv2.setNumThreads(0)


class ImageFacts(NamedTuple):
    """What the annotations of an image say.

    Attributes:
        path: its file.
        size: (width, height); None if they do not say.
        labels: of its objects, without ignored regions.
        areas: of the boxes of its objects.
        ignored: number of its ignored regions.
    """

    path: str
    size: tuple[int, int] | None
    labels: list[int]
    areas: list[float]
    ignored: int

    @property
    def empty(self) -> bool:
        """Whether it has neither objects nor ignored regions."""
        return not self.labels and not self.ignored


def _facts_in(info: dict[str, Any]) -> ImageFacts:
    objects = [each for each in info["instances"] if not each.get("ignore_flag")]
    size = (info["width"], info["height"]) if {"width", "height"} <= info.keys() else None
    boxes = (each["bbox"] for each in objects)
    return ImageFacts(
        info["img_path"],
        size,
        [each["bbox_label"] for each in objects],
        [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes],
        len(info["instances"]) - len(objects),
    )


@dataclass(kw_only=True, eq=False)
class DetectionDataModule(LightningDataModule, ABC):
    """Training, validation, calibration and probe images of one data set.

    Every loader yields `{"inputs": [uint8 (3, h, w), BGR], "data_samples": [DetDataSample]}`.
    A sample has `gt_instances` and `ignored_instances` (either may be empty) with `bboxes`
    (x1, y1, x2, y2) and `labels`, and `img_id` (int, unique in its split, which
    identifies images repeated in distributed validation), `img_path`, `ori_shape`, `img_shape`,
    `scale_factor`. Boxes are in network-input coordinates, except in `val_dataloader`, where they
    are in original-image coordinates like mmdet's predictions. There samples also have what the
    metrics use, if their data set does: `areas`, the annotated area of every ground truth, and
    `kitti`, all objects of a KITTI label.

    Args:
        root: the data set's folder.
        scale: the network's input size (width, height) in pixels.
        batch_size: training images per optimizer step, over all processes.
        val_batch_size: validation images per batch and process.
        workers: loader processes; 0 loads in the main process, "auto" takes one for each CPU at
            hand but one, at most 16, shared by the training processes. Batches do not depend on it.
        seed: seed of shuffling, augmentation and the calibration subset.
        augment: "none", "flip" (left-right), "shift" (YOLOF's, with flip), "mosaic" (YOLOX's), or
            "config": the transforms of `pipeline`, whatever `scale` and `pad` are.
        pipeline: configs of mmdet's transforms, which load an image and its annotations first.
        plain_pipeline: those after `augment_off`; empty: the same.
        mosaic_scale: range of the random scale of mosaics.
        mixup: whether mosaics are mixed with images.
        pad: "square" pads every image to `scale` with grey, as YOLOX does; "none" does not.
        keep_ratio: fit the image inside `scale`; False stretches it to `scale`.
        classes: class names in label order; empty for the data set's default.
        group_shapes: little padding: training batches hold either landscape or portrait images, as
            in mmdet, and validation batches images of equal size, so that detections do not depend
            on the batch size. The annotations need ``width`` and ``height``.
        filter_empty_gt: leave out training images without objects, as mmdet's data sets do; not
            where images are mixed (mosaic), as in mmdet's YOLOX.
        min_size: leave out training images whose smaller side has fewer pixels.
        max_pixels: of an image; larger ones are refused before they are decoded.

    Attributes:
        resize: the transforms between loading and packing an image, as in mmdet's configs.
        first_epoch: the epoch that training begins with; set it when a run is resumed, for workers
            fetch the first batches before Lightning tells the sampler the epoch.

    Raises:
        ValueError: an argument is out of range.
    """

    root: str | None = None
    scale: tuple[int, int] = (640, 640)
    batch_size: Count = 8
    val_batch_size: Count = 8
    workers: Workers = 0
    seed: NaturalNumber = 0
    augment: Augment = "flip"
    pipeline: Sequence[dict[str, Any]] = ()
    plain_pipeline: Sequence[dict[str, Any]] = ()
    mosaic_scale: tuple[float, float] = (0.1, 2.0)
    mixup: bool = True
    pad: Pad = "none"
    keep_ratio: bool = True
    classes: tuple[str, ...] = ()
    group_shapes: bool = False
    filter_empty_gt: bool = False
    min_size: NaturalNumber = 0
    max_pixels: Count = MAX_PIXELS

    def __post_init__(self) -> None:
        super().__init__()
        scale = tuple(int(side) for side in self.scale)
        if len(scale) != 2 or not 1 <= min(scale) <= max(scale) <= LARGEST_SIDE:
            raise ValueError(
                f"dataset.scale={list(scale)}; allowed: two positive whole numbers, width and "
                f"height in pixels, up to {LARGEST_SIDE} (e.g. dataset.scale=[640,192])"
            )
        self.scale = (scale[0], scale[1])
        self.classes = tuple(self.classes or ())
        if twice := [name for name, count in Counter(self.classes).items() if count > 1]:
            raise ValueError(f"dataset.classes has {twice[0]!r} twice; allowed: each name once")
        check_fields(self, OPTIONS)
        if len(self.mosaic_scale) != 2 or not 0 < self.mosaic_scale[0] <= self.mosaic_scale[1]:
            raise ValueError(
                f"detector.mosaic_scale={list(self.mosaic_scale)}; allowed: the lowest and highest "
                "scale (e.g. detector.mosaic_scale=[0.5,1.5])"
            )
        if self.augment == "config" and not self.pipeline:
            raise ValueError(
                "recipe.augment=config takes mmdet's transforms from recipe.pipeline, which is "
                "empty; type recipe=config, or recipe.augment=flip"
            )
        self.resize = resize_steps(self.scale, self.keep_ratio, self.pad)
        self._datasets: dict[str, BaseDataset] = {}
        self._facts_of: dict[str, list[ImageFacts]] = {}
        self._sampler: EpochSampler | None = None
        self._mix = True
        self.first_epoch = 0

    @abstractmethod
    def load(self, split: Split) -> BaseDataset:
        """Load the annotations of `split`, without a pipeline and with `test_mode=True`.

        In test mode mmengine neither drops images without objects nor replaces an image that
        fails to load by a random one.
        """

    @abstractmethod
    def split_ids(self) -> dict[str, list]:
        """Return the image ids of both splits, to be saved with a run."""

    def fingerprint(self) -> dict[str, Any]:
        """Return fingerprints of each split: ordered ids, annotations and image file sizes.

        They do not depend on the location of the files. Override this for data sets whose
        annotations are slow to read.

        Raises:
            FileNotFoundError: the data set or an image is missing.
        """
        found = {}
        for split, ids in self.split_ids().items():
            dataset = self.dataset("train" if split == "train" else "val")
            infos = [dataset.get_data_info(index) for index in range(len(dataset))]
            objects = digest(json.dumps(info["instances"], default=str) for info in infos)
            found[split] = split_record(ids, [info["img_path"] for info in infos], objects)
        return found

    def object_counts(self, split: Split) -> list[int]:
        """Return the number of objects of each class in a split, without ignored regions."""
        counts = Counter(label for image in self.facts(split) for label in image.labels)
        return [counts[label] for label in range(len(self.classes))]

    def told(self, split: Split) -> Tally:
        """Return what the data set of a split has left out or changed."""
        return getattr(self.dataset(split), "told", Tally())

    def unread(self) -> Tally:
        """Return what lies in the folder of the data and is in neither split."""
        return Tally()

    def setup(self, stage: str | None = None) -> None:
        """Load the splits of `stage` ("fit" or None: both); each split is loaded only once."""
        for split in ("train", "val") if stage in (None, "fit") else ("val",):
            self.dataset(split)

    def dataset(self, split: Split) -> BaseDataset:
        """Return the annotations of `split` without a pipeline, loaded on first access."""
        check_value("split", split, Split)
        if split not in self._datasets:
            self._datasets[split] = self.load(split)
        return self._datasets[split]

    def train_dataloader(self) -> DataLoader:
        """Return the shuffled, augmented training images; Lightning sets the sampler's epoch."""
        plain = self._piped(self.plain_pipeline) if self._switches else None
        images = TrainingImages(self._training_images(), self.seed, plain)
        trainer: Any = self.trainer
        world, parts = (trainer.world_size, trainer.accumulate_grad_batches) if trainer else (1, 1)
        if trainer and trainer.overfit_batches:  # always the first images
            return self._loader(images, micro_batch(self.batch_size, world, parts))
        rank = trainer.global_rank if trainer else 0
        sizes = self._sizes("train", self._kept()) if self.group_shapes else []
        portrait = [width < height for width, height in sizes]
        self._sampler = EpochSampler(
            images, self.batch_size, rank, world, parts, self._mix, portrait
        )
        self._sampler.set_epoch(self.first_epoch)
        return self._loader(images, None, self._sampler)

    def val_dataloader(self) -> DataLoader:
        """Return the validation images; ground truth in original-image coordinates.

        They are in order, unless images of equal size are grouped.
        """
        images = self._view(self.dataset("val"), test_steps(self.resize))
        if not self.group_shapes:
            return self._loader(images, self.val_batch_size)
        trainer: Any = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        sizes = self._sizes("val", range(len(images)))
        sampler = SizeSampler(images, sizes, self.val_batch_size, rank, world)
        return self._loader(Batches(images), None, sampler)

    def calibration_dataloader(self, images: int, batch_size: int) -> DataLoader:
        """Return the first `images` of a seeded permutation of the training set, not augmented.

        They are the same at every call and in every process. If the training set is smaller, a
        warning is issued and all of it is used.

        Raises:
            ValueError: `images` is not positive.
        """
        if images < 1:
            raise ValueError(f"{images} calibration images requested; allowed: 1 or more")
        training = self._view(self.training_set(), plain_steps(self.resize))
        if images > len(training):
            available = f"all {len(training)} images of the training set are used"
            warnings.warn(f"{available}, {images} calibration images requested", stacklevel=2)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(training), generator=generator)[:images]
        return self._loader(Subset(training, order.tolist()), batch_size)

    def probe_dataloader(self, split: Split, batch_size: int) -> DataLoader:
        """Return the images of `split` in order, not augmented, boxes in input coordinates."""
        return self._loader(self._plain(split), batch_size)

    def augment_off(self) -> None:
        """Disable mosaic, affine and mix-up from the next epoch on (YOLOX's last epochs).

        Flip and colour augmentation stay enabled; a given `pipeline` is replaced by
        `plain_pipeline`. Loaders are not recreated: the flag is sent with the indices (`Draw`),
        also to persistent workers. No effect for other values of `augment`.
        """
        self._set_mix(False)

    def augment_on(self) -> None:
        """Undo `augment_off`, from the next epoch on."""
        self._set_mix(True)

    def _set_mix(self, mix: bool) -> None:
        self._mix = mix
        if self._sampler is not None:
            self._sampler.mix = mix

    def _plain(self, split: Split) -> BaseDataset:
        return self._view(self.dataset(split), plain_steps(self.resize))

    def _view(self, dataset: BaseDataset, steps: list[dict]) -> BaseDataset:
        return with_pipeline(dataset, limited(steps, self.max_pixels))

    def _piped(self, steps: Sequence[dict[str, Any]]) -> PipelineImages:
        return PipelineImages(self.training_set(), limited(steps, self.max_pixels))

    def training_set(self) -> BaseDataset:
        """Return the annotations of the training images that pass the filter.

        Raises:
            ValueError: there is none.
        """
        dataset, kept = self.dataset("train"), self._kept()
        if len(kept) == len(dataset):
            return dataset
        if not kept:
            raise ValueError(
                "no training image is left by dataset.filter_empty_gt and dataset.min_size="
                f"{self.min_size}; type dataset.filter_empty_gt=false or a smaller min_size"
            )
        if "filtered" not in self._datasets:
            self._datasets["filtered"] = dataset.get_subset(list(kept))
        return self._datasets["filtered"]

    def _kept(self) -> Sequence[int]:
        """Return the indices of the training images that pass the filter."""
        every = range(len(self.dataset("train")))
        empty_go = self.filter_empty_gt and self.augment != "mosaic"
        if not empty_go and not self.min_size:
            return every
        facts = self.facts("train")
        sizes = self._sizes("train", every) if self.min_size else []
        return [
            index
            for index in every
            if not (empty_go and facts[index].empty)
            and not (self.min_size and min(sizes[index]) < self.min_size)
        ]

    def _sizes(self, split: Split, indices: Iterable[int]) -> list[tuple[int, int]]:
        """Return (width, height) of images.

        Raises:
            ValueError: the annotations of an image do not say.
        """
        facts = self.facts(split)
        sizes = [facts[index].size for index in indices]
        if None in sizes:
            raise ValueError(
                f"{type(self).__name__}: dataset.group_shapes and dataset.min_size need `width` "
                "and `height` in the annotations; type dataset.group_shapes=false "
                "dataset.min_size=0"
            )
        return cast(list[tuple[int, int]], sizes)

    def facts(self, split: Split) -> list[ImageFacts]:
        """Return the facts of every image of a split; its annotations are read once."""
        if split not in self._facts_of:
            dataset = self.dataset(split)
            infos = map(dataset.get_data_info, range(len(dataset)))
            self._facts_of[split] = [_facts_in(info) for info in infos]
        return self._facts_of[split]

    @property
    def _switches(self) -> bool:
        return self.augment == "config" and bool(self.plain_pipeline)

    def _training_images(self) -> BaseDataset | MultiImageMixDataset | PipelineImages:
        if self.augment == "config":
            return self._piped(self.pipeline)
        if self.augment != "mosaic":
            return self._view(self.training_set(), plain_steps(self.resize, self.augment))
        load = [{"type": "ReadImage"}, {"type": "LoadAnnotations", "with_bbox": True}]
        single = self._view(self.training_set(), load)
        low, high = self.mosaic_scale
        steps = mosaic_steps(self.scale, self.resize, (low, high), self.mixup)
        return MultiImageMixDataset(single, steps)

    def _workers(self) -> int:
        """Return the number of loader processes."""
        if self.workers != "auto":
            return self.workers
        processes = cast(Any, self.trainer).num_devices if self.trainer else 1
        return min(suggested_max_num_workers(processes), MOST_WORKERS)

    def _loader(
        self,
        dataset: Dataset,
        batch_size: int | None,
        sampler: EpochSampler | SizeSampler | None = None,
    ) -> DataLoader:
        workers, trainer = self._workers(), cast(Any, self.trainer)
        return DataLoader(
            dataset,
            batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0 and isinstance(sampler, EpochSampler),
            # images in pinned memory are copied to a GPU while the host goes on
            pin_memory=bool(trainer) and trainer.strategy.root_device.type == "cuda",
            collate_fn=pseudo_collate,
            worker_init_fn=one_thread,
            # Own generator: creating an iterator must not advance torch's global one.
            generator=torch.Generator().manual_seed(self.seed),
        )
