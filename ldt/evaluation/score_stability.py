"""The channels' utility in every batch of calibration images."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ldt.criteria.ldt import LDTCriterion, rank_correlation
from ldt.detectors.forward import evaluating
from ldt.figures.channels import stages
from ldt.figures.stability import Stage
from ldt.loop.prune_retrain import Calibration
from ldt.module import DetectorModule


def batch_utilities(
    module: DetectorModule, criterion: LDTCriterion, loader: Any, scope: Sequence[str]
) -> list[Stage]:
    """Utilities (eq. 16) of the last scored layer of every stage, batch by batch.

    Args:
        module: the detector.
        criterion: scores it.
        loader: calibration batches; those without objects are left out.
        scope: parts of the detector that are traced (``prune.scope``).
    """
    with evaluating(module.detector):
        graph = module.trace(scope)
        criterion.collect(module, graph, Calibration(module, loader))
    order = [name for name, _ in module.detector.named_modules() if name in graph.scored]
    images = np.array(criterion.batch_images)
    found = []
    for stage in stages(order):
        sums = criterion.batch_scores[graph.scored[stage.layers[-1]]]
        rows = np.stack([scores.numpy() for scores in sums])[images > 0]
        utilities = rows / images[images > 0, None]
        found.append(Stage(stage.layers[-1], utilities, rank_correlation([sums])))
    return found
