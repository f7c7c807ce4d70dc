"""The latency budget: a table measured once, the same for all; a run trains, cuts and resumes.

A clock that counts operations takes the place of the processor's, so that every time is exact.
"""

import shutil
from itertools import count

import pytest
import torch
from short_runs import rows, tiny
from small import case
from torch.utils.flop_counter import FlopCounterMode

import ldt
from ldt import experiment
from ldt.detectors.forward import eval_with_gradients
from ldt.loop import pruning_round
from ldt.pruning import latency
from ldt.pruning.graph import PruningGraph
from ldt.runs import files, inputs
from ldt.runs.identity import OtherRunError
from ldt.runs.run import open_run
from ldt.runtimes.latency_table import LatencyTable, LatencyTarget
from ldt.runtimes.timing import Network, Runtime

EAGER = Runtime("eager")
LATENCY = ("prune.budget=latency", "prune.latency.runtime=eager", "prune.rate=0.3")
RUN = (*LATENCY, "method=l1", "prune.rounds=2", "trainer=cpu")


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Times are operations; the measurements are counted."""
    measured = []

    def operations(_table: LatencyTable, network: Network, _beside: object = None) -> float:
        with FlopCounterMode(display=False) as counter:
            network()
        measured.append(counter.get_total_flops() * 1e-6 + 0.001)
        return measured[-1]

    monkeypatch.setattr(LatencyTable, "_measured", operations)
    monkeypatch.setattr(latency, "SHARES", (0.5,))  # a small table
    monkeypatch.setenv("LDT_CACHE", str(tmp_path / "ldt-cache"))
    return measured


def graph_of(subject) -> PruningGraph:
    with eval_with_gradients(subject.model):
        return subject.target.trace(("backbone", "neck"))


@pytest.mark.slow
def test_all_seeds_go_by_one_table_measured_once(clock) -> None:
    tables = []
    for seed in (1, 2):
        subject = case("gfl_tiny", seed)
        table = LatencyTable(EAGER, torch.device("cpu"))
        table.prepare(subject.target, graph_of(subject))
        tables.append(table.content())
        assert len(clock) == len(table.times)  # the second measures nothing
    assert tables[0] == tables[1]
    assert inputs.cache_folder().joinpath("latency").is_dir()


def test_a_slimmer_network_is_a_measurement_of_its_own(clock) -> None:
    subject = case("gfl_tiny")
    table = LatencyTable(EAGER, torch.device("cpu"))
    whole = table.network_ms(subject.target)
    graph = graph_of(subject)
    graph.remove({name: [0, 1, 2, 3] for name in list(graph.groups)[:3]})
    assert table.network_ms(subject.target) < whole
    assert len(clock) == 2


@pytest.mark.slow
def test_the_latency_asked_for_is_met_and_widths_are_multiples(clock) -> None:
    subject = case("gfl_tiny")
    detector = subject.target
    table = LatencyTable(EAGER, torch.device("cpu"))
    whole = table.network_ms(detector)
    images = [{"inputs": [], "data_samples": []}]
    for options in ({"rate": 0.3}, {"latency": {"runtime": "eager", "target_ms": 0.7 * whole}}):
        options = {"latency": {"runtime": "eager"}, **options}
        result = ldt.prune(
            detector.model,
            images,
            criterion="l1",
            ranking="global_per_cost",
            budget="latency",
            input_size=detector.input_size,
            repair="none",
            **options,
        )
        told = result.record.latency
        assert told["asked_ms"] == pytest.approx(0.7 * whole)
        assert told["measured_ms"] == pytest.approx(0.7 * whole, rel=0.05)
        kept = {size["out"] for name, size in result.after.items() if size != result.before[name]}
        own = {size["out"] for size in result.before.values()}
        assert all(width % 16 == 0 or width in own for width in kept)


@pytest.mark.slow
def test_a_run_trains_cuts_and_resumes(clock, tmp_path, monkeypatch) -> None:
    config = tiny(tmp_path, *RUN)
    experiment.run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        check, calls = pruning_round.check_rate, count(1)

        def interrupted(*given):
            check(*given)
            if next(calls) == 2:
                raise KeyboardInterrupt

        patch.setattr(pruning_round, "check_rate", interrupted)
        with pytest.raises(SystemExit):
            experiment.run(config, tmp_path / "run")
    shutil.rmtree(inputs.cache_folder() / "latency")  # the run keeps its own table
    experiment.run(config, tmp_path / "run")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    found = rows(tmp_path / "run")
    for row in found[1:]:
        assert row["latency/measured_ms"] == pytest.approx(row["latency/asked_ms"], rel=0.05)
        assert row["latency/predicted_ms"] < found[0]["params"]
    assert found[-1]["rate"] == pytest.approx(0.3, abs=0.05)
    table = files.read_json(tmp_path / "run" / files.LATENCY_TABLE)
    assert inputs.recorded(tmp_path / "run")[inputs.LATENCY]["runtime"] == "eager"
    assert inputs.fingerprint(open_run(tmp_path / "run").inputs) == inputs.fingerprint(
        open_run(tmp_path / "whole").inputs
    )
    first = next(iter(table["times"]))
    table["times"][first] *= 2
    files.write_json(tmp_path / "run" / files.LATENCY_TABLE, table)
    with pytest.raises(OtherRunError, match="times of the latency budget"):
        experiment.run(config, tmp_path / "run")


def test_times_of_another_machine_are_refused(clock) -> None:
    known = LatencyTable(EAGER, torch.device("cpu")).content()
    known["place"] = known["place"] | {"device": "a toaster"}
    with pytest.raises(ValueError, match=r"a toaster there.*here.*study=<name>"):
        LatencyTable(EAGER, torch.device("cpu"), known)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"runtime": "tensorrt"}, r"prune\.latency\.runtime='tensorrt'; allowed: eager, onnxr"),
        ({"threads": 0}, r"prune\.latency\.threads=0; allowed: a whole number of at least 1"),
        ({"target_ms": -1.0}, r"prune\.latency\.target_ms=-1\.0; allowed: a number above 0"),
        ({"precision": "int8"}, r"prune\.latency\.precision=int8.*type prune\.latency\.precision"),
    ],
)
def test_what_cannot_be_asked_for_is_told(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        LatencyTarget(**given)


def test_a_latency_above_the_base_is_refused(clock) -> None:
    subject = case("gfl_tiny")
    told = r"latency\.target_ms=1e\+06: the unpruned detector takes .* ms in eager; type a smaller"
    with pytest.raises(ValueError, match=told):
        ldt.prune(
            subject.model,
            [{"inputs": [], "data_samples": []}],
            criterion="l1",
            budget="latency",
            latency={"runtime": "eager", "target_ms": 1e6},
            input_size=(64, 128),
        )
