"""Differences of AP between detectors with intervals: paired over images and replicates.

A replicate is a fold or a seed: every method has one detector in each. Both are drawn anew in every
resampling, replicates first and then images within them, alike for all methods, so that what images
and folds have in common cancels in differences.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ldt.evaluation.kitti_ap import mean_of_known
from ldt.evaluation.resampled_ap import Matches, average_precision

LEVEL = 0.95
MARGIN = 0.01  # AP (of 1) below which two methods count as equal
Key = Any  # hashable


class Interval(NamedTuple):
    """An estimate with its interval; AP of 1.

    Attributes:
        value: on the images and replicates themselves.
        low, high: of the interval.
        p: two-sided probability of a value of 0 or beyond.
        replicates: number of folds or seeds that it rests on.
    """

    value: float
    low: float
    high: float
    p: float
    replicates: int


@dataclass(frozen=True)
class Resampled:
    """AP of cells, on each replicate and its resamplings.

    Attributes:
        values: AP by cell and replicate.
        draws: AP of the resampled images by cell and replicate, [draws] each.
        seed: of the draws.
    """

    values: Mapping[Key, Mapping[Key, float]]
    draws: Mapping[Key, Mapping[Key, np.ndarray]]
    seed: int

    def contrast(self, coefficients: Mapping[Key, float]) -> Interval:
        """Return a weighted sum of cells, on the replicates that all of them have.

        Args:
            coefficients: by cell; +1 and -1 for a difference.

        Raises:
            ValueError: the cells have no replicate in common.
        """
        shared = set.intersection(*(set(self.values[cell]) for cell in coefficients))
        order = sorted(shared, key=str)
        if not order:
            raise ValueError(f"no fold or seed has all of {', '.join(map(str, coefficients))}")
        terms = coefficients.items()
        value = [sum(c * self.values[cell][one] for cell, c in terms) for one in order]
        draws = np.stack([sum(c * self.draws[cell][one] for cell, c in terms) for one in order])
        own = _generator(self.seed, "replicates", *order)
        counts = own.multinomial(len(order), [1 / len(order)] * len(order), draws.shape[1]).T
        return _interval(mean_of_known(value), _weighted(draws, counts), len(order))


def _weighted(draws: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the mean over the drawn replicates, of those that have a value."""
    known = np.where(np.isnan(draws), 0, counts)
    with np.errstate(invalid="ignore"):
        return (np.nan_to_num(draws) * known).sum(0) / known.sum(0)


def _interval(value: float, draws: np.ndarray, replicates: int) -> Interval:
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return Interval(value, float("nan"), float("nan"), 1.0, replicates)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (len(draws) + 1))
    return Interval(value, float(low), float(high), p, replicates)


def resample(
    cells: Mapping[Key, Mapping[Key, Matches]],
    images: Mapping[Key, Key] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Resampled:
    """Compute AP of all cells on resampled images.

    Args:
        cells: matched detections by cell and replicate.
        images: what names the validation images of a replicate; replicates with one name (seeds)
            have the same images, of which the same are drawn. Without it each has its own (folds).
        draws: number of resamplings.
        seed: of the draws, which depend on it and on the names only.

    Raises:
        ValueError: cells have other numbers of images in a replicate.
    """
    weights: dict[Key, np.ndarray] = {}
    values: dict[Key, dict[Key, float]] = {}
    found: dict[Key, dict[Key, np.ndarray]] = {}
    for cell, replicates in cells.items():
        values[cell], found[cell] = {}, {}
        for replicate, matches in replicates.items():
            name = images[replicate] if images else replicate
            if name not in weights:
                own, count = _generator(seed, "images", name), matches.count
                weights[name] = own.multinomial(count, [1 / count] * count, draws)
            if weights[name].shape[1] != matches.count:
                raise ValueError(
                    f"{cell} has {matches.count} images in {replicate}, others have "
                    f"{weights[name].shape[1]}: they are not paired"
                )
            values[cell][replicate] = float(average_precision(matches)[0])
            found[cell][replicate] = average_precision(matches, weights[name])
    return Resampled(values, found, seed)


def _generator(seed: int, *names: Key) -> np.random.Generator:
    return np.random.default_rng([seed, *" ".join(map(str, names)).encode()])


def difference(resampled: Resampled, one: Key, other: Key) -> Interval:
    """Return how much a cell is ahead of another one."""
    return resampled.contrast({one: 1.0, other: -1.0})


def holm(ps: Mapping[Key, float]) -> dict[Key, float]:
    """Return p values that hold for all of a family together (Holm 1979).

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    adjusted, largest = {}, 0.0
    for rank, (key, p) in enumerate(sorted(ps.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(ps) - rank) * p))
        adjusted[key] = largest
    return adjusted


def effects(
    resampled: Resampled,
    score: str,
    rival: str,
    scores: Sequence[str],
    trainings: tuple[str, str] = ("ldt", "plain"),
    key: Callable[[str, str], Key] = lambda training, score: (training, score),
) -> dict[str, Interval]:
    """Return the three effects of the factorial training x score.

    Args:
        resampled: AP of all cells.
        score: the score in question.
        rival: the one it is compared with.
        scores: those over which the training's effect is averaged.
        trainings: the one in question and the other.
        key: the cell of a training and a score.

    Returns:
        ``training``: gain by the training in question, the mean over the scores. ``score``: gain by
        the score over its rival, the mean over the trainings. ``interaction``: gain of the score by
        the training minus that of its rival.
    """
    signs = {trainings[0]: 1.0, trainings[1]: -1.0}
    pair = {score: 1.0, rival: -1.0}
    each = 1 / len(scores)
    coefficients = {
        "training": {key(t, s): sign * each for t, sign in signs.items() for s in scores},
        "score": {key(t, s): sign / 2 for t in trainings for s, sign in pair.items()},
        "interaction": {key(t, s): x * y for t, x in signs.items() for s, y in pair.items()},
    }
    return {name: resampled.contrast(own) for name, own in coefficients.items()}


def verdict(interval: Interval, margin: float = MARGIN) -> str:
    """Return ``ahead``, ``behind``, ``equal`` (within the margin) or ``open``."""
    if interval.low > 0:
        return "ahead"
    if interval.high < 0:
        return "behind"
    return "equal" if -margin < interval.low and interval.high < margin else "open"
