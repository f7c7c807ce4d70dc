"""Files of a run's directory: names, reading and atomic writing.

Files are written atomically: a reader sees either the old or the new content, never a part.
"""

import contextlib
import csv
import errno
import inspect
import io
import json
import logging
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from zipfile import ZipFile

import yaml
from filelock import FileLock, Timeout

from ldt.runs import DONE
from ldt.runs.refusal import one_line, refused

log = logging.getLogger(__name__)

CONFIG = "config.yaml"  # the resolved configuration
SUMMARY = "summary.json"  # outcome of the run
ROUNDS = "rounds.csv"  # one row per finished round
SPLIT = "split.json"  # the image ids of each split
ENVIRONMENT = "environment.json"  # versions, hardware, commit
INPUTS = "inputs.json"  # fingerprints of the run's inputs
STRUCTURE = "structure.json"  # layers per round, coupled groups
LAYERS = "layers.csv"  # layers before pruning and after
LATENCY = "latency.json"  # latencies measured after the run
LATENCY_TABLE = "latency_table.json"  # times of layers that a latency budget goes by
LAST = "last.ckpt"  # from which an unfinished run resumes
PREVIOUS = "last.ckpt.previous"  # the previous one, in case LAST is damaged
INTERRUPTED = "interrupted.ckpt"  # the weights at Ctrl-C
LOCK = ".lock"  # held while a command works on the run
RUN_LOG = "run.log"  # messages; Hydra writes it
MULTIRUN = "multirun.yaml"  # of a study: the last sweep; Hydra writes it
WANDB_ID = "wandb-id.json"  # id of the run on W&B
LOGS = "logs"  # logs, logs-2, logs-3 ...: one folder per start
METRICS = "metrics.csv"  # in LOGS
PICTURES = "pictures"
DRAFT = ".draft-"  # begins the names of files that are being written
MOST_REASON = 200  # characters of the reason for which a file cannot be read
# what killed processes leave: drafts, those of earlier versions, Lightning's state in mid-epoch
LEFT = (f"{DRAFT}*", f"*/{DRAFT}*", ".*.*.*[0-9]", "hpc_ckpt_*.ckpt")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of some network file systems
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a study may have hundreds of configs
LARGEST_CONFIG, LARGEST_FILE = 2**20, 2**25  # bytes; a run has some thousand, or some million
MOST_LEVELS = 100  # of nesting
NO_WAITING = getattr(os, "O_NONBLOCK", 0)  # for somebody to write to a pipe
SURROGATE = re.compile(r"\\[uU]0{0,4}d[89a-f]", re.IGNORECASE)
T = TypeVar("T")


class DamagedError(ValueError):
    """A file of a run that cannot be read; the message names it."""


@contextlib.contextmanager
def reading(file: Path, remedy: str = "remove it to run again") -> Iterator[None]:
    """Convert whatever reading a damaged file raises; all files of runs are read in such a block.

    Args:
        file: the file, or the directory of a run.
        remedy: what to do about it.

    Raises:
        DamagedError: the block raised an exception.
    """
    try:
        yield
    except DamagedError:
        raise
    except Exception as error:  # parsers and libraries for pictures raise all kinds
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        reason = one_line(f"{kind}{error}", MOST_REASON)
        raise DamagedError(f"{file} is damaged ({reason}); {remedy}") from error


def tolerated(read: Callable[[], T], otherwise: T) -> T:
    """Return what a file holds that results do not depend on; if it is damaged, warn and go on."""
    try:
        return read()
    except DamagedError as error:
        log.warning("left out: %s", error)
        return otherwise


def round_checkpoint(round_: int) -> str:
    """Return the name of a round's checkpoint."""
    return f"round-{round_}.ckpt"


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints by round."""
    return _numbered(folder, "round-*.ckpt")


def scores(round_: int) -> str:
    """Return the name of the file with a round's scores and removed channels."""
    return f"scores-{round_}.npz"


def detections(round_: int) -> str:
    """Return the name of the file with the detections of a round's validation."""
    return f"detections-{round_}.npz"


def score_files(folder: Path) -> dict[int, Path]:
    """Return the files with scores and removed channels, by round."""
    return _numbered(folder, "scores-*.npz")


def log_folders(folder: Path) -> list[Path]:
    """Return the folders of the training logs in order of the starts."""
    return list(_numbered(folder, f"{LOGS}*").values())


def next_logs(folder: Path) -> str:
    """Return the name of the next log folder; Lightning would empty an existing one."""
    started = len(log_folders(folder))
    return f"{LOGS}-{started + 1}" if started else LOGS


def pictures(folder: Path) -> list[Path]:
    """Return the pictures of a run, sorted by name."""
    found = folder / PICTURES
    return [] if found.is_symlink() else sorted(found.glob("*.png"))


def holds_run(folder: Path) -> bool:
    """Return whether a directory contains a run."""
    return (folder / SUMMARY).is_file() or (folder / CONFIG).is_file()


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run has a checkpoint to resume from."""
    return any((folder / name).is_file() for name in (LAST, PREVIOUS)) or bool(checkpoints(folder))


def _numbered(folder: Path, pattern: str) -> dict[int, Path]:
    """Files by the number at the end of their stem (default 0), sorted by it."""
    found = {}
    for path in folder.glob(pattern):
        digits = re.search(r"(\d+)$", path.stem)
        found[int(digits[1]) if digits else 0] = path
    return dict(sorted(found.items()))


@contextlib.contextmanager
def alone(folder: Path, waits: bool = True) -> Iterator[None]:
    """Lock a run's directory; a second command for it waits until the first has ended.

    Drafts that killed processes have left are removed. A finished run that cannot be written, as on
    a read-only disk, is not locked.

    Args:
        folder: the run's directory, created if missing.
        waits: whether to take the lock; False for the other processes of the same command.

    Raises:
        OSError: a run that is not finished cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            if waits:
                held.enter_context(locked(folder / LOCK))
                _remove_left(folder)
        except OSError as error:
            if error.errno not in READ_ONLY or read_json(folder / SUMMARY).get("status") != DONE:
                raise refused(error) from None
            _close_log(folder)
        yield


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock file; wait while another process holds it.

    It ends with its process, on any host. Where the file system has no locks, a warning tells so.
    """
    lock = _lock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("%s is in use by another process: waiting for it to finish", file.parent)
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning(
            "%s is on a file system without locks: start a run in one process at a time",
            file.parent,
        )
    try:
        yield
    finally:
        lock.release()


def _lock(file: Path) -> FileLock:
    """Return a lock that a file left by an earlier process does not hold, on any file system."""
    known = inspect.signature(FileLock.__init__).parameters  # earlier versions raise as asked here
    options: dict[str, Any] = {"fallback_to_soft": False} if "fallback_to_soft" in known else {}
    return FileLock(file, **options)


def held(folder: Path) -> bool:
    """Return whether a process works on a run."""
    try:
        with _lock(folder / LOCK).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def _remove_left(folder: Path) -> None:
    for file in (file for pattern in LEFT for file in folder.glob(pattern)):
        file.unlink(missing_ok=True)


def _close_log(folder: Path) -> None:
    """Stop writing to the log file of a run, which cannot be written."""
    for handler in list(logging.root.handlers):
        file = getattr(handler, "baseFilename", None)
        if file is not None and Path(file).resolve().parent == folder.resolve():
            logging.root.removeHandler(handler)


def discard(folder: Path) -> None:
    """Remove what a refused command has left in a directory that holds no run.

    The directory is removed too if nothing else is in it, and so are its parents below the working
    directory.
    """
    for file in (folder / LOCK, folder / RUN_LOG, folder / WANDB_ID):
        file.unlink(missing_ok=True)
    _remove_empty(*log_folders(folder), folder)


def discard_sweep(study: Path) -> None:
    """Remove what a refused sweep has left in the directory of a study, if nothing else is there.

    Hydra writes ``multirun.yaml`` before it composes the jobs.
    """
    if study.is_dir() and {file.name for file in study.iterdir()} == {MULTIRUN}:
        (study / MULTIRUN).unlink()
    _remove_empty(study)


def _remove_empty(*folders: Path) -> None:
    """Remove empty directories, and then the last one's empty parents below the working one."""
    here, last = Path.cwd(), folders[-1].absolute()
    parents = [parent for parent in last.parents if here in parent.parents]
    for place in (*folders, *parents):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def check_folder_of(path: str | Path) -> None:
    """Check as :func:`check_target` does that a file can be written, in a folder that exists.

    Raises:
        FileNotFoundError: its folder does not exist.
        ValueError: it cannot be written.
    """
    check_target(path := Path(path))
    if not (folder := path.absolute().parent).is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {folder}")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a draft to write in place of a file, which it replaces when it is on the disk.

    The draft has the suffix of the file, from which some libraries take the format. It is removed
    if the block raises; a killed process leaves it to :func:`alone`.

    Example:
        >>> with writing(Path("figure.png")) as draft:
        ...     figure.savefig(draft)
    """
    draft = path.with_name(f"{DRAFT}{os.getpid()}-{path.name[-50:]}")
    try:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(draft)):
            raise type(error)(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def check_target(path: Path) -> None:
    """Check that a file can be written, before the work for it begins; folders may be missing.

    Raises:
        ValueError: it cannot.
    """
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise ValueError(f"{path} is a folder, not a file to write")
        if not stat.S_ISREG(kind):  # a draft would replace it
            raise ValueError(f"{path} is a pipe or a device, not a file to write")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # its name is too long, say
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise ValueError(f"{path} cannot be written: {parent} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=parent):  # permissions do not tell: /proc, root on NFS
            pass
    except OSError as error:
        read_only = isinstance(error, PermissionError) or error.errno == errno.EROFS
        reason = "is read-only" if read_only else f"takes no files ({error.strerror})"
        raise ValueError(f"{path} cannot be written: {parent} {reason}") from error


def picture_folder(folder: Path) -> Path:
    """Return where the pictures of a run or a study are.

    Raises:
        ValueError: it is a link, which in a stranger's run leads anywhere.
    """
    found = folder / PICTURES
    if found.is_symlink():
        raise ValueError(f"{found} is a link, which is not followed; remove it, or type --out FILE")
    return found


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with writing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration stored in a run's directory; empty if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / CONFIG
    with reading(file, "remove the run to repeat it"):
        if (text := _text(file, LARGEST_CONFIG)) is None:
            return {}
        _check_nesting(text)
        found = yaml.load(text, _LOADER)
        if not isinstance(found, dict):
            raise ValueError("it is empty" if found is None else "it holds no keys")
        _check_characters(text, found)
    return found


def _check_characters(text: str, content: object) -> None:
    """Refuse halves of surrogate pairs, which can be read but not written.

    Raises:
        UnicodeEncodeError: there is one.
    """
    if SURROGATE.search(text):  # an escape
        json.dumps(content, ensure_ascii=False, default=str).encode()


def _text(file: Path, most: int = LARGEST_FILE) -> str | None:
    """Return the text of a file; None if there is none."""
    try:
        return read_limited(file, most)
    except FileNotFoundError:
        if file.is_symlink():  # it leads nowhere
            raise
        return None


def _check_nesting(text: str) -> None:
    """Refuse YAML that is small and unfolds to a tree without end; ldt writes no aliases."""
    depth = 0
    for event in yaml.parse(text, _LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > MOST_LEVELS:
            raise ValueError("it has aliases, or is nested too deeply")


def read_limited(path: Path, most: int = LARGEST_FILE) -> str:
    """Read a text file of a run, whoever wrote it.

    Raises:
        ValueError: it is larger than ``most`` bytes, or no text.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"larger than {most / 2**20:.0f} MiB")
    return content.decode("utf-8")


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read; a pipe or a device, which may never end, is refused.

    Raises:
        ValueError: it is no regular file.
    """
    number = os.open(path, os.O_RDONLY | NO_WAITING)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise ValueError("no regular file")
    return os.fdopen(number, "rb")


def check_archive(path: Path, most: int = LARGEST_FILE) -> None:
    """Check how large the parts of a zip archive are that is about to be read.

    Args:
        path: a file of numpy's (``.npz``) or of torch's.
        most: bytes of all parts together.

    Raises:
        ValueError: they are larger; compressed parts can be of any size.
        BadZipFile: it is no such archive.
    """
    with ZipFile(path) as archive:
        size = sum(part.file_size for part in archive.infolist())
    if size > most:
        raise ValueError(f"{path} unpacks to more than {most / 2**20:.0f} MiB")


def write_json(path: Path, data: object) -> None:
    """Write plain data as indented JSON."""
    write_text(path, _json(data))


def _json(data: object) -> str:
    return json.dumps(data, indent=2, allow_nan=True) + "\n"


def write_first(path: Path, data: object) -> None:
    """Write plain data as JSON unless there is a file; of several processes the first writes it."""
    draft = path.with_name(f"{DRAFT}{os.getpid()}-first-{path.name}")
    write_json(draft, data)
    try:
        os.link(draft, path)  # unlike a move, it fails if there is a file
    except FileExistsError:
        pass
    except OSError:  # no links on this file system
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, empty if there is no file; raise DamagedError if it is damaged."""
    with reading(path):
        if (text := _text(path)) is None:
            return {}
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        _check_characters(text, found)
    return found


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV; the columns are the union of their keys, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a CSV file with numbers converted; empty if there is no file.

    Raises:
        DamagedError: the file is damaged.
    """
    with reading(path):
        if (text := _text(path)) is None:
            return []
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        return [{key: _number(value) for key, value in row.items()} for row in rows]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
