"""The utility of channels in every batch of calibration images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ldt.criteria.ldt import LDTCriterion, rank_correlation
from ldt.detectors.adapter import Calibration, Detector, RawBatch
from ldt.detectors.forward import eval_with_gradients
from ldt.evaluation.layers import stages


@dataclass(frozen=True, eq=False)
class StageScores:
    """The scores of a stage's last layer.

    Attributes:
        name: name of the layer.
        utilities: [batches, channels], mean over the batch's images, not negative.
        correlation: Spearman's correlation between batches, averaged over their pairs.
    """

    name: str
    utilities: np.ndarray
    correlation: float


def batch_utilities(
    detector: Detector, criterion: LDTCriterion, loader: Iterable[RawBatch], scope: Sequence[str]
) -> list[StageScores]:
    """Compute the utilities (eq. 16) of the last scored layer of every stage, per batch.

    Args:
        detector: an mmdet detector.
        criterion: the criterion that scores the channels.
        loader: calibration batches; those without objects are omitted.
        scope: parts of the detector to trace (``prune.scope``).
    """
    with eval_with_gradients(detector.model):
        graph = detector.trace(scope)
        criterion.collect(detector, graph, Calibration(detector, loader))
    order = [name for name, _ in detector.model.named_modules() if name in graph.scored]
    images = np.array(criterion.batch_images)
    scores = []
    for stage in stages(order):
        sums = criterion.batch_scores[graph.scored[stage.layers[-1]]]
        rows = np.stack([summed.numpy() for summed in sums])[images > 0]
        utilities = rows / images[images > 0, None]
        scores.append(StageScores(stage.layers[-1], utilities, rank_correlation([sums])))
    return scores
