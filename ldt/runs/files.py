"""The files of a run's directory: their names, and how they are written and read.

Files are written atomically: a reader sees the old content or the new one, never a part.
"""

import contextlib
import csv
import io
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

CONFIG = "config.yaml"  # the resolved configuration
SUMMARY = "summary.json"  # how the run ended
ROUNDS = "rounds.csv"  # a row per finished round
SPLIT = "split.json"  # the images of every split
ENVIRONMENT = "environment.json"  # versions, hardware, commit
INPUTS = "inputs.json"  # fingerprints of everything that the run reads
STRUCTURE = "structure.json"  # layers of every round, coupled groups
LATENCY = "latency.json"  # latencies that were measured after the run
LAST = "last.ckpt"  # what an unfinished run resumes from
PREVIOUS = "last.ckpt.previous"  # the one before, in case that LAST is damaged
INTERRUPTED = "interrupted.ckpt"  # the weights at Ctrl-C
LOCK = ".lock"  # held while a command works on the run
LOGS = "logs"  # logs, logs-2, logs-3 ...: one folder for each start
METRICS = "metrics.csv"  # in LOGS
PICTURES = "pictures"

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a study may have hundreds of configs


def round_checkpoint(round_: int) -> str:
    """Return the name of a round's checkpoint."""
    return f"round-{round_}.ckpt"


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints of the rounds, by round."""
    return _numbered(folder, "round-*.ckpt")


def scores(round_: int) -> str:
    """Return the name of the file with a round's scores and removed channels."""
    return f"scores-{round_}.npz"


def score_files(folder: Path) -> dict[int, Path]:
    """Return the files with scores and removed channels, by round."""
    return _numbered(folder, "scores-*.npz")


def log_folders(folder: Path) -> list[Path]:
    """Return the folders of the training logs, the first start's first."""
    return list(_numbered(folder, f"{LOGS}*").values())


def next_logs(folder: Path) -> str:
    """Return the name of the next start's log folder; Lightning empties one that is there."""
    started = len(log_folders(folder))
    return f"{LOGS}-{started + 1}" if started else LOGS


def pictures(folder: Path) -> list[Path]:
    """Return the pictures of a run, sorted by name."""
    return sorted((folder / PICTURES).glob("*.png"))


def holds_run(folder: Path) -> bool:
    """Return whether a directory is that of a run."""
    return (folder / SUMMARY).is_file() or (folder / CONFIG).is_file()


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run has trained anything that a later start would continue."""
    return any((folder / name).is_file() for name in (LAST, PREVIOUS)) or bool(checkpoints(folder))


def _numbered(folder: Path, pattern: str) -> dict[int, Path]:
    """Files by the number at the end of their stem (0 without one), in its order."""
    found = {}
    for path in folder.glob(pattern):
        digits = re.search(r"(\d+)$", path.stem)
        found[int(digits[1]) if digits else 0] = path
    return dict(sorted(found.items()))


@contextlib.contextmanager
def alone(folder: Path, waits: bool = True) -> Iterator[None]:
    """Keep a second command for the same directory waiting until the first has ended.

    Args:
        folder: the run's directory, which is made where there is none.
        waits: False for further processes of the same command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not waits:
        yield
        return
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("%s is being run by another process: waiting for its end", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration that stands in a run's directory; empty where there is none.

    Raises:
        ValueError: it is damaged.
    """
    file = folder / CONFIG
    if not file.is_file():
        return {}
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), _LOADER)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove the run to run it again") from error
    return found if isinstance(found, dict) else {}


def write_json(path: Path, data: Any) -> None:
    """Plain data as indented JSON."""
    write_text(path, json.dumps(data, indent=2, allow_nan=True) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no file; ValueError for a damaged one."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to run again") from error


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as CSV; the columns are the union of their keys, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file, numbers as numbers; empty where there is no file."""
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to run again") from error


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
