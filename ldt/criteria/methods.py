"""Pruning methods by name: a criterion of ``conf/method`` and the ranking of its scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch_pruning.pruner.importance import Importance

from ldt.config import methods, untrained_methods
from ldt.config.names import choices
from ldt.criteria.base import check_importance
from ldt.pruning.budget import RANKINGS


@dataclass(frozen=True)
class Method:
    """The content of a method's yaml file.

    Attributes:
        criterion: the criterion that scores channels.
        ranking: how scores of different layers are compared.
        inner_rounds: how often a round scores and prunes.
    """

    criterion: Importance
    ranking: str = "global"
    inner_rounds: int = 1

    def __post_init__(self) -> None:
        check_importance(self.criterion)
        if self.ranking not in RANKINGS:
            raise ValueError(f"ranking={self.ranking!r}; choose one of {', '.join(RANKINGS)}")


def find_method(criterion: str | Importance, ranking: str | None = None) -> Method:
    """Return a method by the name of its yaml file, or wrap a criterion.

    Args:
        criterion: a name in ``conf/method``, or an instance: one of ours or any importance of
            Torch-Pruning.
        ranking: overrides the method's ranking.

    Raises:
        ValueError: there is no such method, or its criterion works only while training.
    """
    if not isinstance(criterion, (str, Importance)):
        raise ValueError(
            f"criterion={criterion!r}; give a name such as 'ldt', or an instance of one of ours or "
            "of an importance of Torch-Pruning"
        )
    if not isinstance(criterion, str):
        return Method(criterion, ranking or Method.ranking)
    content = _read(criterion)
    return Method(
        _instantiate(content["criterion"]),
        ranking or content.get("ranking", Method.ranking),
        content.get("inner_rounds", Method.inner_rounds),
    )


def _read(name: str) -> dict[str, Any]:
    usable = untrained_methods()
    if name in usable:
        return usable[name]
    reason = "has no criterion that works without training" if name in methods() else "is unknown"
    raise ValueError(
        f"criterion={name!r} {reason}; {choices(name, sorted(usable))}, or give an instance, e.g. "
        "ldt.criteria.ldt.LDTCriterion()"
    )


def _instantiate(content: Mapping[str, Any]) -> Importance:
    """Create the criterion of a yaml file; values that refer to other keys keep their default."""
    module, _, name = content["_target_"].rpartition(".")
    arguments = {
        key: value
        for key, value in content.items()
        if key != "_target_" and not str(value).startswith("${")
    }
    return getattr(import_module(module), name)(**arguments)
