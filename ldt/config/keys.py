"""Rejection of unknown configuration keys, with a suggestion of the closest known key.

Groups that the schema declares as a dict (``recipe.optimizer``, ``method.criterion``, ...) are read
by other libraries and classes: :func:`ldt.build.check_config` checks these.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldt.config import DATASETS, Config, as_dict

# Arguments of Lightning's Trainer controlled by the prune-retrain loop, and what to type instead.
# fmt: off
_END = "the loop ends after its last phase: type recipe.epochs=... and recipe.retrain_epochs=..."
OWNED = {
    "max_epochs": _END,
    "min_epochs": _END,
    "max_steps": _END,
    "min_steps": _END,
    # Lightning's timer accumulates over resumptions, so that a run could never be resumed
    "max_time": "stop the process instead (`timeout 8h python run.py ...`); it can be resumed",
    "callbacks": "callbacks follow from recipe.ema, recipe.plain_epochs, ldt.enabled and method",
    "logger": "type logger=csv or logger=wandb",
    "plugins": "type trainer.precision=... or trainer.strategy=...; checkpoints are written by ldt",
    "default_root_dir": "type hydra.run.dir=<folder>",
    # a round's metrics are those of the last validation, which must follow its last step
    "check_val_every_n_epoch": "type trainer.validate_every=<epochs>",
    "val_check_interval": "type trainer.validate_every=<epochs>",
    "num_sanity_val_steps": "type trainer=debug to try a whole run on two batches",
    "gradient_clip_val": "type recipe.clip_grad=<norm>",
    "enable_checkpointing": "every run writes last.ckpt, with which it is resumed",
    "barebones": "the loop needs its callbacks; type trainer.fast_dev_run=1 for a quick try",
    "reload_dataloaders_every_n_epochs": "images are reshuffled and augmented again in every epoch",
    "model_registry": "type logger=wandb, which takes the last checkpoint along",
    "limit_test_batches": "nothing is tested; type trainer.limit_val_batches=<n>",
    "limit_predict_batches": "nothing is predicted; type trainer.limit_val_batches=<n>",
}
# fmt: on
MODULES = {  # option of the group `dataset` by its class
    "ldt.data.coco.CocoDataModule": "coco",
    "ldt.data.kitti.KittiDataModule": "kitti",
    "ldt.data.kitti.RoadScenesDataModule": "roadscenes",  # of older runs
    "ldt.data.roadscenes.RoadScenesDataModule": "roadscenes",
}


def check_places(config: DictConfig) -> None:
    """Check the names that a run's path is made of, so that it lies below ``runs/<study>``.

    Raises:
        ValueError: a name leads elsewhere; those of runs and studies may have levels.
    """
    for key in ("study", "run_name", "dataset.name", "detector.name", "method.name"):
        group, _, leaf = key.rpartition(".")
        node = config[group] if group else config
        if OmegaConf.is_missing(node, leaf) or OmegaConf.is_interpolation(node, leaf):
            continue
        name = str(node[leaf])
        parts = [name] if group else name.split("/")
        fine = all(parts) and not {".", ".."} & set(parts) and name == name.strip()
        if not fine or not name.isprintable() or (group and "/" in name):
            raise ValueError(f"{key}={name!r}; allowed: the name of a folder (e.g. {key}=mine)")


def check_keys(config: DictConfig) -> None:
    """Reject unknown keys; imports neither torch nor the configured classes.

    Args:
        config: configuration of a run, composed or loaded; Hydra checks the node ``hydra``.

    Raises:
        ValueError: in one line, the unknown keys, the closest known ones and what to type.
    """
    plain = as_dict(config, resolve=False)
    plain.pop("hydra", None)
    schema = dataset_schema(plain)
    unknown = dict(_unknown(plain, Config, schema))
    if unknown:
        known = [*known_keys(schema), *_paths(plain, unknown)]
        raise ValueError("; ".join(refusal(key, given, known) for key, given in unknown.items()))


def check_names(where: str, given: Mapping[str, Any], allowed: Iterable[str]) -> None:
    """Reject keys of a group that are not allowed.

    Raises:
        ValueError: see :func:`check_keys`; names the first such key.
    """
    known = [f"{where}.{name}" for name in allowed]
    for name, value in given.items():
        if f"{where}.{name}" not in known:
            raise ValueError(refusal(f"{where}.{name}", value, known))


def refusal(key: str, given: object, known: Iterable[str], where: str = "") -> str:
    """Format the message for an unknown key, with what to type instead."""
    known = list(dict.fromkeys(known))
    told = f"{key}{where}" if given is None else f"{key}={given}{where}"
    if key in _owned():
        return f"{told} cannot be set: {_owned()[key]}"
    if others := [name for name, schema in DATASETS.items() if key in _fields(schema, "dataset.")]:
        return f"{told}: unknown key here; it belongs to dataset={' or '.join(sorted(others))}"
    near = nearest(key, [*known, *_owned()])
    if not near:
        group = key.rpartition(".")[0]
        siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == group]
        return f"{told}: unknown key; known in {group or 'a configuration'}: {', '.join(siblings)}"
    if near[0] in _owned():
        return f"{told}: unknown key, and {near[0]} cannot be set: {_owned()[near[0]]}"
    value = "..." if given is None else given
    return f"{told}: unknown key; did you mean {' or '.join(near)}? Type {near[0]}={value}"


def nearest(key: str, known: Iterable[str]) -> list[str]:
    """Return known keys with the same or a similar name, those of the same group first."""
    group, _, name = key.rpartition(".")
    top = key.partition(".")[0] + "."
    known = sorted(dict.fromkeys(known), key=lambda other: not other.startswith(top))
    names = {other: other.rpartition(".")[2] for other in known}
    siblings = {names[other]: other for other in known if other.rpartition(".")[0] == group}
    if same := [other for other in known if names[other] == name]:
        return [other for other in same if other.startswith(top)] or same[:3]
    if close := get_close_matches(name, siblings, 1, 0.6):
        return [siblings[close[0]]]
    close = get_close_matches(name, names.values(), 1, 0.75)
    return [other for other in known if [names[other]] == close][:3]


def _owned() -> dict[str, str]:
    return {f"trainer.{name}": instead for name, instead in OWNED.items()}


def known_keys(dataset: type | None = None) -> list[str]:
    """All keys of the schema, dotted, with those of a data set's dataclass if given."""
    found = list(_fields(Config, ""))
    return [*found, *(_fields(dataset, "dataset.") if dataset else ())]


def explain_key(error: Exception) -> str | None:
    """Format a Hydra error about a key in one line; None for any other error.

    Args:
        error: exception raised by Hydra while composing a configuration.
    """
    cause: Any = error.__cause__ or error.__context__
    if not isinstance(cause, OmegaConfBaseException) or not cause.full_key:
        return None
    lines = [line.strip() for line in str(error).splitlines()] or [""]
    key, what = str(cause.full_key), str(cause).splitlines()[0]
    where = f" in {lines[0].split(chr(39))[1]}.yaml" if lines[0].startswith("In '") else ""
    if not what.startswith("Key '"):
        return f"{key}{where}: {what}" if where else None
    given = lines[-1].partition(f"+{key}=")[2] or None
    group, parent = key.rpartition(".")[0], getattr(cause, "parent_node", None)
    siblings = [f"{group}.{name}" for name in parent] if isinstance(parent, DictConfig) else []
    if key.startswith(("detector.options.", "recipe.optimizer.", "recipe.paramwise.")):
        given = given or "..."
        near = nearest(key, siblings)
        meant = f"did you mean {near[0]}={given}? " if near else ""
        return f"{key} is not in the configuration yet; {meant}to add it type +{key}={given}"
    return refusal(key, given, [*(siblings if group else ()), *known_keys()], where)


def dataset_schema(plain: Mapping[str, Any]) -> type | None:
    """Return the dataclass of a built-in data set; None for a custom one."""
    dataset = plain.get("dataset")
    option = MODULES.get(dataset.get("_target_", "")) if isinstance(dataset, Mapping) else None
    return DATASETS.get(option or "")


def _unknown(
    given: Mapping[str, Any], schema: type, dataset: type | None, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Keys that are not in the schema, with their values."""
    kinds = {item.name: item.type for item in dataclasses.fields(schema)}
    for name, value in given.items():
        path = f"{prefix}{name}"
        kind = dataset if path == "dataset" else kinds.get(name)
        if name not in kinds:
            yield path, value
        elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from _unknown(value or {}, kind, dataset, f"{path}.")


def _fields(schema: type, prefix: str) -> Iterator[str]:
    for item in dataclasses.fields(schema):
        yield f"{prefix}{item.name}"
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            yield from _fields(item.type, f"{prefix}{item.name}.")


def _paths(plain: object, without: Iterable[str], prefix: str = "") -> Iterator[str]:
    """All given keys, dotted, except the rejected ones."""
    for name, value in plain.items() if isinstance(plain, dict) else ():
        if (path := f"{prefix}{name}") not in without:
            yield path
            yield from _paths(value, without, f"{path}.")
