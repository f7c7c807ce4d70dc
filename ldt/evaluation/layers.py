"""What every layer of a run's detectors has, round by round, and which layers are cut together.

The command `ldt layers runs/<study>/<run> ...` writes it for runs that lack it.
"""

from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ldt.detectors.checkpoints import detector_of, read
from ldt.detectors.forward import eval_with_gradients, forward_for_tracing, raw_forward
from ldt.evaluation.profiling import macs_by_module
from ldt.pruning.graph import PruningGraph
from ldt.runs import files

GAP = 0.9  # rows between two stages, where they are drawn


def write_inventory(folder: Path) -> None:
    """Write ``structure.json`` into a run's folder, made from its checkpoints.

    ``rounds`` has for each round a dict per layer with parameters: ``in`` and ``out`` channels (0
    for norms and scales), ``params``, and ``multiply_adds`` of one image of the run's input size;
    ``groups`` has the layers of each coupled group by its root layer's name.

    Args:
        folder: of a run, with ``config.yaml`` and ``round-<t>.ckpt``.

    Raises:
        FileNotFoundError: there is no checkpoint of the base.
        ValueError: a checkpoint is damaged.
    """
    found = {0: folder / files.round_checkpoint(0)} | files.checkpoints(folder)
    rounds, groups = {}, {}
    for round_, file in found.items():
        content = read(file)
        detector, about = detector_of(content), content["ldt"]
        rounds[str(round_)] = layers(detector, tuple(about["input_size"]))
        if round_ == 0:
            scope = files.read_config(folder)["prune"]["scope"]
            groups = _groups(about, detector, scope)
    files.write_json(folder / files.STRUCTURE, {"rounds": rounds, "groups": groups})


class Stage(NamedTuple):
    """Consecutive layers below one part of the network, and their places on the y axis."""

    name: str
    layers: list[str]
    places: list[float]


def stages(layers: list[str]) -> list[Stage]:
    """Group layer names by their first two parts, in order.

    ``backbone.layer1.0.conv1`` is in the stage ``backbone layer1``. A stage that comes again later
    is a second one. Places count rows from 0, with a gap between stages.
    """
    found: list[Stage] = []
    place = 0.0
    for name, group in groupby(layers, key=lambda layer: " ".join(layer.split(".")[:2])):
        members = list(group)
        found.append(Stage(name, members, [place + i for i in range(len(members))]))
        place += len(members) + GAP
    return found


def layers(detector: nn.Module, size: tuple[int, int]) -> dict[str, dict[str, int]]:
    """``in``, ``out``, ``params`` and ``multiply_adds`` of every layer that has parameters.

    Args:
        detector: an mmdet detector.
        size: (H, W) of the input.
    """
    costs = macs_by_module(detector, partial(raw_forward, detector), (1, 3, *size))
    found = {}
    for name, layer in detector.named_modules():
        params = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
        if params:
            channels = {"in": _width(layer, "in"), "out": _width(layer, "out")}
            found[name] = channels | {"params": params, "multiply_adds": costs.get(name, 0)}
    return found


def _width(layer: Any, side: str) -> int:
    return getattr(layer, f"{side}_channels", getattr(layer, f"{side}_features", 0))


def _groups(about: dict[str, Any], detector: nn.Module, scope: list[str]) -> dict[str, list[str]]:
    """The coupled groups of a round's detector below ``scope``."""
    image = next(detector.parameters()).new_zeros(1, 3, *about["input_size"])
    forward = forward_for_tracing(detector, about["neck"])
    with eval_with_gradients(detector):
        graph = PruningGraph(detector, forward, image, scope, about["predictors"])
    return {
        name: list(dict.fromkeys(member.name for member in group.members))
        for name, group in graph.groups.items()
    }
