"""Detection data in Lightning's form: mmdet's data sets and pipelines, in a reproducible order.

All the chance in a training batch (which images, and how each is augmented) is a pure function
of the seed, the epoch and the image: it depends neither on the number of workers nor on what
the process drew before, so a resumed run sees the batches that the uninterrupted one saw.
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
from ldt.data.sampling import EpochSampler, TrainingImages
from ldt.recipe import micro_batch
from ldt.runs.inputs import digest, split_record

Split = Literal["train", "val"]
Augment = Literal["none", "flip", "shift", "mosaic"]
Pad = Literal["none", "square"]
OPTIONS = {  # what the user types for each of the data module's
    "batch_size": "recipe.batch_size",
    "val_batch_size": "dataset.val_batch_size",
    "workers": "dataset.workers",
    "seed": "seed",
    "augment": "recipe.augment",
    "pad": "detector.pad",
}
PAD_COLOUR = (114.0, 114.0, 114.0)  # YOLOX's grey
META_KEYS = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")


def need_folder(root: str | Path, option: str, expected: str) -> Path:
    """Return `root` as a path; FileNotFoundError naming what is `expected` there if it is none."""
    path = Path(root).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"no folder {path}; expected there: {expected}. Type {option}=/path/to/it"
        )
    return path


@TRANSFORMS.register_module()
class ReadImage(LoadImageFromFile):
    """mmcv's image reader, which says which file it could not decode.

    Raises FileNotFoundError if the file is gone and ValueError if it is not an image.
    """

    def transform(self, results: dict) -> dict:
        """Add `img` (H, W, 3 uint8, BGR), `img_shape` and `ori_shape` (h, w) to `results`."""
        try:
            loaded = super().transform(results)
        except (AssertionError, cv2.error) as error:
            raise ValueError(
                f"cannot read the image {results['img_path']}: damaged or no image; restore it"
            ) from error
        assert loaded is not None, "only ignore_empty=True returns None"
        return loaded


def resize_steps(scale: tuple[int, int], keep_ratio: bool, pad: str) -> list[dict]:
    """Steps that bring an image to the network's `scale` (w, h), padded to it if `pad`=square."""
    steps: list[dict] = [{"type": "Resize", "scale": scale, "keep_ratio": keep_ratio}]
    if pad == "square":
        steps.append({"type": "Pad", "size": scale, "pad_val": {"img": PAD_COLOUR}})
    return steps


def plain_steps(resize: list[dict], augment: str = "none") -> list[dict]:
    """Pipeline whose boxes are in the coordinates of the network input (loaded *before* Resize)."""
    steps = [{"type": "ReadImage"}, {"type": "LoadAnnotations", "with_bbox": True}, *resize]
    if augment != "none":
        steps.append({"type": "RandomFlip", "prob": 0.5})
    if augment == "shift":
        steps.append({"type": "RandomShift", "prob": 0.5, "max_shift_px": 32})
    return [*steps, {"type": "PackDetInputs"}]


def test_steps(resize: list[dict]) -> list[dict]:
    """mmdet's test pipeline: boxes stay in the original image's coordinates (loaded last)."""
    annotations = {"type": "LoadAnnotations", "with_bbox": True}
    pack = {"type": "PackDetInputs", "meta_keys": META_KEYS}
    return [{"type": "ReadImage"}, *resize, annotations, pack]


def mosaic_steps(scale: tuple[int, int], resize: list[dict]) -> list[Any]:
    """YOLOX's training steps (arXiv 2107.08430), numbers from mmdet's yolox_s_8xb8-300e_coco.

    They follow image and annotation loading. keep_empty=False, against its name, is what makes
    mmdet 3.3's FilterAnnotations keep an image that has no box left.
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
    """Keep a data worker to a single thread; OpenCV's own pool does not survive the fork."""
    cv2.setNumThreads(0)


@dataclass(kw_only=True, eq=False)
class DetectionDataModule(LightningDataModule, ABC):
    """Training, validation, calibration and probe images of one data set.

    Every loader gives `{"inputs": [uint8 (3, h, w), BGR], "data_samples": [DetDataSample]}`.
    A sample has `gt_instances` and `ignored_instances` (either may be empty) with `bboxes`
    (x1, y1, x2, y2) and `labels`, and `img_id` (int, unique in its split: a distributed run
    validates some images twice, and their id tells), `img_path`, `ori_shape`, `img_shape`,
    `scale_factor`. Boxes are in the coordinates of the network input, except in
    `val_dataloader`: there they are in the original image's, as mmdet's predictions are.

    Args:
        root: the data set's folder.
        scale: the network's input size (width, height) in pixels.
        batch_size: training images of one optimizer step, over all processes of a trainer.
        val_batch_size: validation images that a process computes at once.
        workers: loading processes; 0 loads in the main process. Batches do not depend on it.
        seed: of the order, the augmentation and the calibration subset.
        augment: "none", "flip" (left-right), "shift" (YOLOF's, with flip), "mosaic" (YOLOX's).
        pad: "square" pads every image to `scale` with grey, as YOLOX does; "none" does not.
        keep_ratio: fit the image inside `scale`; False stretches it to `scale`.
        classes: names in the order of the labels; empty for the data set's usual ones.

    `resize` holds the steps between reading and packing an image, as mmdet's configs write them.

    Raises ValueError for an option out of range, at construction.
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
        """Read the annotations of `split`; the result needs no pipeline, and `test_mode=True`.

        In test mode mmengine neither drops images without objects nor replaces one that fails
        by a random other.
        """

    @abstractmethod
    def split_ids(self) -> dict[str, list]:
        """Name every image: {"train": [...], "val": [...]}, to be saved with a run."""

    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint what is read: for each split ids in order, annotations, image sizes.

        Where the files lie is no part of it. A data set whose annotations take long to read
        overrides this.

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

    def setup(self, stage: str | None = None) -> None:
        """Read what `stage` needs ("fit" or None: both splits); reads a split only once."""
        for split in ("train", "val") if stage in (None, "fit") else ("val",):
            self.dataset(split)

    def dataset(self, split: Split) -> BaseDataset:
        """Return the annotations of `split` without pipeline, read when first asked for."""
        check_value("split", split, Split)
        if split not in self._datasets:
            self._datasets[split] = self.load(split)
        return self._datasets[split]

    def train_dataloader(self) -> DataLoader:
        """Shuffled and augmented; Lightning tells its sampler the epoch."""
        images = TrainingImages(self._training_images(), self.seed)
        trainer: Any = self.trainer
        world, parts = (trainer.world_size, trainer.accumulate_grad_batches) if trainer else (1, 1)
        if trainer and trainer.overfit_batches:  # always the first ones
            return self._loader(images, micro_batch(self.batch_size, world, parts))
        rank = trainer.global_rank if trainer else 0
        self._sampler = EpochSampler(images, self.batch_size, rank, world, parts, self._mix)
        return self._loader(images, None, self._sampler)

    def val_dataloader(self) -> DataLoader:
        """Validation images in order; ground truth in the original image's coordinates."""
        images = with_pipeline(self.dataset("val"), test_steps(self.resize))
        return self._loader(images, self.val_batch_size)

    def calibration_dataloader(self, images: int, batch_size: int) -> DataLoader:
        """The first `images` of a seeded permutation of the training set, not augmented.

        The same images at every call and in every process. Warns, and gives the whole training
        set, if it has fewer; ValueError if `images` is not positive.
        """
        if images < 1:
            raise ValueError(f"{images} calibration images were asked for; allowed: 1 or more")
        training = self._plain("train")
        if images > len(training):
            available = f"all {len(training)} images of the training set are used"
            warnings.warn(f"{available}, {images} calibration images were asked for", stacklevel=2)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(training), generator=generator)[:images]
        return self._loader(Subset(training, order.tolist()), batch_size)

    def probe_dataloader(self, split: Split, batch_size: int) -> DataLoader:
        """All images of `split` in order, not augmented, boxes in network coordinates."""
        return self._loader(self._plain(split), batch_size)

    def augment_off(self) -> None:
        """Train without mosaic, affine and mix-up from the next epoch on (YOLOX's last epochs).

        Flip and colour stay. Nothing needs to be reloaded: the switch travels with the indices
        (`Draw`), also to persistent workers. Does nothing for the other kinds of `augment`.
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

    def _training_images(self) -> BaseDataset | MultiImageMixDataset:
        if self.augment != "mosaic":
            steps = plain_steps(self.resize, self.augment)
            return with_pipeline(self.dataset("train"), steps)
        load = [{"type": "ReadImage"}, {"type": "LoadAnnotations", "with_bbox": True}]
        single = with_pipeline(self.dataset("train"), load)
        return MultiImageMixDataset(single, mosaic_steps(self.scale, self.resize))

    def _loader(
        self, dataset: Any, batch_size: int | None, sampler: EpochSampler | None = None
    ) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size,
            sampler=sampler,
            num_workers=self.workers,
            persistent_workers=self.workers > 0 and sampler is not None,
            collate_fn=pseudo_collate,
            worker_init_fn=one_thread,
            # Its own generator: starting a loader must not advance torch's global one.
            generator=torch.Generator().manual_seed(self.seed),
        )
