"""`ldt sensitivity`: what every group of layers costs, without training."""

from collections.abc import Sequence
from pathlib import Path

import click
import torch
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ldt.api import sensitivity
from ldt.cli.subjects import open_subject
from ldt.criteria.methods import find_method
from ldt.evaluation.sensitivity import RATES, Measure, Sensitivity
from ldt.figures.sensitivity_curves import draw_sensitivity
from ldt.figures.style import save
from ldt.progress.console import terminal
from ldt.report.terminal import console
from ldt.runs.files import check_target
from ldt.runs.refusal import refusing

NAME = "sensitivity"  # of the files
SHOWN = 5  # groups of either end


def run(
    given: Sequence[str],
    out: Path,
    *,
    criteria: Sequence[str],
    rates: Sequence[float],
    measure: Measure,
    images: int,
    val: int,
    files: dict[str, str],
    trust: bool,
) -> None:
    """Measure the sensitivity of a detector, draw it and print the groups of either end.

    Args:
        given: the detector and the data, see :func:`ldt.cli.subjects.open_subject`.
        out: folder for ``sensitivity.csv`` and ``sensitivity.png``.
        criteria: methods of ``conf/method``.
        rates: shares of the channels; empty: 10 to 90 %.
        measure: ``loss`` or ``AP``.
        images: calibration images.
        val: validation images.
        files: of one's own COCO files.
        trust: of a checkpoint, see :func:`ldt.load_pruned`.
    """
    targets = {suffix: out / f"{NAME}.{suffix}" for suffix in ("csv", "png")}
    with refusing():
        for criterion in criteria:
            find_method(criterion)
        for file in targets.values():
            check_target(file)
        subject = open_subject(given, files, trust)
    subject.detector.to("cuda" if torch.cuda.is_available() else "cpu")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=terminal(), transient=True) as bar:
        task = bar.add_task("")

        def tell(text: str, done: int, total: int) -> None:
            bar.update(task, description=text.split()[0], completed=done, total=total or None)

        with refusing():
            found = sensitivity(
                subject.detector,
                subject.data,
                criteria=criteria,
                rates=rates or RATES,
                measure=measure,
                validation_images=val,
                calibration_images=images,
                tell=tell,
            )
    out.mkdir(parents=True, exist_ok=True)
    found.save(targets["csv"])
    save(draw_sensitivity(found.curves(), measure), targets["png"])
    _print(found, val)
    click.echo(f"written: {targets['csv']}, {targets['png']}")


def _print(found: Sensitivity, val: int) -> None:
    harm, shown = found.harm(), console()
    names = list(harm)
    what = "loss" if found.measure == "loss" else found.measure
    table = Table(
        title=Text(f"{what} of the whole detector: {found.base:.3f}, on {val} validation images"),
        caption=Text(f"mean change of the {what} over the rates, channels of that group removed"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("group", overflow="fold")
    table.add_column("channels", justify="right")
    criteria = list(dict.fromkeys(point.criterion for point in found.points))
    for criterion in criteria:
        table.add_column(criterion, justify="right")
    channels = {point.group: str(point.channels) for point in found.points}
    sign = 1 if found.measure == "loss" else -1
    most, least = names[:SHOWN], names[SHOWN:][-SHOWN:]
    for title, part in (("most sensitive", most), ("least sensitive", least)):
        if part:
            table.add_row(Text(title, style="bold"), *[""] * (1 + len(criteria)))
        for name in part:
            values = [_change(harm[name].get(each), sign) for each in criteria]
            table.add_row(Text(f"  {name}"), channels[name], *values)
    means = [_mean([each[c] for each in harm.values() if c in each]) for c in criteria]
    table.add_row(Text(f"mean of {len(names)} groups", style="bold"), "",
                  *(_change(mean, sign) for mean in means))  # fmt: skip
    shown.print(table)
    if found.excluded:
        shown.print(Text(f"not prunable: {len(found.excluded)} further layers of the scope"))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _change(value: float | None, sign: int) -> str:
    return "-" if value is None else f"{sign * value:+.3f}"
