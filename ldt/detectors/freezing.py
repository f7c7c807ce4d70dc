"""Stages of a detector that its config keeps from training."""

from collections.abc import Iterable

from torch import nn

from ldt.config.names import below


def thaw_pruned(model: nn.Module, layers: Iterable[str]) -> None:
    """Make the parts of a loaded detector that were pruned trainable, in place.

    Its config may freeze stages, which pruning has thawed: whoever trains it further trains what
    the run trained.

    Args:
        model: an mmdet detector.
        layers: names of the layers that pruning changed.
    """
    thaw(model, {name.partition(".")[0] for name in layers})


def thaw(model: nn.Module, scope: Iterable[str]) -> None:
    """Make all parameters of parts of a detector trainable, in place.

    Pruned layers must be retrained, also those of ``frozen_stages`` and norms with
    ``requires_grad=False``. Whether batch norms use their running statistics (``norm_eval``) is not
    changed.

    Args:
        model: an mmdet detector.
        scope: name prefixes of the parts.
    """
    scope = tuple(scope)
    for name, module in model.named_modules():
        if below(name, scope) and hasattr(module, "frozen_stages"):
            setattr(module, "frozen_stages", -1)  # noqa: B010 - `train()` would freeze them again
    for name, parameter in model.named_parameters():
        if below(name, scope):
            parameter.requires_grad_(True)
