"""Sizes of all layers of a run's detectors in every round, and their coupled groups.

The command `ldt layers runs/<study>/<run> ...` writes them for runs without them.
"""

from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ldt.detectors.checkpoints import detector_of, read
from ldt.detectors.forward import eval_with_gradients, forwards_for_tracing, raw_forward
from ldt.evaluation.profiling import latency_by_module, macs_by_module
from ldt.pruning.graph import PruningGraph
from ldt.runs import files
from ldt.runs.run import check_run, layer_changes

GAP = 0.9  # rows between two stages in figures


def write_inventory(folder: Path, trust: bool = False) -> None:
    """Write ``structure.json`` and ``layers.csv`` to a run's folder, from its checkpoints.

    ``rounds`` has for each round a dict per layer with parameters: ``in`` and ``out`` channels (0
    for norms and scales), ``params``, ``multiply_adds`` of one image of the run's input size and
    its ``latency_ms`` in eager mode on the CPU; ``groups`` has the layers of each coupled group by
    its root layer's name. ``layers.csv`` has a line for each layer of the unpruned network, with
    its numbers before pruning and after the last round.

    Args:
        folder: a run's folder, with ``config.yaml`` and ``round-<t>.ckpt``.
        trust: see :func:`ldt.load_pruned`.

    Raises:
        FileNotFoundError: there is no run, or no checkpoint of the unpruned detector.
        ValueError: a checkpoint is damaged.
    """
    check_run(folder)
    checkpoints = {0: folder / files.round_checkpoint(0)} | files.checkpoints(folder)
    rounds, groups = {}, {}
    for round_, file in checkpoints.items():
        content = read(file, trust)
        detector, record = detector_of(content), content["ldt"]
        rounds[str(round_)] = _timed(detector, tuple(record["input_size"]))
        if round_ == 0:
            scope = files.read_config(folder)["prune"]["scope"]
            groups = _groups(record, detector, scope)
    files.write_json(folder / files.STRUCTURE, {"rounds": rounds, "groups": groups})
    files.write_rows(folder / files.LAYERS, [_line(change) for change in layer_changes(rounds)])


def _line(change: dict[str, Any]) -> dict[str, Any]:
    """Return a line of ``layers.csv``."""
    pairs = change["sizes"].items()
    after = {f"{key}_after": value for key, (_, value) in pairs}
    return {"layer": change["layer"], **{key: value for key, (value, _) in pairs}, **after}


class Stage(NamedTuple):
    """Consecutive layers of one stage of the network, and their positions on the y axis."""

    name: str
    layers: list[str]
    places: list[float]


def stages(layers: list[str]) -> list[Stage]:
    """Group layer names by their first two parts, in order.

    ``backbone.layer1.0.conv1`` is in the stage ``backbone layer1``. If the layers of a stage are
    not consecutive, they form several. Positions are rows from 0, with a gap between stages.
    """
    grouped: list[Stage] = []
    place = 0.0
    for name, group in groupby(layers, key=lambda layer: " ".join(layer.split(".")[:2])):
        members = list(group)
        grouped.append(Stage(name, members, [place + i for i in range(len(members))]))
        place += len(members) + GAP
    return grouped


def layers(detector: nn.Module, size: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Return ``in``, ``out``, ``params`` and ``multiply_adds`` of every layer with parameters.

    Args:
        detector: an mmdet detector.
        size: (H, W) of the input.
    """
    costs = macs_by_module(detector, partial(raw_forward, detector), (1, 3, *size))
    sizes = {}
    for name, layer in detector.named_modules():
        params = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
        if params:
            channels = {"in": _width(layer, "in"), "out": _width(layer, "out")}
            sizes[name] = channels | {"params": params, "multiply_adds": costs.get(name, 0)}
    return sizes


def _timed(detector: nn.Module, size: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Return the sizes of every layer with parameters, with the ``latency_ms`` of each."""
    times = latency_by_module(detector, partial(raw_forward, detector), (1, 3, *size))
    return {
        name: {**sizes, "latency_ms": round(times.get(name, 0.0), 4)}
        for name, sizes in layers(detector, size).items()
    }


def _width(layer: nn.Module, side: str) -> int:
    return getattr(layer, f"{side}_channels", getattr(layer, f"{side}_features", 0))


def _groups(record: dict[str, Any], detector: nn.Module, scope: list[str]) -> dict[str, list[str]]:
    """Return the layers of each coupled group below ``scope``."""
    image = next(detector.parameters()).new_zeros(1, 3, *record["input_size"])
    forward, traced = forwards_for_tracing(detector, scope, record["neck"])
    with eval_with_gradients(detector):
        graph = PruningGraph(detector, forward, image, scope, record["predictors"], traced)
    return {
        name: list(dict.fromkeys(member.name for member in group.members))
        for name, group in graph.groups.items()
    }
