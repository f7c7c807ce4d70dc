"""Training recipes: allowed values, micro-batch size and learning-rate schedule."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ldt.config.values import Positive, check_value

PARAMWISE = (  # the keys that mmengine reads from recipe.paramwise
    "custom_keys", "bias_lr_mult", "bias_decay_mult", "norm_decay_mult", "dwconv_decay_mult",
    "flat_decay_mult", "bypass_duplicate", "dcn_offset_lr_mult",
)  # fmt: skip


WARMUPS = 5  # the longest warm-up is this part of a phase


def check_recipe(recipe: Mapping[str, Any]) -> None:
    """Check what the schema cannot: a learning rate, and values that need each other.

    Raises:
        ValueError: a value is invalid; the message names its key.
    """
    if recipe["warmup_shape"] == "constant" and recipe["warmup_start"] is None:
        raise ValueError("recipe.warmup_shape=constant needs recipe.warmup_start (e.g. 0.333)")
    lr = recipe["optimizer"].get("lr")
    check_value("recipe.optimizer.lr", lr, Positive, 0.01)


def set_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of ``optimizer`` or ``paramwise`` that are neither null nor empty."""
    return {key: value for key, value in keys.items() if value is not None and value != {}}


def micro_batch(batch_size: int, processes: int, accumulate: int) -> int:
    """Return the images per forward pass and process for an effective batch of ``batch_size``.

    Args:
        batch_size: images per optimizer step, over all processes.
        processes: number of processes.
        accumulate: gradient accumulation steps.

    Raises:
        ValueError: the batch size is not divisible.
    """
    parts = processes * accumulate
    if batch_size % parts:
        fitting = max(1, round(batch_size / parts)) * parts
        raise ValueError(
            f"recipe.batch_size={batch_size} images per optimizer step cannot be split among "
            f"{processes} processes x trainer.accumulate_grad_batches={accumulate}; allowed: "
            f"multiples of {parts} (e.g. recipe.batch_size={fitting})"
        )
    return batch_size // parts


def warmup_steps(recipe: Mapping[str, Any], steps: int, epochs: int) -> int:
    """Return the steps of the learning rate's warm-up in a phase of so many steps and epochs."""
    wanted = round(recipe["warmup_epochs"] * steps / max(1, epochs)) or recipe["warmup"]
    return min(int(wanted), steps // WARMUPS)


def learning_rate(
    recipe: Mapping[str, Any], steps: int, epochs: int = 1, scale: float = 1.0, plain: int = 0
) -> Callable[[int], float]:
    """Return the function from a step of a phase to its learning-rate factor, a product of three.

    The warm-up of W steps rises from s = ``warmup_start`` in step 0 to 1 in step W - 1, by default
    from 1/W: linearly; ``quadratic`` is ((t+1)/W)^2, ``constant`` stays at s. The ``step``
    schedule is ``gamma`` per passed milestone. ``cosine`` is m + (1 - m) (1 + cos(pi n/N))/2 after
    n of N steps, m = ``min_lr``, and keeps its last value. By default it lasts from the warm-up to
    the last ``plain`` steps, which have the rate m then, as in YOLOX.

    Args:
        recipe: the keys of :class:`ldt.config.RecipeConfig`.
        steps: optimizer steps of the phase.
        epochs: epochs of the phase.
        scale: factor on the whole schedule.
        plain: steps of the epochs without mosaic at the end.
    """
    warmup = warmup_steps(recipe, steps, epochs)
    decay = _decay(recipe, steps, warmup, plain)
    shape, start = recipe["warmup_shape"], recipe["warmup_start"]

    def rise(step: int) -> float:
        if step + 1 >= warmup:
            return 1.0
        if shape == "constant":
            return start
        if shape == "quadratic" or start is None:
            return ((step + 1) / warmup) ** (1 + (shape == "quadratic"))
        return start + (1 - start) * step / (warmup - 1)

    return lambda step: scale * rise(step) * decay(step)


def _decay(
    recipe: Mapping[str, Any], steps: int, warmup: int, plain: int
) -> Callable[[int], float]:
    """Return the function from a step to its factor, without warm-up and scale."""
    kind, low = recipe["schedule"], recipe["min_lr"]
    if kind == "step":
        milestones = [round(share * steps) for share in recipe["milestones"]]
        return lambda step: recipe["gamma"] ** sum(step >= passed for passed in milestones)
    if kind == "constant":
        return lambda _: 1.0
    if recipe["cosine"]:
        begin, end, period = (round(share * steps) for share in recipe["cosine"])
        begin, end = max(begin, warmup), end - 1  # mmengine's last change is before `end`
    else:
        begin, end = warmup, steps - plain
        period = end - begin

    def cosine(step: int) -> float:
        share = (max(begin, min(step, end)) - begin) / max(1, period)
        return low + (1 - low) * (1 + math.cos(math.pi * share)) / 2

    return cosine
