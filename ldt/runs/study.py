"""The runs of a study as flat rows."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldt.runs import files


def load_study(study: str | Path) -> list[dict[str, Any]]:
    """Load one flat row per run of a study, sorted by name.

    Args:
        study: directory with the runs' directories.

    Returns:
        Rows with ``run`` and ``status``: ``finished``, ``failed`` (also if ``summary.json``
        cannot be read) or ``unfinished``. Failed ones have ``error``. Finished ones have the run's
        fields (``detector``, ``dataset``, ``method``, ``metric``, ``seed``, ``input_size``,
        ``asked_rate``, ``rounds``, ``budget``), the last round's row under its own keys, and the
        base's row under ``base_<key>``.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    return [study_row(folder) for folder in folders(Path(study))]


def folders(study: Path) -> list[Path]:
    """List the run directories of a study, sorted; raise FileNotFoundError if it does not exist."""
    if not study.is_dir():
        raise FileNotFoundError(f"no study at {study}; expected there: one directory per run")
    return [folder for folder in sorted(study.iterdir()) if files.holds_run(folder)]


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
    """Load one run as a row of :func:`load_study`."""
    file = folder / files.SUMMARY
    try:
        return _flat(folder.name, files.read_json(file))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OSError) as error:
        text = f"{file} is damaged ({type(error).__name__}: {error}); remove it to run again"
        return {"run": folder.name, "status": "failed", "error": text}


def _flat(run: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    status = summary.get("status")
    if status == "failed":
        return {"run": run, "status": status, "error": str(summary["error"])}
    if status != "finished":
        return {"run": run, "status": "unfinished"}
    keys = ("study", "detector", "dataset", "method", "metric", "seed", "input_size")
    base, last, plan = summary["rounds"][0], summary["rounds"][-1], summary["plan"]
    return {
        "run": run,
        "status": status,
        **{key: summary[key] for key in keys},
        "asked_rate": plan["rate"],
        "rounds": plan["rounds"],
        "budget": plan["budget"],
        **last,
        **{f"base_{key}": value for key, value in base.items()},
    }
