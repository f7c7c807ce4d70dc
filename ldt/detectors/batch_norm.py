"""Re-estimate the statistics of batch norms, whose inputs pruning changes."""

from collections.abc import Iterable

import torch
from torch import nn

from ldt.detectors.adapter import Detector, PreparedBatch


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
