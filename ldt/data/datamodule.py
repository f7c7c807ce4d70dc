"""LightningDataModule for mmdet data sets and pipelines, with deterministic batches.

Shuffling and augmentation are a pure function of seed, epoch and image: they depend neither on
the number of workers nor on earlier random draws of the process, so a resumed run sees the same
batches as an uninterrupted one.
"""

import copy
import json
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import torch
from lightning.pytorch import LightningDataModule
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import MultiImageMixDataset
from mmdet.registry import TRANSFORMS
from mmengine.dataset import BaseDataset, Compose, pseudo_collate
from torch.utils.data import DataLoader, Subset

from ldt.config.values import Count, NaturalNumber, check_fields, check_value
from ldt.data.sampling import Batches, EpochSampler, SizeSampler, TrainingImages
from ldt.recipe import micro_batch
from ldt.runs.inputs import digest, split_record

Split = Literal["train", "val"]
Augment = Literal["none", "flip", "shift", "mosaic"]
Pad = Literal["none", "square"]
OPTIONS = {  # config key of each argument of the data module
    "batch_size": "recipe.batch_size",
    "val_batch_size": "dataset.val_batch_size",
    "workers": "dataset.workers",
    "seed": "seed",
    "augment": "recipe.augment",
    "pad": "detector.pad",
}
PAD_COLOUR = (114.0, 114.0, 114.0)  # YOLOX's grey
META_KEYS = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
FOR_METRICS = ("areas", "kitti")  # where a data set has them


def need_folder(root: str | Path, option: str, expected: str) -> Path:
    """Return `root` as a path; raise FileNotFoundError with the `expected` content if missing."""
    path = Path(root).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"no folder {path}; expected there: {expected}. Type {option}=/path/to/it"
        )
    return path


@TRANSFORMS.register_module()
class ReadImage(LoadImageFromFile):
    """LoadImageFromFile whose error names the file that could not be decoded.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not an image or is damaged.
    """

    def transform(self, results: dict) -> dict:
        """Add `img` (H, W, 3 uint8, BGR), `img_shape` and `ori_shape` (h, w) to `results`."""
        try:
            loaded = super().transform(results)
        except (AssertionError, cv2.error) as error:
            raise ValueError(
                f"cannot read the image {results['img_path']}: damaged or not an image; restore it"
            ) from error
        assert loaded is not None, "only ignore_empty=True returns None"
        return loaded


def resize_steps(scale: tuple[int, int], keep_ratio: bool, pad: str) -> list[dict]:
    """Return the steps that resize an image to `scale` (w, h), with padding if `pad`=square."""
    steps: list[dict] = [{"type": "Resize", "scale": scale, "keep_ratio": keep_ratio}]
    if pad == "square":
        steps.append({"type": "Pad", "size": scale, "pad_val": {"img": PAD_COLOUR}})
    return steps


def plain_steps(resize: list[dict], augment: str = "none") -> list[dict]:
    """Return a pipeline with boxes in network-input coordinates (loaded *before* Resize)."""
    steps = [{"type": "ReadImage"}, {"type": "LoadAnnotations", "with_bbox": True}, *resize]
    if augment != "none":
        steps.append({"type": "RandomFlip", "prob": 0.5})
    if augment == "shift":
        steps.append({"type": "RandomShift", "prob": 0.5, "max_shift_px": 32})
    return [*steps, {"type": "PackDetInputs"}]


def test_steps(resize: list[dict]) -> list[dict]:
    """Return the usual test pipeline: boxes in original-image coordinates (loaded after Resize)."""
    annotations = {"type": "LoadAnnotations", "with_bbox": True}
    pack = {"type": "PackDetInputs", "meta_keys": (*META_KEYS, *FOR_METRICS)}
    return [{"type": "ReadImage"}, *resize, annotations, pack]


def mosaic_steps(scale: tuple[int, int], resize: list[dict]) -> list[Any]:
    """Return YOLOX's training steps (arXiv 2107.08430), as in mmdet's yolox_s_8xb8-300e_coco.

    They follow image and annotation loading. Contrary to its name, keep_empty=False makes
    FilterAnnotations of mmdet 3.3 keep images without boxes.
    """
    border = (-scale[0] // 2, -scale[1] // 2)
    return [
        {"type": "Mosaic", "img_scale": scale, "pad_val": 114.0},
        {"type": "RandomAffine", "scaling_ratio_range": (0.1, 2), "border": border},
        {"type": "MixUp", "img_scale": scale, "ratio_range": (0.8, 1.6), "pad_val": 114.0},
        {"type": "YOLOXHSVRandomAug"},
        {"type": "RandomFlip", "prob": 0.5},
        *resize,
        {"type": "FilterAnnotations", "min_gt_bbox_wh": (1, 1), "keep_empty": False},
        {"type": "PackDetInputs"},
    ]


def with_pipeline(dataset: BaseDataset, steps: list[dict]) -> BaseDataset:
    """Return a view of `dataset` that shares its annotations and runs the transforms `steps`."""
    view = copy.copy(dataset)
    view.pipeline = Compose([TRANSFORMS.build(step) for step in steps])
    return view


def one_thread(worker: int) -> None:
    """Limit a data worker to one thread; OpenCV's thread pool does not survive a fork."""
    cv2.setNumThreads(0)


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
        workers: loader processes; 0 loads in the main process. Batches do not depend on it.
        seed: seed of shuffling, augmentation and the calibration subset.
        augment: "none", "flip" (left-right), "shift" (YOLOF's, with flip), "mosaic" (YOLOX's).
        pad: "square" pads every image to `scale` with grey, as YOLOX does; "none" does not.
        keep_ratio: fit the image inside `scale`; False stretches it to `scale`.
        classes: class names in label order; empty for the data set's default.
        group_shapes: little padding: training batches hold either landscape or portrait images, as
            in mmdet, and validation batches images of equal size, so that detections do not depend
            on the batch size. The annotations need ``width`` and ``height``.
        filter_empty_gt: leave out training images without objects, as mmdet's data sets do; not
            where images are mixed (mosaic), as in mmdet's YOLOX.
        min_size: leave out training images whose smaller side has fewer pixels.

    Attributes:
        resize: the transforms between loading and packing an image, as in mmdet's configs.

    Raises:
        ValueError: an argument is out of range.
    """

    root: str | None = None
    scale: tuple[int, int] = (640, 640)
    batch_size: Count = 8
    val_batch_size: Count = 8
    workers: NaturalNumber = 0
    seed: NaturalNumber = 0
    augment: Augment = "flip"
    pad: Pad = "none"
    keep_ratio: bool = True
    classes: tuple[str, ...] = ()
    group_shapes: bool = False
    filter_empty_gt: bool = False
    min_size: NaturalNumber = 0

    def __post_init__(self) -> None:
        super().__init__()
        scale = tuple(int(side) for side in self.scale)
        if len(scale) != 2 or min(scale) < 1:
            raise ValueError(
                f"dataset.scale={list(scale)}; allowed: two positive whole numbers, width and "
                "height in pixels (e.g. dataset.scale=[640,192])"
            )
        self.scale = (scale[0], scale[1])
        self.classes = tuple(self.classes or ())
        check_fields(self, OPTIONS)
        self.resize = resize_steps(self.scale, self.keep_ratio, self.pad)
        self._datasets: dict[str, BaseDataset] = {}
        self._sampler: EpochSampler | None = None
        self._mix = True

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
        counts, dataset = [0] * len(self.classes), self.dataset(split)
        for index in range(len(dataset)):
            for instance in dataset.get_data_info(index)["instances"]:
                if not instance.get("ignore_flag"):
                    counts[instance["bbox_label"]] += 1
        return counts

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
        images = TrainingImages(self._training_images(), self.seed)
        trainer: Any = self.trainer
        world, parts = (trainer.world_size, trainer.accumulate_grad_batches) if trainer else (1, 1)
        if trainer and trainer.overfit_batches:  # always the first images
            return self._loader(images, micro_batch(self.batch_size, world, parts))
        rank = trainer.global_rank if trainer else 0
        shapes = self._sizes(self._training_set()) if self.group_shapes else []
        portrait = [width < height for width, height in shapes]
        self._sampler = EpochSampler(
            images, self.batch_size, rank, world, parts, self._mix, portrait
        )
        return self._loader(images, None, self._sampler)

    def val_dataloader(self) -> DataLoader:
        """Return the validation images; ground truth in original-image coordinates.

        They are in order, unless images of equal size are grouped.
        """
        images = with_pipeline(self.dataset("val"), test_steps(self.resize))
        if not self.group_shapes:
            return self._loader(images, self.val_batch_size)
        trainer: Any = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        sizes = self._sizes(images)
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
        training = with_pipeline(self._training_set(), plain_steps(self.resize))
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

        Flip and colour augmentation stay enabled. Loaders are not recreated: the flag is sent
        with the indices (`Draw`), also to persistent workers. No effect for other values of
        `augment`.
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
        return with_pipeline(self.dataset(split), plain_steps(self.resize))

    def _training_set(self) -> BaseDataset:
        """Return the annotations of the training images that pass the filter."""
        dataset = self.dataset("train")
        empty_go = self.filter_empty_gt and self.augment != "mosaic"
        if not empty_go and not self.min_size:
            return dataset
        if "filtered" not in self._datasets:
            infos = map(dataset.get_data_info, range(len(dataset)))
            kept = [
                index
                for index, info in enumerate(infos)
                if (info["instances"] or not empty_go)
                and (not self.min_size or min(info["width"], info["height"]) >= self.min_size)
            ]
            if not kept:
                raise ValueError(
                    "no training image is left by dataset.filter_empty_gt and dataset.min_size="
                    f"{self.min_size}; type dataset.filter_empty_gt=false or a smaller min_size"
                )
            self._datasets["filtered"] = dataset.get_subset(kept)
        return self._datasets["filtered"]

    def _sizes(self, dataset: BaseDataset) -> list[tuple[int, int]]:
        """Return (width, height) of each image."""
        infos = map(dataset.get_data_info, range(len(dataset)))
        return [(info["width"], info["height"]) for info in infos]

    def _training_images(self) -> BaseDataset | MultiImageMixDataset:
        if self.augment != "mosaic":
            steps = plain_steps(self.resize, self.augment)
            return with_pipeline(self._training_set(), steps)
        load = [{"type": "ReadImage"}, {"type": "LoadAnnotations", "with_bbox": True}]
        single = with_pipeline(self._training_set(), load)
        return MultiImageMixDataset(single, mosaic_steps(self.scale, self.resize))

    def _loader(
        self,
        dataset: Any,
        batch_size: int | None,
        sampler: EpochSampler | SizeSampler | None = None,
    ) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size,
            sampler=sampler,
            num_workers=self.workers,
            persistent_workers=self.workers > 0 and isinstance(sampler, EpochSampler),
            collate_fn=pseudo_collate,
            worker_init_fn=one_thread,
            # Own generator: creating an iterator must not advance torch's global one.
            generator=torch.Generator().manual_seed(self.seed),
        )
