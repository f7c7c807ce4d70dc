"""Training recipes: allowed values, micro-batch size and learning-rate schedule."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from ldt.config.values import Count, NaturalNumber, Positive, Share, check_value

PARAMWISE = (  # the keys that mmengine reads from recipe.paramwise
    "custom_keys", "bias_lr_mult", "bias_decay_mult", "norm_decay_mult", "dwconv_decay_mult",
    "flat_decay_mult", "bypass_duplicate", "dcn_offset_lr_mult",
)  # fmt: skip


Ratio = Annotated[float, Ge(0), Le(1)]
KINDS: dict[str, tuple[Any, Any]] = {  # type and example of each recipe key
    "epochs": (NaturalNumber, 9),
    "retrain_epochs": (NaturalNumber, 2),
    "batch_size": (Count, 16),
    "base_batch_size": (Count, 16),
    "schedule": (Literal["step", "cosine", "constant"], "step"),
    "milestones": (list[Ratio], [0.67, 0.92]),
    "warmup": (NaturalNumber, 500),
    "warmup_shape": (Literal["linear", "quadratic"], "linear"),
    "min_lr": (Ratio, 0.05),
    "retrain_lr": (Positive, 1.0),
    "clip_grad": (Positive, 35),
    "ema": (Share, 1e-4),
    "plain_epochs": (NaturalNumber, 15),
}


NULLABLE = ("base_batch_size", "clip_grad", "ema")


def check_recipe(recipe: Mapping[str, Any]) -> None:
    """Check every value of a recipe.

    Raises:
        ValueError: a value is invalid; the message names its key.
    """
    for key, (kind, example) in KINDS.items():
        if key in recipe:
            kind = kind | None if key in NULLABLE else kind
            check_value(f"recipe.{key}", recipe[key], kind, example)
    lr = recipe["optimizer"].get("lr")
    check_value("recipe.optimizer.lr", lr, Positive, 0.01)


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


def warmup_steps(recipe: Mapping[str, Any], steps: int) -> int:
    """Return the steps of the learning rate's warm-up in a phase of so many steps."""
    return min(int(recipe["warmup"]), steps // 5)


def learning_rate(
    recipe: dict[str, Any], steps: int, scale: float, plain: int = 0
) -> Callable[[int], float]:
    """Return the function from step t of a phase of T steps to its learning-rate factor.

    During the warm-up of W steps ((t+1)/W)^p, p = 1 (linear) or 2 (quadratic); then 0.1 per passed
    milestone (``step``), or 1 (``constant``), or m + (1 - m) (1 + cos(pi (t-W)/(T-P-W)))/2 with the
    share m = ``min_lr``, which is kept for the last ``plain`` = P steps (``cosine``, as in YOLOX).
    """
    kind = recipe["schedule"]
    warmup = warmup_steps(recipe, steps)

    def factor(step: int) -> float:
        if step < warmup:
            return scale * ((step + 1) / warmup) ** (1 + (recipe["warmup_shape"] == "quadratic"))
        if kind == "step":
            return scale * 0.1 ** sum(step >= m * steps for m in recipe["milestones"])
        if kind == "cosine":
            low = recipe["min_lr"]
            share = min(1.0, (step - warmup) / max(1, steps - plain - warmup))
            return scale * (low + (1 - low) * (1 + math.cos(math.pi * share)) / 2)
        return scale

    return factor
