"""What a run is about to do, printed before it begins."""

import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from ldt.data.datamodule import DetectionDataModule
from ldt.data.summary import NAMES, counts, summarise
from ldt.loop.schedule import PruningSchedule
from ldt.progress.console import console
from ldt.report.terminal import BUDGETS
from ldt.runs.provenance import cpu_name


def print_banner(
    config: Mapping[str, Any],
    plan: PruningSchedule,
    data: DetectionDataModule,
    size: Mapping[str, float],
    device: str,
    folder: Path,
) -> None:
    """Print what runs, on which data and device, and where its results will be.

    Args:
        config: the run's configuration as plain data.
        plan: its schedule.
        data: its data.
        size: parameters and MACs of the unpruned detector.
        device: what it runs on, see :func:`describe_device`.
        folder: the run's directory.
    """
    out = console()
    out.print(Text(config["run_name"], style="bold"), soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(config, plan, data, size, device):
        table.add_row(f"  {name}", Text(text))
    out.print(table)
    out.print(Text(f"  directory  {folder}"), soft_wrap=True)


def _rows(
    config: Mapping[str, Any],
    plan: PruningSchedule,
    data: DetectionDataModule,
    size: Mapping[str, float],
    device: str,
) -> Iterator[tuple[str, str]]:
    for split, name in NAMES.items():
        yield ("data" if split == "train" else ""), f"{name}: {counts(summarise(data, split))}"
    width, height = data.scale
    yield (
        "detector",
        f"{config['detector']['name']}: {size['params'] / 1e6:.3f} M parameters, "
        f"{size['macs'] / 1e9:.3f} G MACs at {height}x{width}",
    )
    yield "method", _method(config, plan)
    yield "training", _training(config, plan)
    yield "device", device


def _method(config: Mapping[str, Any], plan: PruningSchedule) -> str:
    name, losses = config["method"]["name"], ", LDT's losses while training"
    losses = losses if config["ldt"]["enabled"] else ""
    if not plan.rounds:
        reason = " (prune.rounds=0)" if config["method"]["criterion"] else ""
        return f"{name}: nothing is pruned{reason}{losses}"
    rounds = "1 round" if plan.rounds == 1 else f"{plan.rounds} rounds"
    budget = BUDGETS[plan.budget]
    return f"{name}: removes {plan.rate:.0%} of the {budget} in {rounds}{losses}"


def _training(config: Mapping[str, Any], plan: PruningSchedule) -> str:
    base = _epochs(plan.base_epochs) if plan.base_epochs else "none before the first cut"
    after = f", {_epochs(plan.retrain_epochs)} after each cut" if plan.rounds else ""
    return f"{base}{after}; {config['recipe']['batch_size']} images per step"


def _epochs(number: int) -> str:
    return "1 epoch" if number == 1 else f"{number} epochs"


def describe_device(device: torch.device, processes: int, precision: str) -> str:
    """Describe what a run computes on."""
    if device.type == "cuda":
        found = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        found = f"{cpu_name()}, {threads} thread{'s' * (threads != 1)}"
    several = f"{processes} x " if processes > 1 else ""
    return f"{several}{device.type} ({found}), precision {precision}"


def command() -> str:
    """Return the command of this process, as it could be typed."""
    program = Path(sys.argv[0])
    start = ["python", str(program)] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])
