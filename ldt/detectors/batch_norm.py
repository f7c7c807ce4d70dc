"""Re-estimate the statistics of batch norms, whose inputs pruning changes."""

import logging
from collections.abc import Iterable

import torch
from torch import nn

from ldt.detectors.adapter import Detector, PreparedBatch
from ldt.detectors.forward import eval_with_gradients

log = logging.getLogger(__name__)


@torch.no_grad()
def reestimate_batch_norms(detector: Detector, batches: Iterable[PreparedBatch]) -> int:
    """Set running means and variances to the average over calibration batches, in place.

    All other modules are in eval mode during this, and trained weights are not changed.

    Args:
        detector: its batch norms are changed.
        batches: calibration images, several per batch: otherwise the variances are those of single
            images.

    Returns:
        The number of batch norms.
    """
    norms = [
        module
        for module in detector.model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return 0
    modes = [(module, module.training) for module in detector.model.modules()]
    momenta = [norm.momentum for norm in norms]
    for module, _ in modes:
        module.training = False
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True  # None: the plain average over batches
    try:
        for batch in batches:
            detector.raw_maps(batch.images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    return len(norms)


def settle_batch_norms(detector: Detector, batches: Iterable[PreparedBatch]) -> bool:
    """Re-estimate the statistics of batch norms if the detection loss overflows with them.

    After a few training steps from random weights the running statistics are still near their
    initial values. In eval mode the maps then grow from layer to layer, until the gradient of a
    decoded box is no number and criteria that use it have no scores.

    Args:
        detector: its batch norms are changed.
        batches: calibration images; may be iterated more than once.

    Returns:
        Whether they have been re-estimated.
    """
    if _has_finite_gradients(detector, batches):
        return False
    log.warning(
        "the gradient of the detection loss of the calibration images is not finite in eval mode: "
        "the training was too short for the running statistics of batch norms. They are "
        "re-estimated"
    )
    return reestimate_batch_norms(detector, batches) > 0


def _has_finite_gradients(detector: Detector, batches: Iterable[PreparedBatch]) -> bool:
    """Return whether the predictors have finite gradients for every batch, in eval mode."""
    model = detector.model
    layers = [model.get_submodule(name) for name in detector.predictors]
    weights = list({weight for layer in layers for weight in layer.parameters()})
    with eval_with_gradients(model):
        model.requires_grad_(False)  # layers before the predictors need no backward pass
        for weight in weights:
            weight.requires_grad_(True)
        for batch in batches:
            found = torch.autograd.grad(detector.detection_loss(batch), weights, allow_unused=True)
            if not all(bool(g.isfinite().all()) for g in found if g is not None):
                return False
    return True
