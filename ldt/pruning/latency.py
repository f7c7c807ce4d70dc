"""The time of each layer over its widths, as a cost of pruning.

A unit is a convolution with the normalisation and the activation behind it, on a map of one size.
Its time is measured at few widths and interpolated. What a network does between its units
(additions, resizing, concatenation) shrinks with them in part: how much more than the units a
network saves is measured on the network with half of its channels.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from math import lcm
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldt.pruning.budget import some_of
from ldt.pruning.costs import CostModel, LayerCost
from ldt.pruning.dependency import depthwise
from ldt.pruning.graph import PruningGraph
from ldt.pruning.layer_types import ACTIVATIONS, CONVOLUTIONS

FEW = 4  # channels before and behind a unit that is timed
BLOCK, NARROW = 16, 8  # channels: units are timed at multiples, as kernels compute in blocks
SHARES = (0.25, 0.5, 0.75)  # of a layer's width at which its unit is timed, too
Point = tuple[int, int]  # input and output channels
Times = Callable[["Unit", Point], float]  # ms


@dataclass(frozen=True)
class Unit:
    """A convolution, and what follows it, on an input map of one size.

    A linear layer counts as a convolution of 1x1, a deformable one as an ordinary one.

    Attributes:
        kind: ``Conv2d`` or ``ConvTranspose2d``; empty: no convolution.
        size: (h, w) of the input map; (positions, 1) of a linear layer.
        kernel, stride, padding, dilation: of the convolution.
        groups: of the convolution; 0: depthwise.
        norm: number of groups of a group norm; 0: a batch norm; None: neither.
        activation: class of the activation that follows, or empty.
    """

    kind: str
    size: tuple[int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    norm: int | None = None
    activation: str = ""

    @classmethod
    def of(cls, layer: Any, norm: nn.Module | None, size: tuple[int, int]) -> "Unit":
        """Return the unit of a layer without its activation."""
        norms = 0 if isinstance(norm, nn.modules.batchnorm._BatchNorm) else None
        norms = norm.num_groups if isinstance(norm, nn.GroupNorm) else norms
        if isinstance(layer, nn.Linear):
            return cls("Conv2d", size, norm=norms)
        kind = "ConvTranspose2d" if isinstance(layer, nn.ConvTranspose2d) else "Conv2d"
        padding = (0, 0) if isinstance(layer.padding, str) else layer.padding
        shape = (layer.kernel_size, layer.stride, padding, layer.dilation)
        groups = 0 if depthwise(layer) else layer.groups
        return cls(kind, size, *(_pair(each) for each in shape), groups=groups, norm=norms)

    def __str__(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def layers(self, point: Point) -> list[nn.Module]:
        """Return the unit's layers at these widths."""
        ins, outs = point
        found: list[nn.Module] = []
        if self.kind:
            groups = self.groups or outs
            shape = (ins, outs, self.kernel, self.stride, self.padding)
            options = {"dilation": self.dilation, "groups": groups, "bias": self.norm is None}
            found.append(getattr(nn, self.kind)(*shape, **options))
        if self.norm is not None:
            found.append(nn.GroupNorm(self.norm, outs) if self.norm else nn.BatchNorm2d(outs))
        kinds = {kind.__name__: kind for kind in ACTIVATIONS}
        return found + ([kinds[self.activation]()] if self.activation else [])

    def network(self, point: Point) -> tuple[nn.Module, Tensor]:
        """Return the unit between layers from and to :data:`FEW` channels, and their input.

        In between the maps have the layout in which a runtime keeps those of a whole network.
        """
        ends = nn.Conv2d(FEW, point[0], 1), nn.Conv2d(point[1], FEW, 1)
        network = nn.Sequential(ends[0], *self.layers(point), ends[1]).eval()
        return network, torch.zeros(1, FEW, *self.size)

    def ends(self, point: Point) -> tuple[tuple["Unit", Point], tuple["Unit", Point]]:
        """Return the two networks of which :meth:`network` has a half each besides the unit."""
        with torch.device("meta"):
            layers = nn.Sequential(*self.layers(point)).eval()
            out = layers(torch.zeros(1, point[0], *self.size)).shape
        return _bare(self.size, point[0]), _bare((out[2], out[3]), point[1])


def _bare(size: tuple[int, int], width: int) -> tuple[Unit, Point]:
    return Unit("", size), (width, width)


def _pair(value: int | Iterable[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    return int(pair[0]), int(pair[1])


def find_units(graph: PruningGraph) -> dict[str, list[Unit]]:
    """Return the units of every convolution and linear layer, one for each of its calls."""
    modules = dict(graph.model.named_modules())
    norms = {modules[norm] for norm in graph.norm_of.values()}
    found: dict[str, list[Unit]] = {}
    made_by: dict[int, tuple[str, int, Tensor]] = {}  # keeps the tensors: ids stay unique

    def layer_called(
        name: str, module: nn.Module, inputs: Sequence[Tensor], output: Tensor
    ) -> None:
        linear = isinstance(module, nn.Linear)
        positions = (inputs[0].numel() // inputs[0].shape[-1], 1)
        size = positions if linear else (int(inputs[0].shape[2]), int(inputs[0].shape[3]))
        norm = modules[graph.norm_of[name]] if name in graph.norm_of else None
        calls = found.setdefault(name, [])
        calls.append(Unit.of(module, norm, size))
        made_by[id(output)] = (name, len(calls) - 1, output)

    def norm_called(_module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
        if id(inputs[0]) in made_by:
            made_by[id(output)] = (*made_by[id(inputs[0])][:2], output)

    def activation_called(module: nn.Module, inputs: Sequence[Tensor]) -> None:
        if id(inputs[0]) in made_by:
            name, call, _ = made_by[id(inputs[0])]
            found[name][call] = replace(found[name][call], activation=type(module).__name__)

    hooks = []
    for name, module in modules.items():
        if isinstance(module, CONVOLUTIONS):
            hook = lambda *call, name=name: layer_called(name, *call)  # noqa: E731
            hooks.append(module.register_forward_hook(hook))
        elif module in norms:
            hooks.append(module.register_forward_hook(norm_called))
        elif type(module) in ACTIVATIONS:
            hooks.append(module.register_forward_pre_hook(activation_called))
    graph.run(hooks)
    return found


@dataclass(frozen=True)
class LayerTime:
    """Time of a layer over its widths, from a grid; it falls with every channel that is removed.

    Attributes:
        ins, outs: channels now; ``ins`` is 1 where channels are processed one by one.
        grid: widths of the grid, ascending.
        ms: [input widths, output widths], of all calls of the layer.
    """

    ins: int
    outs: int
    grid: tuple[tuple[int, ...], tuple[int, ...]]
    ms: np.ndarray
    _known: dict[Point, float] = field(default_factory=dict, repr=False)

    @classmethod
    def measured(
        cls, layer: nn.Module, units: list[Unit], free: tuple[bool, bool], times: Times
    ) -> "LayerTime":
        """Look a layer's times up, or have them measured.

        Args:
            layer: a convolution.
            units: of its calls.
            free: whether input and output channels can be removed.
            times: returns the time of a unit.
        """
        alone, groups = depthwise(layer), getattr(layer, "groups", 1)
        ins, outs = _widths(layer)
        multiple = lcm(*(unit.norm or 1 for unit in units), 1 if alone else groups)
        inner = (1,) if alone else _grid(ins, free[0], groups)
        grid = inner, _grid(outs, free[1], multiple)
        points = [(b, b) if alone else (a, b) for a, b in product(*grid)]
        ms = np.array([sum(times(unit, point) for unit in units) for point in points])
        ms = _monotone(ms.reshape(len(grid[0]), len(grid[1])))
        return cls(1 if alone else ins, outs, grid, ms)

    def of(self, layer: nn.Module) -> "LayerTime":
        """Return the times with the widths that the layer has now."""
        ins, outs = _widths(layer)
        return replace(self, ins=1 if depthwise(layer) else ins, outs=outs)

    def at(self, ins: int, outs: int) -> float:
        """Return the time at these widths, in ms."""
        if (ins, outs) not in self._known:  # asked for again at every step of a selection
            rows = [np.interp(outs, self.grid[1], row) for row in self.ms]
            self._known[ins, outs] = float(np.interp(ins, self.grid[0], rows))
        return self._known[ins, outs]

    def saved(self, removed_in: int, removed_out: int) -> float:
        """Return the time saved by removing this many input and output channels."""
        now = self.at(self.ins, self.outs)
        return now - self.at(self.ins - removed_in, self.outs - removed_out)


def _widths(layer: Any) -> Point:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _grid(width: int, free: bool, multiple: int) -> tuple[int, ...]:
    """Return the widths at which a side of a layer is timed."""
    if not free:
        return (width,)
    block = lcm(BLOCK if width > 2 * BLOCK else NARROW, multiple)
    between = {round(share * width / block) * block for share in SHARES}
    narrow = lcm(NARROW, multiple)
    return tuple(sorted({each for each in {*between, narrow} if 0 < each < width} | {width}))


def _monotone(ms: np.ndarray) -> np.ndarray:
    """Return the mean of the lowest monotone table above and the highest one below."""
    above, below = ms, ms[::-1, ::-1]
    for axis in (0, 1):
        above = np.maximum.accumulate(above, axis)
        below = np.minimum.accumulate(below, axis)
    return (above + below[::-1, ::-1]) / 2


def half_of(graph: PruningGraph) -> dict[str, list[int]]:
    """Return about half of the channels of each group; those that stay are a multiple."""
    found = {}
    for name, group in graph.groups.items():
        multiple = lcm(group.parts, BLOCK)
        keep = max(round(group.size / 2 / multiple), 1) * multiple
        found[name] = some_of(group, max(group.size - keep, 0)).tolist()
    return found


def layer_times(graph: PruningGraph, times: Times) -> dict[str, LayerTime]:
    """Return the times of every convolution and linear layer over the widths it may get.

    Args:
        graph: the coupled groups of the unpruned network.
        times: returns the time of a unit in ms.
    """
    modules = dict(graph.model.named_modules())
    members = [member for group in graph.groups.values() for member in group.members]
    ins, outs = ({m.name for m in members if m.side in (side, "both")} for side in ("in", "out"))
    return {
        name: LayerTime.measured(modules[name], units, (name in ins, name in outs), times)
        for name, units in find_units(graph).items()
    }


class LatencyModel(CostModel):
    """Compute what removing channels saves of a network's time.

    Args:
        graph: the coupled groups.
        layers: the time of each layer over its widths.
        network_ms: time of the whole network as it is now.
        slope: what the network saves where its layers save 1 ms.

    Attributes:
        layers: at the widths of now.
        network_ms: as given.
    """

    def __init__(
        self,
        graph: PruningGraph,
        layers: Mapping[str, LayerTime],
        network_ms: float,
        slope: float = 1.0,
    ) -> None:
        self.groups, self.network_ms, self._slope = graph.groups, network_ms, slope
        modules = dict(graph.model.named_modules())
        self.layers = {name: layer.of(modules[name]) for name, layer in layers.items()}
        members = [member for group in graph.groups.values() for member in group.members]
        free = LayerCost(1, 1, 0.0, 0.0)
        self._costs = {m.name: self.layers.get(m.name, free) for m in members}

    def told(self, amount: float) -> str:
        """Format a saving for messages."""
        return f"{amount:.3g} ms"

    def total(self) -> float:
        """Return the sum of the times of all layers, in ms."""
        return sum(layer.at(layer.ins, layer.outs) for layer in self.layers.values())

    def saved(self, removed: Mapping[str, Any]) -> float:
        """Return the time in ms that removing these channels of each group saves."""
        return self._slope * super().saved(removed)

    def price(self, name: str, channels: np.ndarray) -> float:
        """Return what a channel of each part of a group takes on average, in ms."""
        lowest = 1e-6 * self.network_ms
        return max(self.saved({name: channels.reshape(-1)}) / len(channels), lowest)
