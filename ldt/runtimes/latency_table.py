"""Times of layers and networks in a runtime, measured once and kept in the cache folder.

A table is a file per device, runtime, version, precision and number of threads. Its times are those
of the first measurement, also for another run or process, so that repetitions with other seeds go
by the same ones.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldt import progress
from ldt.config.values import Positive
from ldt.detectors.adapter import Detector
from ldt.pruning.graph import PruningGraph
from ldt.pruning.latency import LatencyModel, LayerTime, Point, Unit, half_of, layer_times
from ldt.pruning.trial import restored
from ldt.runs import files, inputs, records
from ldt.runs.differences import differences
from ldt.runtimes.timing import Network, Runtime, time_in_turns

log = logging.getLogger(__name__)
SPAN_MS, BESIDE_MS = 40.0, 200.0  # a layer and a whole network are timed about so long
FEWEST_RUNS, MOST_RUNS = 3, 40
SLOW_MS = 20.0  # a network that takes longer is called once before it is timed
STEEPNESS = (0.5, 2.0)  # limits of what a network saves where its layers save 1 ms
Open = Callable[[], AbstractContextManager[Network]]


@dataclass(frozen=True)
class LatencyTarget(Runtime):
    """Where the latency of a budget is measured.

    Attributes:
        target_ms: latency to reach; None: a share of the unpruned detector's.
    """

    target_ms: Positive | None = None


class LatencyTable:
    """Look times up, and measure those that are missing.

    Args:
        runtime: what executes the networks.
        device: where eager networks are timed; others are on the processor.
        known: the :meth:`content` of a run that is resumed, which counts instead of the cache.

    Attributes:
        place: what the times depend on besides the network.
        times: the times looked up so far, in ms, by a description of what was timed.
        layers: of the unpruned network, set by :meth:`prepare`.

    Raises:
        ImportError: the runtime is not installed.
        ValueError: the known times are those of another place.
    """

    def __init__(
        self, runtime: Runtime, device: torch.device, known: Mapping[str, Any] | None = None
    ) -> None:
        self.runtime, self.device, self.place = runtime, device, runtime.place(device)
        if known and (found := differences(known["place"], self.place)):
            told = "; ".join(f"{key}: {old} there, {new} here" for key, old, new in found)
            raise ValueError(
                f"the run goes by times that were measured elsewhere ({told}): go on with it "
                "there, or type study=<name> to start it anew"
            )
        self.times: dict[str, float] = dict(known["times"] if known else {})
        self.layers: dict[str, LayerTime] = {}
        self._slope = 1.0
        self._base: tuple[Network, float] | None = None  # the unpruned detector, and its time

    def network_ms(self, detector: Detector) -> float:
        """Return the time of a detector's raw maps of one image, in ms.

        Once the unpruned one is known, others are timed in turns with it, and their time is a share
        of its time: what slows the processor down then concerns both.
        """
        name = inputs.digest([repr(detector.model), detector.input_size])
        name = f"{type(detector.model).__name__} {name}"
        if self._base is None:
            unpruned = self.runtime.kept(detector, self.device)
            self._look_up({name: lambda: nullcontext(unpruned)})
            self._base = unpruned, self.times[name]
        else:
            self._look_up({name: lambda: self.runtime.opened(detector, self.device)}, self._base)
        return self.times[name]

    def prepare(self, detector: Detector, graph: PruningGraph) -> None:
        """Measure the layers of an unpruned detector, or look their times up."""
        wanted: list[tuple[Unit, Point]] = []

        def ask(unit: Unit, point: Point) -> float:
            wanted.extend(((unit, point), *unit.ends(point)))
            return 0.0

        whole = self.network_ms(detector)
        layer_times(graph, ask)
        self._look_up({_name(*each): partial(self._opened_unit, *each) for each in wanted})
        self.layers = layer_times(graph, self._unit_ms)
        half = half_of(graph)
        saved = LatencyModel(graph, self.layers, whole).saved(half)
        with restored(detector.model):
            graph.remove(half)
            part = self.network_ms(detector)
        self._slope = min(max((whole - part) / max(saved, 1e-9), STEEPNESS[0]), STEEPNESS[1])

    def model(self, detector: Detector, graph: PruningGraph) -> LatencyModel:
        """Return what removing channels saves of a detector's time as it is now."""
        return LatencyModel(graph, self.layers, self.network_ms(detector), self._slope)

    def content(self) -> dict[str, Any]:
        """Return the times looked up so far and where they were measured, as plain data."""
        return {"place": self.place, "times": dict(sorted(self.times.items()))}

    def _unit_ms(self, unit: Unit, point: Point) -> float:
        before, behind = (self.times[_name(*end)] for end in unit.ends(point))
        return max(self.times[_name(unit, point)] - (before + behind) / 2, 0.0)

    @contextmanager
    def _opened_unit(self, unit: Unit, point: Point) -> Iterator[Network]:
        network, image = unit.network(point)
        device = self.device if self.runtime.runtime == "eager" else torch.device("cpu")
        yield self.runtime.opened_network(network.to(device), image.to(device))

    def _look_up(
        self, wanted: Mapping[str, Open], beside: tuple[Network, float] | None = None
    ) -> None:
        """Take times from the cache, and measure those that it lacks.

        Args:
            wanted: opens each network.
            beside: a network that they are timed in turns with, and its time in ms.
        """
        missing = {name: opens for name, opens in wanted.items() if name not in self.times}
        if not missing:
            return
        file = _file(self.place)
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.locked(file.with_suffix(".lock")):  # others wait, and find the times
            cached = files.read_json(file).get("times", {})
            todo = [name for name in missing if name not in cached]
            if len(todo) > 1:
                log.info(
                    "timing %d layers in %s, once on this machine", len(todo), self.runtime.runtime
                )
            for name in progress.track(todo, "timing layers"):
                with missing[name]() as network:
                    cached[name] = self._measured(network, beside)
            if todo:
                files.write_json(file, {"place": self.place, "times": cached})
        self.times.update({name: cached[name] for name in missing})

    def _measured(self, network: Network, beside: tuple[Network, float] | None = None) -> float:
        """Return the median time of a network in ms; see :meth:`_look_up`."""
        network()
        first = time_in_turns({0: network}, 1, warmup=0)[0].cpu_ms
        networks, span = {0: network}, SPAN_MS
        if beside is not None:
            networks[1], span = beside[0], BESIDE_MS
        runs = min(max(round(span / max(first, 1e-3)), FEWEST_RUNS), MOST_RUNS)
        timings = time_in_turns(networks, runs, warmup=int(first < SLOW_MS))
        found = {key: each.latency_ms(self.runtime.threads) for key, each in timings.items()}
        scale = 1.0 if beside is None else beside[1] / found[1]
        return round(found[0] * scale, 5)


def stored(folder: Path) -> dict[str, Any]:
    """Return the table of a run, as :meth:`LatencyTable.content` gave it; empty if it has none.

    Raises:
        DamagedError: it is damaged.
    """
    file = folder / files.LATENCY_TABLE
    if found := files.read_json(file):
        records.check(file, records.TIMES, found)
    return found


def fingerprint(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return where the times of a table were measured, and a hash of them: an input of a run."""
    times = inputs.digest([json.dumps(content["times"], sort_keys=True)])
    return {**content["place"], "times": times}


def _name(unit: Unit, point: Point) -> str:
    return f"{unit} {point[0]}x{point[1]}"


def _file(place: Mapping[str, Any]) -> Path:
    """Return the file of a table in the cache folder."""
    name = inputs.digest([json.dumps(place, sort_keys=True)])
    return inputs.cache_folder() / "latency" / f"{name}.json"
