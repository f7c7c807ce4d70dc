"""Laws of time as a cost: it falls with every channel, it adds up, it is interpolated exactly."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from small import SMALL, case
from test_budget import WITH_HEAD, random_scores
from torch import nn

from ldt.pruning.budget import Limits, select_channels
from ldt.pruning.graph import PruningGraph
from ldt.pruning.latency import (
    LatencyModel,
    LayerTime,
    Point,
    Times,
    Unit,
    find_units,
    layer_times,
)
from ldt.pruning.layer_types import width_of


def bilinear(unit: Unit, point: Point) -> float:
    """A time as kernels have it: for the map, for its channels, for their products."""
    ins, outs = point
    positions = unit.size[0] * unit.size[1] / 1e4
    taps = unit.kernel[0] * unit.kernel[1]
    return positions * (0.3 + 0.02 * ins + 0.01 * outs + 0.005 * taps * ins * outs)


def noisy(unit: Unit, point: Point) -> float:
    """The same with noise, also for widths that fill no block."""
    seed = abs(hash((str(unit), point))) % 2**32
    noise = np.random.default_rng(seed).uniform(0.7, 1.3)
    return bilinear(unit, point) * noise * (1.5 if point[1] % 16 else 1.0)


def model_of(graph: PruningGraph, times: Times = bilinear, slope: float = 1.0) -> LatencyModel:
    layers = layer_times(graph, times)
    whole = LatencyModel(graph, layers, 1.0).total()
    return LatencyModel(graph, layers, whole, slope)


def some_channels(graph: PruningGraph, share: float) -> dict[str, np.ndarray]:
    return {
        name: np.arange(g.size).reshape(g.parts, -1)[:, : int(share * g.size / g.parts)].reshape(-1)
        for name, g in graph.groups.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_predicted_and_counted_time_are_the_sum_over_layers(name: str) -> None:
    subject = case(name)
    graph = subject.graph(WITH_HEAD)
    layers = layer_times(graph, bilinear)
    before = LatencyModel(graph, layers, 1.0)
    assert set(before.layers) == set(find_units(graph))
    removed = some_channels(graph, 0.5)
    predicted = before.total() - before.saved(removed)
    graph.remove({group: channels.tolist() for group, channels in removed.items()})
    after = LatencyModel(subject.graph(WITH_HEAD), layers, 1.0)
    assert after.total() == pytest.approx(predicted)
    assert after.total() == sum(layer.at(layer.ins, layer.outs) for layer in after.layers.values())


@pytest.mark.parametrize(
    "name", ["chain", "concat", "depthwise", "groupnorm", "grouped", "pyramid"]
)
def test_more_removed_channels_never_save_less(name: str) -> None:
    graph = case(name).graph(WITH_HEAD)
    model = model_of(graph, noisy)
    saved = [model.saved(some_channels(graph, share)) for share in np.linspace(0, 1, 9)[:-1]]
    assert saved[0] == 0
    assert all(low <= high + 1e-9 for low, high in pairwise(saved))
    for group in graph.groups.values():
        one = [model.saved({group.name: np.arange(count)}) for count in range(group.size)]
        assert all(low <= high + 1e-9 for low, high in pairwise(one))


@pytest.mark.parametrize("outs", [64, 24])
def test_a_time_of_four_terms_is_interpolated_exactly(outs: int) -> None:
    layer, unit = nn.Conv2d(96, outs, 3), Unit("Conv2d", (8, 16), (3, 3))
    time = LayerTime.measured(layer, [unit], (True, True), bilinear)
    for point in [(96, outs), (50, 20), (8, 8), (33, outs - 1)]:
        assert time.at(*point) == pytest.approx(bilinear(unit, point))


def test_measured_widths_are_blocks_and_those_of_the_layer() -> None:
    layer, unit = nn.Conv2d(100, 64, 1), Unit("Conv2d", (2, 2))
    time = LayerTime.measured(layer, [unit], (True, False), bilinear)
    assert time.grid[1] == (64,)
    assert time.grid[0][-1] == 100
    assert time.grid[0][0] == 8
    assert all(width % 16 == 0 for width in time.grid[0][1:-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gfl_tiny", "yolox_nano"])
def test_units_are_the_layers_with_what_follows_them(name: str) -> None:
    subject = case(name)
    graph = subject.graph(WITH_HEAD)
    units, modules = find_units(graph), dict(subject.model.named_modules())
    shapes: dict[str, list[torch.Size]] = {}

    def noting(layer: str) -> Callable[..., None]:
        return lambda _m, _i, output: shapes.setdefault(layer, []).append(output.shape)

    graph.run([modules[layer].register_forward_hook(noting(layer)) for layer in units])
    for layer, calls in units.items():
        point = width_of(modules[layer], "in"), width_of(modules[layer], "out")
        assert [u.ends(point)[1][0].size for u in calls] == [s[2:] for s in shapes[layer]]
    activation = {"gfl_tiny": "ReLU", "yolox_nano": "Swish"}[name]
    assert {u.activation for calls in units.values() for u in calls} == {"", activation}
    head = units["bbox_head.cls_convs.0.conv" if name == "gfl_tiny" else "backbone.stem.conv.conv"]
    assert {(u.norm is None, u.activation) for u in head} == {(False, activation)}
    assert name != "gfl_tiny" or len(head) == 4  # on every scale


def test_a_unit_runs_between_narrow_layers() -> None:
    unit = Unit("Conv2d", (6, 8), (3, 3), (2, 2), (1, 1), groups=0, norm=0, activation="ReLU")
    network, image = unit.network((8, 8))
    assert network(image).shape == (1, 4, 3, 4)
    before, behind = unit.ends((8, 8))
    assert (before[0].size, behind[0].size) == ((6, 8), (3, 4))
    assert len(list(network.children())) - 2 == 3


@pytest.mark.parametrize("slope", [1.0, 1.5])
def test_the_ranking_per_cost_is_importance_per_millisecond(slope: float) -> None:
    graph = case("pyramid").graph()
    model = model_of(graph, slope=slope)
    equal = {name: torch.ones(group.size) for name, group in graph.groups.items()}
    sizes = {name: group.size - 2 for name, group in graph.groups.items()}
    worth = {name: model.saved({name: np.arange(size)}) / size for name, size in sizes.items()}
    dearest = max(worth, key=worth.__getitem__)
    save = model.saved({dearest: np.array([0])})
    rule: Any = {"save": save, "tolerance": 1e-6 * save, "limits": Limits(1.0, 2)}
    ranked = select_channels(graph, equal, model, ranking="global_per_cost", **rule)
    assert ranked == {dearest: [0]}


def test_the_saving_asked_for_is_found_in_the_model() -> None:
    graph = case("gfl_tiny").graph()
    model = model_of(graph)
    save, near = 0.3 * model.network_ms, 0.005 * model.network_ms
    chosen = select_channels(graph, random_scores(graph), model, save=save, tolerance=near)
    assert model.saved(chosen) == pytest.approx(save, abs=near)
