"""Deterministic sampling and augmentation of training batches by seed and epoch."""

import random
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from mmdet.datasets import MultiImageMixDataset
from mmengine.dataset import BaseDataset
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from ldt.data.mixing import PipelineImages
from ldt.detectors.train_pipelines import MIX
from ldt.recipe import micro_batch


def seed_generators(*key: int) -> int:
    """Seed `random` and `numpy.random` by a hash of the key; return the seed."""
    state = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)  # noqa: NPY002 - mmdet and Torch-Pruning use the global generator
    return state


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed `random` and `numpy.random` (used by mmdet's transforms) and restore them afterwards."""
    saved = random.getstate(), np.random.get_state()  # noqa: NPY002
    seed_generators(*key)
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])  # noqa: NPY002


class Draw(NamedTuple):
    """An index from the sampler to the data set: image, epoch, and whether to mix images.

    Epoch and flag are part of the index because persistent workers hold a copy of the data set
    that cannot be modified from the main process.
    """

    index: int
    epoch: int
    mix: bool


class TrainingImages(Dataset):
    """Training images whose augmentation is a pure function of (seed, epoch, index).

    Args:
        images: the augmented images.
        seed: the seed.
        plain: those of draws without mixing; None: `images`, of which YOLOX's mosaics are switched.
    """

    def __init__(
        self,
        images: BaseDataset | MultiImageMixDataset | PipelineImages,
        seed: int,
        plain: PipelineImages | None = None,
    ) -> None:
        self.images, self.plain = images, plain
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: Draw | int | list[Draw]) -> Any:
        if isinstance(item, list):
            return [self[draw] for draw in item]
        # Plain integers come from the sequential sampler of `trainer.overfit_batches`.
        draw = item if isinstance(item, Draw) else Draw(item, epoch=0, mix=True)
        if isinstance(self.images, MultiImageMixDataset):
            self.images.update_skip_type_keys([] if draw.mix else list(MIX))
        images = self.images if draw.mix or self.plain is None else self.plain
        with seeded(self.seed, draw.epoch, draw.index):
            return images[draw.index]


class EpochSampler(DistributedSampler):
    """Shuffled batches of `Draw`s, a pure function of the seed and of the epoch set by Lightning.

    An optimizer step uses the same `batch_size` images for any number of processes and gradient
    accumulation steps; they are split among the processes per accumulation step. The last step of
    an epoch may be smaller; its first images are repeated to make it divisible.

    It is a DistributedSampler also for one process, so that Lightning does not replace it.

    Landscape and portrait images are in different batches if `portrait` is given, as in mmdet, so
    that little padding is needed; only the last batches of an epoch hold what is left of both.

    Args:
        dataset: the images to sample from.
        batch_size: images per optimizer step, over all processes.
        rank, world: rank of this process and number of processes.
        accumulate: gradient accumulation steps.
        mix: see `Draw`.
        portrait: whether an image is higher than wide, for each image; None: shapes are mixed.

    Raises:
        ValueError: `batch_size` is not divisible.
    """

    def __init__(
        self,
        dataset: TrainingImages,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        mix: bool = True,
        portrait: Sequence[bool] | None = None,
    ) -> None:
        # torch adds the epoch to the seed: avoid equal sums for neighbouring seeds.
        super().__init__(dataset, world, rank, shuffle=True, seed=dataset.seed << 20)
        micro_batch(batch_size, world, accumulate)
        self.images, self.batch_size, self.accumulate = len(dataset), batch_size, accumulate
        self.mix, self.portrait = mix, portrait

    def __len__(self) -> int:
        return -(-self.images // self.batch_size) * self.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:  # type: ignore[override]
        # Evaluated lazily: Lightning sets the epoch between `iter` and the first `next`.
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.images, generator=generator).tolist()
        epoch, mix, world, parts = self.epoch, self.mix, self.num_replicas, self.accumulate
        for step in self._steps(order):
            size = -(-len(step) // (world * parts)) * world  # of a part, over all processes
            step = [step[i % len(step)] for i in range(size * parts)]
            for first in range(0, len(step), size):
                own = step[first + self.rank : first + size : world]
                yield [Draw(index, epoch, mix) for index in own]

    def _steps(self, order: Sequence[int]) -> Iterator[Sequence[int]]:
        """Split an epoch's images into those of each optimizer step."""
        waiting: dict[bool, list[int]] = {False: [], True: []}
        for index in order if self.portrait else ():
            group = waiting[self.portrait[index]]  # type: ignore[index]
            group.append(index)
            if len(group) == self.batch_size:
                yield group.copy()
                group.clear()
        rest = waiting[False] + waiting[True] if self.portrait else order
        for start in range(0, len(rest), self.batch_size):
            yield rest[start : start + self.batch_size]


class SizeSampler(DistributedSampler):
    """Batches of images of equal size, so that none is padded to the size of another.

    Detections then do not depend on the batch size. All ranks have the same number of batches, for
    which the first ones are repeated. A DistributedSampler is not replaced by Lightning.

    Args:
        dataset: the images to sample from.
        sizes: size of each image.
        batch_size: images per batch.
        rank, world: rank of this process and number of processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        sizes: Sequence[Hashable],
        batch_size: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(dataset, world, rank, shuffle=False)
        groups: dict[Hashable, list[int]] = {}
        for index, size in enumerate(sizes):
            groups.setdefault(size, []).append(index)
        batches = sorted(
            group[start : start + batch_size]
            for group in groups.values()
            for start in range(0, len(group), batch_size)
        )
        count = -(-len(batches) // world)
        self.batches = [batches[i % len(batches)] for i in range(rank, count * world, world)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        return iter(self.batches)


class Batches(Dataset):
    """A data set that can be indexed by lists too."""

    def __init__(self, images: BaseDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int | list[int]) -> Any:
        return [self.images[i] for i in item] if isinstance(item, list) else self.images[item]
