"""`ldt benchmark`: detectors side by side in the runtimes that execute them."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from ldt.deployment.to_runtime import adapter_of
from ldt.detectors.checkpoints import read
from ldt.evaluation.round_metrics import count_params_and_macs
from ldt.report.terminal import console
from ldt.runs.formatting import TILDE, tilde
from ldt.runs.provenance import cpu_name
from ldt.runs.refusal import refusing
from ldt.runs.run import checkpoint_of
from ldt.runtimes.sessions import SUFFIXES, open_session
from ldt.runtimes.timing import (
    Network,
    Runtime,
    RuntimeName,
    Timing,
    open_all,
    time_in_turns,
)

OF_FILES: dict[str, RuntimeName] = {".onnx": "onnxruntime", ".xml": "openvino"}


class Entry(NamedTuple):
    """A detector in a runtime.

    Attributes:
        file: the checkpoint or exported file.
        runtime, threads: what executes it.
        outputs: ``raw`` maps or ``detections``.
        precision: of the network.
        params, macs: of the network, the latter for an image of its input size.
        network: what is timed.
    """

    file: Path
    runtime: RuntimeName
    threads: int
    outputs: str
    precision: str
    params: int
    macs: int
    network: Network


def run(
    paths: Sequence[Path],
    runtimes: Sequence[RuntimeName],
    threads: Sequence[int],
    runs: int,
    as_json: bool,
    trust: bool,
) -> None:
    """Time detectors in turns and print a row for each, runtime and number of threads.

    Args:
        paths: checkpoints or runs, each timed in every runtime, and exported files.
        runtimes: for the checkpoints.
        threads: numbers of threads.
        runs: timed calls of each.
        as_json: print JSON instead of a table.
        trust: see :func:`ldt.load_pruned`.
    """
    with ExitStack() as stack:
        with refusing():
            entries = [
                entry
                for path in paths
                for entry in (
                    _of_file(path, threads)
                    if path.suffix in SUFFIXES
                    else _of_checkpoint(path, runtimes, threads, trust, stack)
                )
            ]
        timings = time_in_turns({i: entry.network for i, entry in enumerate(entries)}, runs)
    rows = _rows(entries, list(timings.values()))
    about = {"cpu": cpu_name(), "runs": runs}
    if as_json:
        click.echo(json.dumps(about | {"networks": rows}, indent=2))
        return
    console().print(_table(rows, about))


def _rows(entries: Sequence[Entry], timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Return the rows; the first with as many threads and such outputs is what speeds refer to."""
    first: dict[tuple[int, str], float] = {}
    rows = []
    for entry, timing in zip(entries, timings, strict=True):
        latency = timing.latency_ms(entry.threads)
        base = first.setdefault((entry.threads, entry.outputs), latency)
        row = {**entry._asdict(), "file": str(entry.file)} | {
            "cpu_ms": round(timing.cpu_ms, 3),
            "cpu_p10_ms": round(timing.p10_ms, 3),
            "cpu_p90_ms": round(timing.p90_ms, 3),
            "wall_ms": round(timing.wall_ms, 3),
            "speed_up": round(base / latency, 3),
            "file_bytes": entry.network.file_bytes,
        }
        del row["network"]
        rows.append(row)
    return rows


def _of_checkpoint(
    path: Path,
    runtimes: Sequence[RuntimeName],
    threads: Sequence[int],
    trust: bool,
    stack: ExitStack,
) -> list[Entry]:
    path = checkpoint_of(path)
    detector = adapter_of(read(path, trust))
    counts = count_params_and_macs(detector)
    sizes = counts["params"], counts["macs"]
    settings = [Runtime(name, threads=count) for name in runtimes for count in threads]
    entries = []
    for setting, network in open_all(settings, detector, stack).items():
        size = network.file_bytes or path.stat().st_size
        network = Network(network.call, size, network.gpu)
        about = (setting.runtime, setting.threads, "raw", setting.precision)
        entries.append(Entry(path, *about, *sizes, network))
    return entries


def _of_file(path: Path, threads: Sequence[int]) -> list[Entry]:
    entries = []
    for count in threads:
        session = open_session(path, count)
        read_too = [path.with_suffix(".bin")] * (path.suffix == ".xml")
        size = sum(file.stat().st_size for file in (path, *read_too))
        about = session.about
        image = np.zeros((1, 3, *about.shape), np.float32)
        network = Network(partial(session, image), size)
        what = (OF_FILES[path.suffix], count, about.outputs, about.precision)
        entries.append(Entry(path, *what, about.parameters, about.macs, network))
    return entries


def _table(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> Table:
    caption = (
        "speed-up: over the first row with as many threads and the same outputs; by CPU time with "
        "one thread, by wall time with several"
    )
    table = Table(
        title=Text(f"{about['cpu']}, one image, medians of {about['runs']} calls in turns"),
        caption=Text(f"{caption}\n{TILDE}" if tilde(*rows, key="cpu_ms") else caption),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in ("file", "runtime", "outputs"):
        table.add_column(name, overflow="fold")
    titles = ("threads", "CPU time (ms)", "wall time (ms)", "speed-up", "parameters (M)")
    for name in (*titles, "MACs (G)", "file (MB)"):
        table.add_column(name, justify="right")
    for row in rows:
        precision = "" if row["precision"] == "f32" else f" {row['precision']}"
        table.add_row(
            Text(row["file"]),
            f"{row['runtime']}{precision}",
            row["outputs"],
            f"{row['threads']}",
            f"{tilde(row, key='cpu_ms')}{row['cpu_ms']:.2f}",
            f"{row['wall_ms']:.2f}",
            f"{row['speed_up']:.2f}",
            f"{row['params'] * 1e-6:.3f}",
            f"{row['macs'] * 1e-9:.3f}",
            f"{row['file_bytes'] * 1e-6:.2f}",
        )
    return table
