"""Deterministic sampling and augmentation of training batches by seed and epoch."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from mmdet.datasets import MultiImageMixDataset
from mmengine.dataset import BaseDataset
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from ldt.recipe import micro_batch

MIX = ("Mosaic", "RandomAffine", "MixUp")  # disabled by YOLOX for the last epochs


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed `random` and `numpy.random` (used by mmdet's transforms) and restore them afterwards."""
    saved = random.getstate(), np.random.get_state()  # noqa: NPY002
    state = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)  # noqa: NPY002
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
    """Training images whose augmentation is a pure function of (seed, epoch, index)."""

    def __init__(self, images: BaseDataset | MultiImageMixDataset, seed: int) -> None:
        self.images = images
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
        with seeded(self.seed, draw.epoch, draw.index):
            return self.images[draw.index]


class EpochSampler(DistributedSampler):
    """Shuffled batches of `Draw`s, a pure function of the seed and of the epoch set by Lightning.

    An optimizer step uses the same `batch_size` images for any number of processes and gradient
    accumulation steps; they are split among the processes per accumulation step. The last step of
    an epoch may be smaller; its first images are repeated to make it divisible.

    It is a DistributedSampler also for one process, so that Lightning does not replace it.

    Args:
        dataset: the images to sample from.
        batch_size: images per optimizer step, over all processes.
        rank, world: rank of this process and number of processes.
        accumulate: gradient accumulation steps.
        mix: see `Draw`.

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
    ) -> None:
        # torch adds the epoch to the seed: avoid equal sums for neighbouring seeds.
        super().__init__(dataset, world, rank, shuffle=True, seed=dataset.seed << 20)
        micro_batch(batch_size, world, accumulate)
        self.images, self.batch_size, self.accumulate = len(dataset), batch_size, accumulate
        self.mix = mix

    def __len__(self) -> int:
        return -(-self.images // self.batch_size) * self.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:  # type: ignore[override]
        # Evaluated lazily: Lightning sets the epoch between `iter` and the first `next`.
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.images, generator=generator).tolist()
        epoch, mix, world, parts = self.epoch, self.mix, self.num_replicas, self.accumulate
        for start in range(0, self.images, self.batch_size):
            step = order[start : start + self.batch_size]
            size = -(-len(step) // (world * parts)) * world  # of a part, over all processes
            step = [step[i % len(step)] for i in range(size * parts)]
            for first in range(0, len(step), size):
                own = step[first + self.rank : first + size : world]
                yield [Draw(index, epoch, mix) for index in own]
