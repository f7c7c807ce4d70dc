"""Laws of timing: in turns, in every runtime, without a trace; and `ldt benchmark`."""

import json
from pathlib import Path

import forked
import pytest
import torch
from click.testing import CliRunner
from pruned_files import data_of, pruned_checkpoint
from short_runs import ROOT, TINY, rows
from short_runs import command as run
from small import case

from ldt.cli.commands import RUNTIMES as NAMED
from ldt.cli.commands import ldt as command
from ldt.report import page, print_run
from ldt.report.tables import write
from ldt.runs import files
from ldt.runs.aggregate import cells
from ldt.runs.run import open_run
from ldt.runtimes.timing import RUNTIMES, Network, Runtime, measure_runtimes, time_in_turns


def test_networks_are_called_in_turns() -> None:
    called: list[str] = []
    networks = {name: Network(lambda name=name: called.append(name)) for name in "abc"}
    found = time_in_turns(networks, runs=3, warmup=1)
    assert called == list("abc") * 4
    assert all(0 <= t.p10_ms <= t.cpu_ms <= t.p90_ms for t in found.values())


def test_one_thread_counts_by_cpu_time_and_several_by_wall_time() -> None:
    timing = time_in_turns({0: Network(lambda: None)}, runs=3)[0]
    assert timing.latency_ms(1) == timing.cpu_ms
    assert timing.latency_ms(2) == timing.wall_ms


def test_the_commands_know_the_runtimes() -> None:
    assert NAMED == RUNTIMES


@pytest.mark.slow
def test_every_runtime_times_a_detector_and_leaves_it_as_it_was() -> None:
    detector = case("gfl_tiny").target
    detector.model.train()
    modes = [module.training for module in detector.model.modules()]
    before = {key: value.clone() for key, value in detector.model.state_dict().items()}
    threads = torch.get_num_threads()
    found = measure_runtimes(detector, RUNTIMES, runs=3)
    assert [module.training for module in detector.model.modules()] == modes
    after = detector.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert torch.get_num_threads() == threads
    for name in RUNTIMES:
        for key in ("cpu_ms", "wall_ms", "threaded_cpu_ms", "threaded_wall_ms", "threads"):
            assert found[f"{name}/{key}"] > 0
    weights = sum(4 * p.numel() for p in detector.model.parameters())
    assert "eager/file_bytes" not in found
    assert found["onnxruntime/file_bytes"] == pytest.approx(weights, rel=0.1)


AFTER_OPENVINO = f"""
import gc, signal, sys
sys.path.append({str(ROOT / "tests")!r})
from ldt.runtimes.packages import kept_signal_stack, need
from ldt.runtimes.timing import measure_runtimes
from small import case

measure_runtimes(case("gfl_tiny").target, ["openvino"], runs=1)
with kept_signal_stack():
    image = need("openvino.opset13").parameter([1])
    model = need("openvino").Model([need("openvino.opset13").relu(image)], [image], "relu")
    first, second = (need("openvino").Core().compile_model(model, "CPU") for _ in range(2))
    del first
    gc.collect()
    del second
    gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("alive", flush=True))
signal.raise_signal(signal.SIGUSR1)
"""


@pytest.mark.slow
def test_signals_are_handled_after_openvino_has_run(tmp_path: Path) -> None:
    """It replaces the stack for them; the process would be killed without a word."""
    script = tmp_path / "after_openvino.py"
    script.write_text(AFTER_OPENVINO)
    done = forked.run(str(script), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1:] == ["alive"]


def test_a_runtime_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime.*pip install 'ldt\[deploy\]'"):
        Runtime("onnxruntime").version()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    return pruned_checkpoint(folder / "round-1.ckpt", data_of(folder / "scenes"))


@pytest.mark.slow
def test_benchmark_puts_checkpoints_and_files_side_by_side(checkpoint: Path) -> None:
    chosen = ["--runtime", "eager", "--runtime", "onnxruntime", "--runs", "3"]
    done = CliRunner().invoke(command, ["benchmark", str(checkpoint), *chosen, "--json"])
    assert done.exit_code == 0, done.output
    networks = json.loads(done.output)["networks"]
    assert [each["runtime"] for each in networks] == ["eager", "onnxruntime"]
    assert networks[0]["speed_up"] == 1
    assert networks[1]["speed_up"] == pytest.approx(
        networks[0]["cpu_ms"] / networks[1]["cpu_ms"], rel=0.01
    )
    assert networks[0]["macs"] == networks[1]["macs"] > 0
    done = CliRunner().invoke(command, ["benchmark", *[str(checkpoint)] * 2, *chosen])
    assert done.output.count("round-1.ckpt") == 4
    assert "speed-up" in done.output


def test_benchmark_refuses_what_is_no_detector(tmp_path: Path) -> None:
    for name, told in (("none.ckpt", "none.ckpt"), ("none.onnx", "no file or folder at")):
        done = CliRunner().invoke(command, ["benchmark", str(tmp_path / name)])
        assert getattr(done.exception, "refused", False)
        assert told in str(done.exception)


@pytest.mark.slow
def test_a_run_reports_its_runtimes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs/study/run"
    given = ("method=l1", "prune=oneshot", "trainer=cpu", "report.runtimes=[eager,onnxruntime]")
    names = ("study=study", "run_name=run")
    done = run(*TINY, *given, *names, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for row in rows(folder):
        assert row["onnxruntime/cpu_ms"] > 0
        assert row["eager/threaded_wall_ms"] > 0
        assert "openvino/cpu_ms" not in row
    found = open_run(folder)
    print_run(files.read_json(folder / files.SUMMARY), folder)
    for text in (
        capsys.readouterr().out,
        page.page(folder.parent, [found], 0),
        write(cells([found]), "markdown"),
    ):
        assert "onnxruntime" in text  # a terminal breaks the line before the unit
        assert "openvino (ms)" not in text
