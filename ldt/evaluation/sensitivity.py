"""How a detector's loss or AP changes with the channels of each group, without any training."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch_pruning.pruner.importance import Importance

from ldt.criteria.base import score_groups
from ldt.detectors.adapter import Detector, PreparedBatch
from ldt.detectors.forward import eval_with_gradients
from ldt.pruning.budget import lowest_of
from ldt.pruning.coupled_groups import CoupledGroup
from ldt.pruning.trial import restored
from ldt.runs.files import write_rows

RATES = tuple(tenth / 10 for tenth in range(1, 10))
Measure = Literal["loss", "AP"]
Tell = Callable[[str, int, int], object]  # what is done, how much of it, of how much


class Point(NamedTuple):
    """What is measured without some channels of a group.

    Attributes:
        criterion: by whose scores the channels were chosen.
        group: name of its root layer.
        channels: how many it has.
        removed: how many of them are gone.
        value: loss or AP.
    """

    criterion: str
    group: str
    channels: int
    removed: int
    value: float


@dataclass(frozen=True)
class Sensitivity:
    """Curves of a measure over the channels removed from one group at a time.

    Attributes:
        measure: ``loss`` or ``AP``.
        points: by criterion and group; the first of each curve is that of the whole detector.
        excluded: layers of the scope that cannot be pruned, with the reason.

    Example:
        >>> found = ldt.sensitivity(detector, images, criteria=["l1"], rates=[0.5])
        >>> found.base == found.points[0].value
        True
        >>> [rate for rate, value in found.curves()["l1", found.points[0].group]]
        [0.0, 0.5]
    """

    measure: Measure
    points: list[Point] = field(repr=False)
    excluded: Mapping[str, str] = field(repr=False)

    @property
    def base(self) -> float:
        """What the whole detector has."""
        return self.points[0].value

    def curves(self) -> dict[tuple[str, str], list[tuple[float, float]]]:
        """Return (share removed, value) for every criterion and group."""
        found: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for point in self.points:
            curve = found.setdefault((point.criterion, point.group), [])
            curve.append((point.removed / point.channels, point.value))
        return found

    def harm(self) -> dict[str, dict[str, float]]:
        """Return by group and criterion how much worse it gets on average over the rates.

        A value that is not finite is as bad as can be. The most sensitive group comes first.
        """
        sign = 1 if self.measure == "loss" else -1
        found: dict[str, dict[str, float]] = {}
        for (criterion, group), curve in self.curves().items():
            worse = [sign * (value - self.base) for _, value in curve[1:]]
            bad = float("inf")
            mean = sum(each if isfinite(each) else bad for each in worse) / max(1, len(worse))
            found.setdefault(group, {})[criterion] = mean
        means = {group: sum(each.values()) / len(each) for group, each in found.items()}
        return {group: found[group] for group in sorted(found, key=lambda g: -means[g])}

    def save(self, path: str | Path) -> Path:
        """Write the points as a CSV file with the columns of :class:`Point`; return its path."""
        rows: list[dict[str, Any]] = [point._asdict() for point in self.points]
        for row in rows:
            row[self.measure] = row.pop("value")
        write_rows(Path(path), rows)
        return Path(path)


def measure_sensitivity(
    detector: Detector,
    criteria: Mapping[str, Importance],
    calibration: Iterable[PreparedBatch],
    measure: Callable[[], float],
    rates: Sequence[float],
    scope: Sequence[str],
    seed: int,
    tell: Tell,
) -> tuple[list[Point], dict[str, str]]:
    """Measure a detector without the lowest-scoring channels of one group after the other.

    The channels are removed for real, which takes milliseconds, and put back: unlike masks this is
    exact for norms over several channels too, and narrower layers are faster.

    Args:
        detector: stays as it is.
        criteria: by name.
        calibration: images for their scores.
        measure: measures the detector as it is.
        rates: shares of a group's channels to remove.
        scope: parts of the detector whose layers are pruned.
        seed: of what criteria and losses draw at random.
        tell: is called with the progress.

    Returns:
        The points, and the layers of the scope that cannot be pruned.
    """
    with eval_with_gradients(detector.model), torch.random.fork_rng():
        tell("trace", 0, 0)
        graph = detector.trace(scope)
        scores = {}
        for done, (name, criterion) in enumerate(criteria.items()):
            tell(f"scores of {name}", done, len(criteria))
            torch.manual_seed(seed)
            own = copy(graph)  # a criterion excludes groups that it has no scores for
            own.groups, own.scored = dict(graph.groups), dict(graph.scored)
            own.excluded = dict(graph.excluded)
            scores[name] = score_groups(criterion, detector, own, calibration)
        detector.model.zero_grad(set_to_none=True)

        def measured() -> float:
            torch.manual_seed(seed)  # losses of two stages sample at random
            with torch.no_grad():
                return measure()

        base, points, known = measured(), [], {}
        total = sum(len(_counts(graph.groups[g], rates)) for own in scores.values() for g in own)
        done = 0
        for criterion, name, count, channels in _removals(graph.groups, scores, rates):
            size = graph.groups[name].size
            key = (name, tuple(channels))
            if count and key not in known:
                with restored(detector.model):
                    graph.remove({name: channels})
                    known[key] = measured()
            value = known[key] if count else base
            points.append(Point(criterion, name, size, count, value))
            done += count > 0
            tell(f"measure {name}", done, total)
    return points, dict(graph.excluded)


def _counts(group: CoupledGroup, rates: Sequence[float]) -> list[int]:
    """Return numbers of channels: as many of each part, at least one, not all."""
    size = group.size // group.parts
    counts = {min(max(1, round(rate * size)), size - 1) * group.parts for rate in rates}
    return sorted(counts - {0})


def _removals(
    groups: Mapping[str, CoupledGroup], scores: Mapping[str, Mapping], rates: Sequence[float]
) -> Iterator[tuple[str, str, int, list[int]]]:
    """Yield criterion, group, number of channels and the channels, first of all none."""
    for criterion, of_groups in scores.items():
        for name, own in of_groups.items():
            for count in (0, *_counts(groups[name], rates)):
                yield criterion, name, count, lowest_of(groups[name], own, count)


def mean_loss(detector: Detector, batches: Iterable[PreparedBatch]) -> float:
    """Return the detection loss of batches, averaged over their images."""
    pairs = [(float(detector.detection_loss(batch)), len(batch.images)) for batch in batches]
    return sum(loss * count for loss, count in pairs) / sum(count for _, count in pairs)
