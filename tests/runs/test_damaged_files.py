"""Any file of a run, and any word on the command line, gives a result or our own error."""

import json
from pathlib import Path
from typing import Any

import pytest
from damaging import damaged, fuzzed
from hypothesis import given
from hypothesis import strategies as st
from summaries import row, summary

from ldt.config.messages import explained
from ldt.experiment import composed
from ldt.report import tables
from ldt.runs import arrays, files
from ldt.runs.aggregate import cells
from ldt.runs.run import load_config, open_run, open_runs

pytestmark = pytest.mark.slow
FUZZ = fuzzed(40)
numbers = st.one_of(st.integers(), st.floats(), st.just(10**400), st.just(-1), st.just(0))
words = st.one_of(
    st.text(max_size=8), st.sampled_from(["=1+1", "a|b", "\\", "\n", "ldt", "x" * 300])
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)
CONFIG = {
    "seed": 0,
    "study": "s",
    "method": {"name": "ldt", "criterion": None},
    "prune": {"rate": 0.5, "rounds": 2, "scope": ["neck"], "budget": "params"},
    "recipe": {"epochs": 9, "batch_size": 4, "augment": "flip"},
    "trainer": {"devices": 1, "precision": "32-true"},
    "detector": {"name": "gfl", "config": "mmdet::a.py", "checkpoint": None},
    "dataset": {"name": "roadscenes", "scale": [64, 64], "metric": "AP"},
    "ldt": {"enabled": True, "alpha": "auto"},
}
CSV = "round,params,AP\n0,10,0.5\n1,5,0.25\n"
LOG = "epoch,step,train/loss\n0,10,0.5\n0,20,\n"
INPUTS = {"data": {"a": 1}, "model": {}, "weights": {}, "code": {}, "places": ["/x"]}


@st.composite
def edited(draw: Any, good: str) -> bytes:
    """A good text with a piece of it replaced."""
    content = good.encode()
    begin = draw(st.integers(0, len(content)))
    end = draw(st.integers(begin, len(content)))
    return content[:begin] + draw(st.binary(max_size=12)) + content[end:]


def check_run(folder: Path) -> None:
    """What reads a run gives it, or names its file; a study with it is compared."""
    for read in (open_run, load_config):
        try:
            read(folder)
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error), repr(error)
    for run in open_runs(folder.parent):
        if not run.damaged:
            assert run.log is not None
            assert run.starts is not None
            assert run.latencies is not None
    found = cells(open_runs(folder.parent))
    for kind in ("markdown", "latex", "csv") if found else ():
        assert tables.write(found, kind)


def a_run(folder: Path, **contents: Any) -> Path:
    run = folder / "run"
    run.mkdir(exist_ok=True)
    for name, content in (
        {"summary": summary(row(0), row(1)), "config": CONFIG} | contents
    ).items():
        place = run / {"config": files.CONFIG, "rounds": files.ROUNDS}.get(name, f"{name}.json")
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        place.write_bytes(text)
    return run


@FUZZ
@given(damaged(summary(row(0), row(1)), anything))
def test_a_damaged_summary(tmp_path: Path, content: Any):
    check_run(a_run(tmp_path, summary=content))


@FUZZ
@given(damaged(CONFIG, anything))
def test_a_damaged_configuration(tmp_path: Path, content: Any):
    check_run(a_run(tmp_path, config=content))


@FUZZ
@given(damaged(INPUTS, anything))
def test_damaged_inputs(tmp_path: Path, content: Any):
    check_run(a_run(tmp_path, inputs=content))


@FUZZ
@given(st.one_of(st.binary(max_size=80), edited(json.dumps(summary(row(0), row(1))))))
def test_a_summary_of_any_bytes(tmp_path: Path, content: bytes):
    check_run(a_run(tmp_path, summary=content))


@FUZZ
@given(st.one_of(st.binary(max_size=80), edited(json.dumps(CONFIG))))
def test_a_configuration_of_any_bytes(tmp_path: Path, content: bytes):
    check_run(a_run(tmp_path, config=content))


@FUZZ
@given(st.one_of(st.binary(max_size=80), edited(CSV)))
def test_rounds_of_any_bytes(tmp_path: Path, content: bytes):
    check_run(a_run(tmp_path, summary={}, rounds=content))


@FUZZ
@given(st.one_of(st.binary(max_size=80), edited(LOG)))
def test_a_log_of_any_bytes(tmp_path: Path, content: bytes):
    run = a_run(tmp_path)
    (run / "logs").mkdir(exist_ok=True)
    (run / "logs" / files.METRICS).write_bytes(content)
    check_run(run)


@FUZZ
@given(st.binary(max_size=120))
def test_arrays_of_any_bytes(tmp_path: Path, content: bytes):
    file = tmp_path / "a.npz"
    file.write_bytes(content)
    with pytest.raises(files.DamagedError):
        arrays.read(file, {"a": ("f", 1)})


KEYS = ("seed", "prune.rate", "dataset.scale", "detector", "method", "trainer.devices", "nix", "+x")


@fuzzed(20)
@given(
    st.lists(st.one_of(words, st.tuples(st.sampled_from(KEYS), words).map("=".join)), max_size=2)
)
def test_overrides_of_any_text(given_: list[str]):
    try:
        composed(*given_)
    except Exception as error:
        assert isinstance(error, (ValueError, FileNotFoundError, ImportError)), repr(error)
        assert explained(error)
