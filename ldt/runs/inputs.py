"""Fingerprints of a run's inputs besides its configuration, stored as ``inputs.json``.

They cover the data (ids, annotations and image file sizes of each split), the resolved model
config, the weights and the code that the config imports. The location of the data is recorded too,
but is not part of the fingerprints.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

from ldt.config.places import need_checkpoint
from ldt.runs import files, records
from ldt.runs.differences import differences
from ldt.runs.identity import OtherRunError

log = logging.getLogger(__name__)

OWN_CODE = "ldt"  # modules below it are no code of one's own
PARTS = ("data", "model", "weights", "code")
LATENCY = "latency"  # a further part, of runs with a latency budget: their table of times
SPLITS = {"train": "training", "val": "validation"}
BLOCK = 1 << 20  # bytes read at once
LARGE = 4 << 20  # bytes; results for larger files are cached
BEGUN_EARLIER = "begun_by_earlier_version"  # set for runs started by an earlier version
MOST_TOLD = 3  # maximum number of differences listed per part
Inputs = dict[str, Any]


# Fingerprints ---------------------------------------------------------------------------------


def digest(parts: Iterable[Any]) -> str:
    """Return a hash of the string representations of values, in order."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(f"{part}\0".encode())
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """Return a hash of a file's content; hashes of large files are cached until they change."""
    return remembered(path, "digest", _hash)


def _hash(path: Path) -> str:
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def remembered(path: Path, what: str, find: Callable[[Path], Any]) -> Any:
    """Return ``find(path)``, cached for large files until they change.

    Args:
        path: the file.
        what: name of the result in the cache.
        find: computes the result, which must be JSON-serialisable.
    """
    state = path.stat()
    if state.st_size < LARGE:
        return find(path)
    key = [str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, what]
    return cached(key, lambda: find(path))


def cached(key: Iterable[Any], find: Callable[[], Any]) -> Any:
    """Return ``find()``, or what it returned earlier for an equal key, from the cache folder.

    Args:
        key: what the result depends on.
        find: computes the result, which must be JSON-serialisable.
    """
    cache = cache_folder() / "fingerprints" / f"{digest(key)}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(cache.read_text(encoding="utf-8"))
    found = find()
    with contextlib.suppress(OSError):  # an unwritable cache only costs time
        cache.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(cache, json.dumps(found))
    return found


def cache_folder(given: str | None = None) -> Path:
    """Return the cache folder: the given one, ``$LDT_CACHE`` or ``~/.cache/ldt``."""
    return Path(given or os.environ.get("LDT_CACHE") or "~/.cache/ldt").expanduser()


def split_record(ids: Sequence[Any], images: Iterable[str], annotations: str) -> Inputs:
    """Return the fingerprint of a split.

    Args:
        ids: image ids in order.
        images: image files in the same order.
        annotations: hash of the annotations.

    Raises:
        FileNotFoundError: an image is missing.
    """
    sizes = [os.stat(image).st_size for image in images]
    return {
        "images": len(ids),
        "ids": digest(ids),
        "annotations": annotations,
        "bytes": sum(sizes),
        "sizes": digest(sizes),
    }


def record(
    data: Mapping[str, Any], model: Mapping[str, Any], checkpoint: str | None = None
) -> Inputs:
    """Return the fingerprints of all inputs of a run.

    Args:
        data: fingerprint of the data module.
        model: the resolved model config, including the ``custom_imports`` of the mmdet config.
        checkpoint: file with the detector's weights.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
    """
    weights = _local_weights(model)
    if checkpoint:
        weights["detector.checkpoint"] = str(need_checkpoint(checkpoint))
    modules = (model.get("custom_imports") or {}).get("imports") or []
    modules = [modules] if isinstance(modules, str) else modules
    found = {
        "data": dict(data),
        "model": dict(model),
        "weights": {key: file_digest(Path(file)) for key, file in weights.items()},
        "code": {name: _code(name) for name in modules if not is_own(name)},
    }
    return json.loads(json.dumps(found))  # as read back from JSON: tuples become lists


def _local_weights(node: object, name: str = "model") -> dict[str, str]:
    """Local files loaded by ``init_cfg`` entries of a model config, by dotted key."""
    found: dict[str, str] = {}
    for key, value in _children(node):
        file = value.get("checkpoint") if key == "init_cfg" and isinstance(value, Mapping) else None
        if isinstance(file, str) and Path(file).is_file():
            found[f"{name}.init_cfg.checkpoint"] = file
        found |= _local_weights(value, f"{name}.{key}")
    return found


def _children(node: object) -> Iterable[tuple[str, Any]]:
    """Keys and values of a dict, or indices and items of a list."""
    if isinstance(node, Mapping):
        return node.items()
    return enumerate(node) if isinstance(node, (list, tuple)) else ()  # type: ignore[return-value]


def is_own(module: str) -> bool:
    """Return whether a module is one of ldt's, of which the version is recorded elsewhere."""
    return module.partition(".")[0] == OWN_CODE


def _of_others(code: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hashes of code that is none of ldt's, which earlier versions recorded too."""
    return {name: value for name, value in code.items() if not is_own(name)}


def _code(module: str) -> str | None:
    """Hash the source of a module, its whole package and what it imports from the same folder.

    Returns:
        The hash; None if the module is not found.
    """
    package, _, _ = module.partition(".")
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None  # building the detector raises a specific error
    if spec is None or not spec.origin:
        return None
    origin = Path(spec.origin)
    if spec.submodule_search_locations is None:
        root, sources = origin.parent, {origin}
    else:
        root, sources = origin.parent.parent, set(origin.parent.rglob("*.py"))
    if root.name not in ("site-packages", "dist-packages"):  # installed: versions change together
        sources |= {file for source in sources for file in _imported(source, root)}
    return digest(part for s in sorted(sources) for part in (s.relative_to(root), _hash(s)))


def _imported(source: Path, root: Path) -> set[Path]:
    """Python files below ``root`` that a file imports, directly or not; nothing is executed."""
    finder = ModuleFinder([str(root)])
    with contextlib.suppress(SyntaxError, UnicodeDecodeError):  # told when the detector is built
        finder.run_script(str(source))
    found = (getattr(module, "__file__", None) for module in finder.modules.values())
    return {Path(file) for file in found if file and Path(file).suffix == ".py"}


def fingerprint(inputs: Mapping[str, Any]) -> str | None:
    """Return one hash of a run's recorded inputs; None if they were not recorded."""
    if not inputs:
        return None
    parts = [{**inputs, "code": _of_others(inputs["code"])}[part] for part in PARTS]
    if LATENCY in inputs:
        parts.append(inputs[LATENCY])
    return digest([json.dumps(parts, sort_keys=True)])


# A directory's inputs -------------------------------------------------------------------------


def check(folder: Path, now: Mapping[str, Any]) -> None:
    """Check that the run in a directory used the same inputs.

    Raises:
        OtherRunError: its inputs differ.
        ValueError: their record is damaged.
    """
    known = recorded(folder)
    if told := changes(known, now) if known else _other_images(folder, now["data"]):
        raise OtherRunError(
            f"{folder} holds a run with other inputs: {'; '.join(told)}. Restore them, or "
            "choose another study=<name> or run_name=<name>"
        )


def recorded(folder: Path) -> Inputs:
    """Return the recorded inputs of a run; empty if an earlier version made it.

    Raises:
        DamagedError: the record is damaged.
    """
    file = folder / files.INPUTS
    known = files.read_json(file)
    if file.is_file():
        remedy = "restore it, or choose another study=<name> or run_name=<name>"
        records.check(file, records.INPUTS, known, remedy)
    return known


def _other_images(folder: Path, data: Mapping[str, Any]) -> list[str]:
    """Compare the image ids of a run that recorded no other inputs."""
    told = []
    for split, ids in files.read_json(folder / files.SPLIT).items():
        if split in data and split in SPLITS:
            then = data[split] | {"images": len(ids), "ids": digest(ids)}
            told += _split_changes(SPLITS[split], then, data[split])
    return told


def write(folder: Path, now: Mapping[str, Any], place: str | None, **more: object) -> None:
    """Record a run's inputs and append the current location of its data."""
    known = files.read_json(folder / files.INPUTS)
    places = [p for p in known.get("places", []) if p != place] + [place] * (place is not None)
    own = {key: value for key, value in known.items() if key not in PARTS}
    parts = [part for part in (*PARTS, LATENCY) if part in now]
    found = own | {part: now[part] for part in parts} | more | {"places": places}
    if found != known:
        files.write_json(folder / files.INPUTS, found)


def settle(
    folder: Path, now: Mapping[str, Any], place: str | None, finished: bool, writes: bool
) -> None:
    """Check the inputs of a started run and record the current location of its data.

    Args:
        folder: the run's directory.
        now: the current inputs.
        place: the current location of the data.
        finished: whether the run is finished; nothing is added to finished runs of earlier
            versions.
        writes: whether this process may write.

    Raises:
        OtherRunError: see :func:`check`.
    """
    check(folder, now)
    earlier = not (folder / files.INPUTS).is_file()
    if earlier:
        log.warning(
            "%s was created by an earlier version, which did not record the inputs of a run: "
            "changes of them cannot be detected",
            folder,
        )
    if writes and not (earlier and finished):
        write(folder, now, place, **({BEGUN_EARLIER: True} if earlier else {}))


def place_of(config: Mapping[str, Any]) -> str | None:
    """Return the location of a configuration's data; None for generated data."""
    root = config["dataset"].get("root")
    return None if root is None else str(Path(root).expanduser().resolve())


def check_processes(folder: Path, count: int) -> None:
    """Check that a run of an earlier version is not resumed with several processes.

    Raises:
        ValueError: it is.
    """
    record = files.read_json(folder / files.INPUTS)  # the first process may not have written it yet
    begun = record.get(BEGUN_EARLIER, not record and files.has_checkpoint(folder))
    if begun and count > 1:
        raise ValueError(
            f"{folder} was started by an earlier version, in which recipe.batch_size counted the "
            f"images of one process: it can be resumed in one process only, not in {count}. Type "
            "trainer.devices=1, or study=<name> to start a new run"
        )


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the differences between two records of inputs."""
    return [
        *_data_changes(then["data"], now["data"]),
        *_listed("detector.config", then["model"], now["model"]),
        *_hashes("other weights in", then["weights"], now["weights"]),
        *_hashes("other code in", _of_others(then["code"]), _of_others(now["code"])),
        *_listed("times of the latency budget", then.get(LATENCY, {}), now.get(LATENCY, {})),
    ]


def _data_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if not all(split in found for split in SPLITS for found in (then, now)):
        return _listed("data", then, now)
    return [
        told
        for split, name in SPLITS.items()
        if then[split] != now[split]
        for told in _split_changes(name, then[split], now[split])
    ]


def _split_changes(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the differences between two fingerprints of a split."""
    more = now["images"] - then["images"]
    if more:
        told = f"{abs(more)} {'more' if more > 0 else 'fewer'}"
        return [f"{name} images: {then['images']} there, {now['images']} now ({told})"]
    if then["ids"] != now["ids"]:
        return [f"{name} images: different images or a different order"]
    told = [f"{name} annotations changed"] if then["annotations"] != now["annotations"] else []
    if then["sizes"] != now["sizes"]:
        sizes = f"{then['bytes']:,} bytes there, {now['bytes']:,} now"
        told.append(f"{name} images: file sizes differ ({sizes})")
    return told


def _listed(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = differences(then, now)
    told = [f"{name}: {key} {old!r} there, {new!r} now" for key, old, new in found[:MOST_TOLD]]
    return told + [f"{name}: {len(found) - MOST_TOLD} more"] * (len(found) > MOST_TOLD)


def _hashes(told: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [f"{told} {key}" for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
