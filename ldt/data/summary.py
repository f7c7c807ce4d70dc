"""What a data set holds: counted, and checked before training."""

import logging
from collections import Counter
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_only
from mmcv.image.geometric import rescale_size

from ldt.data.datamodule import DetectionDataModule, ImageFacts, Split
from ldt.data.image_files import shared_images
from ldt.data.tally import Tally

log = logging.getLogger(__name__)
NAMES: dict[Split, str] = {"train": "training", "val": "validation"}
BANDS = {"small": 32**2, "medium": 96**2}  # COCO's: areas below, in pixels; the others are large
MOST_READ = 20_000  # image files compared by content at the start of a run
MOST_TOLD = 8  # classes


class SplitSummary(NamedTuple):
    """Counts of one split.

    Attributes:
        images: number of images.
        empty: of them, those without an object.
        objects: number of objects of each class, the most frequent first.
        ignored: number of ignored regions.
        sizes: number of images of each (width, height).
        bands: number of small, medium and large boxes.
        told: what is left out or changed.
    """

    images: int
    empty: int
    objects: dict[str, int]
    ignored: int
    sizes: Counter[tuple[int, int] | None]
    bands: Counter[str]
    told: Tally


def summarise(data: DetectionDataModule, split: Split) -> SplitSummary:
    """Count what a split holds."""
    facts = data.facts(split)
    counts = zip(data.classes, data.object_counts(split), strict=True)
    return SplitSummary(
        images=len(facts),
        empty=sum(not image.labels for image in facts),
        objects=dict(sorted(counts, key=lambda item: -item[1])),
        ignored=sum(image.ignored for image in facts),
        sizes=Counter(image.size for image in facts),
        bands=Counter(_band(area) for image in facts for area in image.areas),
        told=data.told(split),
    )


def _band(area: float) -> str:
    return next((name for name, limit in BANDS.items() if area < limit), "large")


def check_data(data: DetectionDataModule) -> None:
    """Log what is left out of both splits, and check that a detector can be trained on it.

    Raises:
        ValueError: no training image has an object, or an image is too thin to be resized.
    """
    if rank_zero_only.rank == 0:
        for split, name in NAMES.items():
            for line in data.told(split).lines(expected=True):
                log.info("%s: %s", name, line)
    for split in NAMES:
        _check_resized(data, split)
    counts = data.object_counts("train")
    if not any(counts):
        others = [*data.told("train").lines(), *data.told("train").lines(expected=True)]
        raise ValueError(
            f"none of the training images has an object of {', '.join(data.classes)}: check the "
            f"labels and dataset.classes{''.join(f'; {line}' for line in others)}"
        )
    if rank_zero_only.rank == 0:
        for line in warnings_of(data, MOST_READ):
            log.warning("%s", line)


def warnings_of(data: DetectionDataModule, most_read: int | None = None) -> list[str]:
    """Describe what is likely wrong with a data set, beyond what its splits have told.

    Args:
        data: the data set.
        most_read: image files compared by content at most; None: all of equal size.
    """
    found = data.unread().lines()
    counts = zip(data.classes, data.object_counts("train"), strict=True)
    if missing := [name for name, count in counts if not count]:
        found.append(
            f"{len(missing)} of {len(data.classes)} classes have no object in the training images: "
            f"{_some(missing)}"
        )
    if not any(data.object_counts("val")):
        found.append("none of the validation images has an object: metrics will be nan")
    train, val = ([image.path for image in data.facts(split)] for split in NAMES)
    if shared := shared_images(train, val, most_read):
        found.append(
            f"{len(shared)} images are in both splits, so the metrics are too good; the first: "
            f"{shared[0][0]} and {shared[0][1]}"
        )
    return found


def counts(summary: SplitSummary) -> str:
    """Return the counts of a split as text."""
    objects = _some([f"{name} {count}" for name, count in summary.objects.items()])
    ignored = f", {summary.ignored} ignored regions" if summary.ignored else ""
    return (
        f"{summary.images} images ({summary.empty} without objects), "
        f"{sum(summary.objects.values())} objects ({objects}){ignored}"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:MOST_TOLD]) + (", ..." if names[MOST_TOLD:] else "")


def _check_resized(data: DetectionDataModule, split: Split) -> None:
    """Raise ValueError for an image of which resizing leaves nothing: 2000x1 pixels, say."""
    if not data.keep_ratio or data.augment == "config":
        return
    smallest = data.min_size if split == "train" else 0
    for size, image in _by_size(data.facts(split)).items():
        if min(size) < smallest:
            continue
        if min(resized := rescale_size(size, data.scale)) < 1:
            raise ValueError(
                f"the image {image.path} has {size[0]}x{size[1]} pixels and would be resized to "
                f"{resized[0]}x{resized[1]} for dataset.scale={list(data.scale)}: leave it out"
            )


def _by_size(facts: list[ImageFacts]) -> dict[tuple[int, int], ImageFacts]:
    """Return an image of each size."""
    return {image.size: image for image in facts if image.size is not None}
