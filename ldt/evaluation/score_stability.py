"""The channels' utility in every batch of calibration images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldt.criteria.ldt import LDTCriterion, rank_correlation
from ldt.detectors.adapter import Calibration, Detector
from ldt.detectors.forward import eval_with_gradients
from ldt.evaluation.layers import stages


@dataclass(frozen=True, eq=False)
class StageScores:
    """A layer that stands for its stage.

    Attributes:
        name: of the layer.
        utilities: [batches, channels] mean over the batch's images, at least 0.
        correlation: Spearman's, between batches, averaged over their pairs.
    """

    name: str
    utilities: np.ndarray
    correlation: float


def batch_utilities(
    detector: Detector, criterion: LDTCriterion, loader: Any, scope: Sequence[str]
) -> list[StageScores]:
    """Utilities (eq. 16) of the last scored layer of every stage, batch by batch.

    Args:
        detector: an mmdet detector.
        criterion: scores it.
        loader: calibration batches; those without objects are left out.
        scope: parts of the detector that are traced (``prune.scope``).
    """
    with eval_with_gradients(detector.model):
        graph = detector.trace(scope)
        criterion.collect(detector, graph, Calibration(detector, loader))
    order = [name for name, _ in detector.model.named_modules() if name in graph.scored]
    images = np.array(criterion.batch_images)
    found = []
    for stage in stages(order):
        sums = criterion.batch_scores[graph.scored[stage.layers[-1]]]
        rows = np.stack([scores.numpy() for scores in sums])[images > 0]
        utilities = rows / images[images > 0, None]
        found.append(StageScores(stage.layers[-1], utilities, rank_correlation([sums])))
    return found
