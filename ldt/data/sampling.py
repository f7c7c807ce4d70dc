"""What a training batch holds: which images, and how each is augmented, by seed and epoch."""

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

MIX = ("Mosaic", "RandomAffine", "MixUp")  # what YOLOX switches off for its last epochs


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed `random` and `numpy.random` (the sources of mmdet's transforms), restore them after."""
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
    """What the sampler asks of the training set: an image, the epoch, and whether to mix images.

    Epoch and switch travel with the index because persistent workers hold a copy of the data set
    that nothing else reaches.
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
        # Plain integers come from the sequential order of `trainer.overfit_batches`.
        draw = item if isinstance(item, Draw) else Draw(item, epoch=0, mix=True)
        if isinstance(self.images, MultiImageMixDataset):
            self.images.update_skip_type_keys([] if draw.mix else list(MIX))
        with seeded(self.seed, draw.epoch, draw.index):
            return self.images[draw.index]


class EpochSampler(DistributedSampler):
    """Shuffled batches of `Draw`s, a pure function of (seed, epoch), which Lightning sets.

    An optimizer step sees the same `batch_size` images however many processes and accumulated
    parts share them: they are dealt out among the processes part by part. What is left over at the
    end of an epoch is a smaller step; so that it divides, too, its first images are taken again.

    A DistributedSampler also for one process, so that Lightning never replaces it.

    Args:
        dataset: what is drawn from.
        batch_size: images of one optimizer step, over all processes.
        rank, world: this process, and how many there are.
        accumulate: batches of one process in an optimizer step.
        mix: see `Draw`.

    Raises:
        ValueError: `batch_size` does not divide.
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
        # torch adds the epoch to the seed: keep the epochs of neighbouring seeds apart.
        super().__init__(dataset, world, rank, shuffle=True, seed=dataset.seed << 20)
        micro_batch(batch_size, world, accumulate)
        self.images, self.batch_size, self.accumulate = len(dataset), batch_size, accumulate
        self.mix = mix

    def __len__(self) -> int:
        return -(-self.images // self.batch_size) * self.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:  # type: ignore[override]
        # A generator: Lightning sets the epoch between `iter` and the first `next`.
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
