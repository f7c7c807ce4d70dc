"""`python -m ldt.report runs/<study>`: one page, or a table for a paper."""

import argparse
from pathlib import Path

from ldt.report.page import MEGABYTES, page
from ldt.report.tables import write
from ldt.runs.aggregate import cells
from ldt.runs.files import write_text
from ldt.runs.run import Run, load_runs

FORMATS = ("html", "markdown", "latex", "csv")


def main(arguments: list[str] | None = None) -> None:
    """The command; exits with 2 and a message where there is nothing to compare."""
    parser = argparse.ArgumentParser(
        prog="python -m ldt.report",
        description="Compare the runs of a study, on one HTML page or as a table.",
    )
    parser.add_argument("study", type=Path, help="the study's folder: runs/<study>")
    parser.add_argument(
        "--format", choices=FORMATS, default="html", help="html, or a table (default: html)"
    )
    parser.add_argument(
        "--out", type=Path, help="file (default: <study>/report.html; tables are printed)"
    )
    parser.add_argument(
        "--pictures",
        type=float,
        default=MEGABYTES,
        metavar="MB",
        help=f"most megabytes of pictures in the page; 0: none (default: {MEGABYTES:g})",
    )
    given = parser.parse_args(arguments)
    try:
        runs = _runs(given.study)
    except FileNotFoundError as error:
        parser.error(str(error))
    if given.format == "html":
        out = given.out or given.study / "report.html"
        text = page(given.study.resolve(), runs, given.pictures)
    else:
        out, text = given.out, write(cells(runs), given.format)
    if out is None:
        print(text, end="")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    print(out)


def _runs(study: Path) -> list[Run]:
    """The study's runs, at least one of them finished."""
    if (study / "summary.json").is_file() or (study / "config.yaml").is_file():
        raise FileNotFoundError(f"{study} is a run; give its study: {study.parent}")
    if not study.is_dir():
        there = sorted(folder.name for folder in study.parent.glob("*/"))
        raise FileNotFoundError(
            f"no study at {study}; {study.parent} has: {', '.join(there) or 'nothing'}"
        )
    runs = load_runs(study)
    if not any(run.finished for run in runs):
        told = [f"{run.name}: {run.row.get('error', run.row['status'])}" for run in runs]
        raise FileNotFoundError(
            f"no finished run in {study}, which holds {len(runs)} runs; "
            "`python run.py` with the same keys goes on with a run"
            + "".join(f"\n  {t}" for t in told)
        )
    return runs


if __name__ == "__main__":
    main()
