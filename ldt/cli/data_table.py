"""`ldt data`: what a data set holds, without training."""

import contextlib
import logging
from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from ldt.build import build_data
from ldt.data import tally
from ldt.data.datamodule import DetectionDataModule
from ldt.data.summary import NAMES, SplitSummary, summarise, warnings_of
from ldt.detectors.models import quiet
from ldt.experiment import composed
from ldt.report.terminal import console
from ldt.runs.formatting import printable
from ldt.runs.refusal import refusing

MOST_SIZES = 3  # sizes of images that are listed


def run(overrides: Sequence[str]) -> None:
    """Print the counts of a configuration's data, and what is wrong with them.

    Args:
        overrides: Hydra overrides, as for `ldt run`.

    Raises:
        ValueError: the configuration is invalid, or the data cannot be used.
        FileNotFoundError: a file of the data is missing.
    """
    quiet()
    with _unlogged(), refusing():
        data = build_data(composed(*overrides))
        data.prepare_data()
        data.setup("fit")
    summaries = {name: summarise(data, split) for split, name in NAMES.items()}
    out = console()
    out.print(_counts(data, summaries))
    if (found := _findings(summaries)).row_count:
        out.print(found)
    for line in warnings_of(data):
        out.print(Text(f"warning: {line}", style="yellow"), soft_wrap=True)


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Do not log the findings that the table shows."""
    logger = logging.getLogger(tally.__name__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _counts(data: DetectionDataModule, summaries: dict[str, SplitSummary]) -> Table:
    table = _table(f"{type(data).__name__} {data.root or ''}".strip(), ["", *summaries])
    for column in table.columns[1:]:
        column.justify = "right"
    both = list(summaries.values())
    table.add_row("images", *(f"{each.images}" for each in both))
    table.add_row("without objects", *(f"{each.empty}" for each in both))
    table.add_row("width x height", *(_sizes(each) for each in both))
    table.add_row("objects", *(f"{sum(each.objects.values())}" for each in both))
    for name in both[0].objects:
        table.add_row(Text(f"  {printable(name)}"), *(f"{each.objects[name]}" for each in both))
    for name, limits in (("small", "< 32²"), ("medium", "< 96²"), ("large", "≥ 96²")):
        told = f"{name} boxes ({limits} pixels)"
        table.add_row(told, *(f"{each.bands[name]}" for each in both))
    table.add_row("ignored regions", *(f"{each.ignored}" for each in both))
    return table


def _sizes(summary: SplitSummary) -> str:
    known = [(size, count) for size, count in summary.sizes.most_common() if size is not None]
    lines = [f"{width}x{height}: {count}" for (width, height), count in known[:MOST_SIZES]]
    if known[MOST_SIZES:]:
        sides = list(zip(*(size for size, _ in known), strict=True))
        ranges = "x".join(f"{min(side)}..{max(side)}" for side in sides)
        lines.append(f"{len(known)} sizes, {ranges}")
    return "\n".join(lines) or "not stated"


def _findings(summaries: dict[str, SplitSummary]) -> Table:
    table = _table("left out or changed", ["split", "what", "count", "the first"])
    for split, summary in summaries.items():
        for what, entry in summary.told.entries.items():
            table.add_row(split, Text(what), f"{entry.count}", Text(entry.example))
    return table
