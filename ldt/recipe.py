"""How a detector is trained: what a recipe may hold, and its learning rate at every step."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from ldt.config.values import Count, NaturalNumber, Positive, Share, check_value

PARAMWISE = (  # all that mmengine reads of recipe.paramwise
    "custom_keys", "bias_lr_mult", "bias_decay_mult", "norm_decay_mult", "dwconv_decay_mult",
    "flat_decay_mult", "bypass_duplicate", "dcn_offset_lr_mult",
)  # fmt: skip


Ratio = Annotated[float, Ge(0), Le(1)]
KINDS: dict[str, tuple[Any, Any]] = {  # of the recipe's keys, with an example
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
        ValueError: one that cannot be trained with, naming its key.
    """
    for key, (kind, example) in KINDS.items():
        if key in recipe:
            kind = kind | None if key in NULLABLE else kind
            check_value(f"recipe.{key}", recipe[key], kind, example)
    lr = recipe["optimizer"].get("lr")
    check_value("recipe.optimizer.lr", lr, Positive, 0.01)


def micro_batch(batch_size: int, processes: int, accumulate: int) -> int:
    """Return how many images a process computes at once, so that a step sees ``batch_size``.

    Args:
        batch_size: images of one optimizer step, over all processes.
        processes: that share them.
        accumulate: parts of a process's share that are computed one after another.

    Raises:
        ValueError: it does not divide.
    """
    parts = processes * accumulate
    if batch_size % parts:
        fitting = max(1, round(batch_size / parts)) * parts
        raise ValueError(
            f"recipe.batch_size={batch_size} images of an optimizer step cannot be shared by "
            f"{processes} processes x trainer.accumulate_grad_batches={accumulate}; allowed: "
            f"multiples of {parts} (e.g. recipe.batch_size={fitting})"
        )
    return batch_size // parts


def learning_rate(
    recipe: dict[str, Any], steps: int, scale: float, plain: int = 0
) -> Callable[[int], float]:
    """The factor on the learning rate at each step t of a phase of T steps.

    Over the warm-up of W steps ((t+1)/W)^p, p = 1 (linear) or 2 (quadratic); then 0.1 per passed
    milestone (``step``), or 1 (``constant``), or m + (1 - m) (1 + cos(pi (t-W)/(T-P-W)))/2 with the
    share m = ``min_lr``, at which the last ``plain`` = P steps stay (``cosine``, as YOLOX has it).
    """
    kind = recipe["schedule"]
    warmup = min(int(recipe["warmup"]), steps // 5)

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
