"""The runs of a study as flat rows."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldt.runs import DAMAGED, DONE, files, records
from ldt.runs.files import DamagedError


def load_study(study: str | Path) -> list[dict[str, Any]]:
    """Load one flat row per run of a study, sorted by name.

    Args:
        study: directory with the runs' directories.

    Returns:
        Rows with ``run`` and ``status``: ``finished``, ``failed``, ``unfinished``, or ``damaged``
        if ``summary.json`` cannot be read. Failed and damaged ones have ``error``. Finished ones
        have the run's fields (``detector``, ``dataset``, ``method``, ``metric``, ``seed``,
        ``input_size``, ``asked_rate``, ``rounds``, ``budget``), the last round's row under its own
        keys, and the base's row under ``base_<key>``.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    return [tolerant_row(folder) for folder in folders(Path(study))]


def tolerant_row(folder: Path) -> dict[str, Any]:
    """Load one run as a row of :func:`load_study`, ``damaged`` if its summary cannot be read."""
    try:
        return study_row(folder)
    except DamagedError as error:
        return damaged_row(folder, error)


def damaged_row(folder: Path, error: DamagedError) -> dict[str, Any]:
    """Return the row of a run that cannot be read."""
    return {"run": folder.name, "status": DAMAGED, "error": str(error)}


def folders(study: Path) -> list[Path]:
    """List the run directories of a study, sorted, also those that cannot be read.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    if not study.is_dir():
        raise FileNotFoundError(f"no study at {study}; expected there: one directory per run")
    return [folder for folder in sorted(study.iterdir(), key=_name) if _may_hold_run(folder)]


def _name(path: Path) -> str:
    return path.name  # paths themselves take much longer to compare


def _may_hold_run(path: Path) -> bool:
    try:
        return files.holds_run(path) or (path.is_symlink() and not path.exists())
    except OSError:  # no permission
        return True


def failed_runs(study: Path) -> dict[Path, str]:
    """Return the directories of failed runs that no process works on, with the reasons.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    found = {folder: _failure(folder) for folder in folders(study)}
    return {folder: text for folder, text in found.items() if text and not files.held(folder)}


def remove(folder: Path) -> bool:
    """Remove a failed run; return False if it has been started again meanwhile."""
    if files.held(folder):
        return False
    with files.alone(folder):
        if not _failure(folder):
            return False
        shutil.rmtree(folder)
    return True


def _failure(folder: Path) -> str:
    """Return the first line of a failed run's error; empty for others and damaged summaries."""
    try:
        summary = files.read_json(folder / files.SUMMARY)
    except (ValueError, OSError):
        return ""
    error = str(summary.get("error")) or "no message"
    return error.splitlines()[0] if summary.get("status") == "failed" else ""


def study_row(folder: Path) -> dict[str, Any]:
    """Load one run as a row of :func:`load_study`.

    Raises:
        DamagedError: its summary cannot be read.
    """
    return row_of(folder, read_summary(folder))


def read_summary(folder: Path) -> dict[str, Any]:
    """Read ``summary.json``; empty if there is none.

    Raises:
        DamagedError: it cannot be read.
    """
    file = folder / files.SUMMARY
    summary = files.read_json(file)
    with files.reading(folder):
        if not summary and folder.is_symlink() and not folder.exists():
            raise ValueError("a link that leads nowhere")
    with files.reading(file):
        if summary.get("status") == "failed" and "error" not in summary:
            raise ValueError("no error")
    if summary.get("status") == DONE:
        records.check(file, records.FINISHED, summary)
    return summary


def row_of(folder: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a run with a summary that :func:`read_summary` has read."""
    run, status = folder.name, summary.get("status")
    if status == "failed":
        return {"run": run, "status": status, "error": str(summary["error"])}
    if status != DONE:
        return {"run": run, "status": "unfinished"}
    keys = ("study", "detector", "dataset", "method", "metric", "seed", "input_size")
    base, last, plan = summary["rounds"][0], summary["rounds"][-1], summary["plan"]
    return {
        **last,  # first: none of its keys stands for one of the run's
        **{f"base_{key}": value for key, value in base.items()},
        "run": run,
        "status": status,
        **{key: summary[key] for key in keys},
        "asked_rate": plan["rate"],
        "rounds": plan["rounds"],
        "budget": plan["budget"],
    }
