"""Run identity: the definition of "same run" and "same cell" (same settings, another seed).

It is used by the run loop, shared bases, the report, the figures and the experiment tables. Two
configurations are the same run if their :func:`essence` is equal, and belong to the same cell if it
is equal except for :data:`REPEATS`. Fingerprints of the data are in :mod:`ldt.runs.inputs`.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf

from ldt.config import as_dict
from ldt.config.names import below
from ldt.config.paths import expand_home
from ldt.config.values import typed
from ldt.runs import files
from ldt.runs.differences import NOT_SET, differences
from ldt.runs.records import stored_config

Flat = dict[str, Any]  # dotted key -> value
Relation = Literal["same run", "same cell", "other run"]

LABELS = ("study", "run_name")  # names only
FREE = (  # keys, and groups of keys, that are not part of the identity: results stay comparable
    *LABELS,
    # locations
    *("dataset.root", "dataset.cache", "trainer.default_root_dir"),
    # limits of what is accepted
    *("dataset.max_pixels", "dataset.open_reserved"),
    # hardware and speed
    *("dataset.workers", "trainer.accelerator", "trainer.devices", "trainer.num_nodes"),
    *("trainer.strategy", "trainer.threads", "trainer.benchmark", "trainer.inference_mode"),
    "trainer.compile",
    # additional measurements, figures, logging, objectives of a sweeper
    *(
        "method.title",
        "report",
        "logger",
        "objectives",
        "trainer.logger",
        "trainer.log_every_n_steps",
    ),
    *("trainer.validate_every", "trainer.check_val_every_n_epoch", "trainer.val_check_interval"),
    *("trainer.num_sanity_val_steps", "trainer.enable_progress_bar", "trainer.profiler"),
    *("trainer.enable_model_summary", "trainer.enable_checkpointing", "trainer.detect_anomaly"),
    *("trainer.enable_autolog_hparams", "trainer.model_registry", "trainer.barebones"),
)
SOURCES = (  # keys interpolated by others (dataset.scale, ldt.enabled), which are compared instead
    *("dataset.scales", "detector.size", "method.ldt"),
)
UNPRUNED = (  # keys without effect if nothing is pruned
    *("prune", "distill", "recipe.retrain_epochs", "recipe.retrain_lr", "method.ranking"),
    *("method.inner_rounds", "method.criterion", "method.gradual"),
)
LDT_OFF = (  # keys without effect if the detector is trained without LDT
    *("ldt.phi", "ldt.alpha", "ldt.beta", "ldt.ridge", "ldt.ridge_absolute", "ldt.covariance"),
    *("ldt.alpha_share", "ldt.beta_share", "ldt.estimation", "ldt.warmup_epochs"),
    *("ldt.memory", "ldt.gather"),
)
FOLDS_OFF = ("dataset.fold", "dataset.gap", "dataset.reserved_folds")  # without effect, folds=0
FOLDS_ON = ("dataset.reserved_folds", "dataset.train_fraction", "dataset.split_seed")  # with folds
MOSAIC = ("detector.mosaic_scale", "detector.mixup")  # keys without effect on other images
REPEATS = ("seed", "base")  # runs of a cell may differ in these
BEFORE: Flat = {  # values of keys that older configurations lack
    "base": "own",
    "ldt.background": "auto",
    "ldt.estimation": "once",
    "dataset.max_detections": 100,
    "dataset.folds": 0,
    "method.inner_rounds": 1,
    "prune.repair": "none",
    "prune.round_to": 0,
    "prune.channels": "scored",
    "prune.weights": "kept",
    "distill.neck": 0,
    "distill.head": 0,
    "distill.temperature": 1,
    "dataset.group_shapes": False,
    "dataset.filter_empty_gt": False,
    "dataset.min_size": 0,
    "method.criterion.bn": "fuse",  # of PX
    "method.criterion.aggregate": "sum",
    "recipe.channels_last": False,
    "recipe.gamma": 0.1,
    "recipe.warmup_epochs": 0,
    "recipe.cosine": [],
    "recipe.pipeline": [],
    "recipe.plain_pipeline": [],
    "recipe.plain_l1": True,
    "detector.mosaic_scale": [0.1, 2],
    "detector.mixup": True,
    "trainer.precision": "32-true",
    "trainer.deterministic": "warn",
    "trainer.sync_batchnorm": False,
    "trainer.accumulate_grad_batches": 1,
    "trainer.gradient_clip_algorithm": "norm",
    "trainer.fast_dev_run": False,
    "trainer.max_steps": -1,
    "trainer.overfit_batches": 0,
    "trainer.reload_dataloaders_every_n_epochs": 0,
    "trainer.use_distributed_sampler": True,
}
BUDGET_ALIASES = {"flops": "macs"}  # the paper's tables say FLOPs but count MACs
PRECISION_ALIASES = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
IN_NAMES = {"macs": "flops"}  # spelling of a budget in run names

RUNS = Path("runs")  # parent of all studies
SPELT = ("detector", "dataset", "method", "prune.budget", "prune.rate", "seed")  # in every name
UNNAMED = ("experiment",)  # selects other keys, which are checked when a directory is claimed
NAMED_BEFORE = (  # overrides that earlier versions left out of names
    *(*SPELT, *UNNAMED, "study", "objectives", "dataset.root", "dataset.cache"),
    *("dataset.workers", "trainer.devices", "report.pictures", "logger", "logger.mode"),
    *("logger.project", "logger.entity", "logger.checkpoint"),
)


class OtherRunError(ValueError):
    """A directory holds another run than the requested one; it is not modified."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> Flat:
    """Flatten a nested dict to dotted keys; lists are values, and nulls are dropped.

    Nulls are dropped because keys missing in older configurations are null in newer ones.

    Example:
        >>> flatten({"prune": {"rate": 0.5, "scope": ["neck"]}, "seed": None})
        {'prune.rate': 0.5, 'prune.scope': ['neck']}
    """
    flat: Flat = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif value is not None:
            flat[name] = value
    return flat


def essence(config: Mapping[str, Any]) -> Flat:
    """Return all settings that affect a run's result, flat.

    Args:
        config: the resolved configuration, also one of an earlier version.

    Example:
        >>> one = {"seed": 0, "prune": {"budget": "flops"}, "dataset": {"root": "/here"}}
        >>> two = {"seed": 0, "prune": {"budget": "macs"}, "dataset": {"root": "/there"}}
        >>> essence(one) == essence(two)
        True
    """
    flat = {key: _number(key, value) for key, value in {**BEFORE, **flatten(config)}.items()}
    flat |= _batch_of_a_step(config, flat) | _canonical(flat)
    if _prunes_nothing(config):
        flat["method.name"] = "none"
    aside = frozenset((*FREE, *SOURCES, *idle(config)))
    found = {key: value for key, value in flat.items() if not below(key, aside)}
    return {key: value for key, value in sorted(found.items()) if value is not None}


def idle(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys, and groups of keys, that have no effect with this configuration."""
    pruning = UNPRUNED if _prunes_nothing(config) else ()
    own = config.get("ldt") or {}
    given = [f"ldt.{key}_share" for key in ("alpha", "beta") if own.get(key) != "auto"]
    given += ["ldt.estimation"] * (len(given) == 2)
    augment = (config.get("recipe") or {}).get("augment", "mosaic")
    mosaic = () if augment == "mosaic" else MOSAIC
    prune, distill = config.get("prune") or {}, config.get("distill") or {}
    latency = () if prune.get("budget") == "latency" else ("prune.latency",)
    folds = FOLDS_ON if (config.get("dataset") or {}).get("folds") else FOLDS_OFF
    off = () if distill.get("neck") or distill.get("head") else ("distill.temperature",)
    return (*pruning, *mosaic, *latency, *folds, *off, *(LDT_OFF if _off(config) else given))


def cell(config: Mapping[str, Any]) -> Flat:
    """Return the flat settings shared by the runs of a cell: :func:`essence` without the seed."""
    return {key: value for key, value in essence(config).items() if key not in REPEATS}


def compare(one: Mapping[str, Any], other: Mapping[str, Any]) -> Relation:
    """Compare two resolved configurations."""
    if essence(one) == essence(other):
        return "same run"
    return "same cell" if cell(one) == cell(other) else "other run"


def _canonical(flat: Flat) -> Flat:
    """Return the values that can be spelt in several ways, in one of them."""
    found: Flat = {"trainer.precision": canonical_precision(flat["trainer.precision"])}
    if "prune.budget" in flat:
        found["prune.budget"] = canonical_budget(flat["prune.budget"])
    if "detector.checkpoint" in flat:
        found["detector.checkpoint"] = os.path.abspath(flat["detector.checkpoint"])
    if "::" not in (path := str(flat.get("detector.config", "::"))):  # a file, not a packaged one
        found["detector.config"] = os.path.abspath(os.path.expanduser(path))
    if flat.get("prune.budget") != "latency" and flat["prune.round_to"] in ("auto", 1):
        found["prune.round_to"] = 0
    if "prune.scope" in flat:
        found["prune.scope"] = sorted(flat["prune.scope"])
    return found


def canonical_precision(name: object) -> str:
    """Return Lightning's name of a precision."""
    return PRECISION_ALIASES.get(str(name), str(name))


def canonical_budget(name: str) -> str:
    """Return the canonical name of a budget."""
    return BUDGET_ALIASES.get(name, name)


def short_hash(facts: object) -> str:
    """Return an 8-digit hexadecimal hash of plain data."""
    return _hex(json.dumps(facts, sort_keys=True, default=str))


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _number(key: str, value: object) -> Any:
    """Convert integral floats to integers; Lightning distinguishes 1 batch from a share of 1.0."""
    if not isinstance(value, float) or not value.is_integer():
        return value
    if value == 1 and key.startswith(("trainer.limit_", "trainer.overfit_")):
        return None if "limit" in key else "all"  # a share of 1.0 is the default of the limits
    return int(value)


def _batch_of_a_step(config: Mapping[str, Any], flat: Flat) -> Flat:
    """Convert the per-process batch size of earlier versions to that of an optimizer step."""
    trainer = config.get("trainer")
    if not isinstance(trainer, Mapping) or "accumulate_grad_batches" in trainer:
        return {}
    devices, batch = trainer.get("devices"), flat.get("recipe.batch_size")
    count = len(devices) if isinstance(devices, list) else devices
    if not str(count).isdecimal() or not isinstance(batch, int):
        return {}  # "auto": one device on most machines
    return {"recipe.batch_size": batch * int(str(count)) * int(trainer.get("num_nodes") or 1)}


def _prunes_nothing(config: Mapping[str, Any]) -> bool:
    method, prune = config.get("method") or {}, config.get("prune") or {}
    untouched = "criterion" in method and method["criterion"] is None
    return untouched or method.get("name") == "none" or prune.get("rounds") == 0


def _off(config: Mapping[str, Any]) -> bool:
    return (config.get("ldt") or {}).get("enabled") is False


# Directories ----------------------------------------------------------------------------------


def claim(folder: Path, config: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Check that a directory is free or holds the same run.

    Args:
        folder: the run's directory.
        config: the resolved configuration of the command.
        known: the configuration stored in the directory, empty if there is none.

    Raises:
        OtherRunError: the directory holds another run.
    """
    if not known:
        return
    found = differences(essence(known), essence(config))
    if found:
        told = "; ".join(f"{key}: {there!r} there, {now!r} now" for key, there, now in found)
        keys = [f"{key}={typed(there)}" for key, there, _ in found if there != NOT_SET]
        resume = (
            f"To go on with that run type {' '.join(keys)}; for another one," if keys else "Type"
        )
        raise OtherRunError(
            f"{folder} holds a run of another configuration ({told}). {resume} study=<name> or "
            "run_name=<name>, or remove the folder"
        )


def find(study: Path, config: Mapping[str, Any], prefix: str = "") -> Path | None:
    """Return the directory in a study that holds the run of a configuration, if any.

    Args:
        study: directory of the study.
        config: a resolved configuration.
        prefix: prefix of the directory's name.
    """
    wanted = essence(config)
    for file in sorted(study.glob(f"{prefix}*/{files.CONFIG}")):
        with contextlib.suppress(ValueError):  # skip damaged configurations
            known = stored_config(file.parent)
            if known and essence(known) == wanted:
                return file.parent
    return None


def run_name(overrides: ListConfig, root: DictConfig) -> str:
    """Return the name of a run's directory; the resolver ``run_name`` of ``conf/config.yaml``.

    It consists of data set, detector, method, budget, rate and seed, followed by a hash of other
    overrides that are part of the run's identity. A directory of the study that already holds the
    run is found, also if an earlier version named it or its overrides were spelt otherwise.
    """
    given: Any = OmegaConf.to_container(overrides, resolve=False)
    stem = "-".join(root[group].name for group in ("dataset", "detector", "method"))
    rate, seed = root.prune.rate, root.seed
    budget = IN_NAMES.get(root.prune.budget, root.prune.budget)
    stem = f"{stem}-{budget}{rate}-s{seed}"
    # not all groups: the complete configuration contains the name
    groups = ("method", "prune", "distill", "ldt", "trainer")
    config = {g: as_dict(root[g]) for g in groups}
    names = [stem + suffix for suffix in (suffix_of(given, config), _suffix_before(given))]
    study = RUNS / root.study
    for name in names:
        if (study / name / files.CONFIG).is_file():
            return name
    found = find(study, _without_names(root), stem) if study.is_dir() else None
    return names[0] if found is None else found.name


def _without_names(root: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration without the keys that contain the run's name."""
    names = [str(key) for key in root if key not in ("hydra", "logger", "run_name")]
    config = OmegaConf.masked_copy(root, names)
    expand_home(config)
    return as_dict(config)


def suffix_of(overrides: Iterable[str], config: Mapping[str, Any]) -> str:
    """Return ``-<8 hex digits>`` for the overrides that are not spelled out, or an empty string.

    Args:
        overrides: overrides as given on the command line.
        config: the composed, resolved configuration.
    """
    from ldt.config.sweeps import parse  # imports Hydra

    kept: dict[str, str] = {}
    aside = (*FREE, *idle(config))
    for override in parse(overrides):
        name = override.key_or_group
        if name == "trainer":  # compare the values it sets, not its name
            kept |= _trainer_keys(config)
        elif name not in (*SPELT, *UNNAMED) and not below(name, aside):
            key = override.get_key_element().lstrip("+")
            kept[key] = key if key[0] == "~" else f"{key}={override.get_value_element_as_str()}"
    return _hashed(kept.values())


def _trainer_keys(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the trainer keys that differ from their defaults and affect the results."""
    from ldt.config import TrainerConfig

    usual = flatten({"trainer": as_dict(OmegaConf.structured(TrainerConfig))})
    own = flatten({"trainer": config["trainer"]})
    changed = (key for key in own if own[key] != usual.get(key) and not below(key, FREE))
    return {key: f"{key}={own[key]}" for key in changed}


def _suffix_before(overrides: Iterable[str]) -> str:
    from ldt.config.sweeps import parse

    return _hashed(
        o.input_line or "" for o in parse(overrides) if o.key_or_group not in NAMED_BEFORE
    )


def _hashed(lines: Iterable[str]) -> str:
    text = ",".join(sorted(lines))
    return f"-{_hex(text)}" if text else ""
