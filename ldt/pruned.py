"""The detector type ``PrunedDetector`` of exported configs; see their ``custom_imports``."""

from collections.abc import Mapping

from mmdet.registry import MODELS
from torch import nn

from ldt.detectors.freezing import thaw_pruned
from ldt.detectors.models import build
from ldt.pruning import structure


@MODELS.register_module(name="PrunedDetector")
def pruned_detector(
    detector: str, sizes: structure.Structure, shapes: Mapping[str, str], **model: object
) -> nn.Module:
    """Build an mmdet detector with a pruned structure; its weights are loaded afterwards.

    Args:
        detector: the type of the unpruned detector.
        sizes: sizes of the layers that pruning changed (:func:`ldt.pruning.structure.changes`).
        shapes: shapes of the tensors that pruning changed.
        model: the other keys of the unpruned detector's config.

    Raises:
        ValueError: ``sizes`` or ``shapes`` belong to another detector.
    """
    built = build({"type": detector, **model}, initialise=False)
    structure.apply_changes(built, sizes, shapes)
    thaw_pruned(built, sizes)
    return built
