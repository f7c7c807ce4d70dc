"""The list of a study's runs."""

import json
import os
import time

import pytest
from click.testing import CliRunner
from summaries import finished, row

from ldt.cli.commands import STATES as ASKED
from ldt.cli.commands import ldt as commands
from ldt.report.listing import list_runs
from ldt.runs import STATES
from ldt.runs.files import write_json


@pytest.fixture
def study(tmp_path):
    finished(tmp_path, "a-done", rounds=[row(0), row(1, AP=0.25, params=1_500_000)])
    finished(tmp_path, "b-nan", rounds=[row(0), row(1, AP=float("nan"))])
    for name, summary in (("c-failed", {"status": "failed", "error": "no memory"}), ("d-cut", [])):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "summary.json", summary)
    (tmp_path / "e-begun").mkdir()
    (tmp_path / "e-begun/config.yaml").touch()
    earlier = time.time() - 3 * 3600
    os.utime(tmp_path / "a-done/summary.json", (earlier, earlier))
    return tmp_path


def listed(study, *options):
    done = CliRunner().invoke(commands, ["runs", str(study), *options])
    assert done.exit_code == 0
    return done.output


def test_every_run_has_a_line_whatever_its_state(study):
    head, *lines = (line.split() for line in listed(study).splitlines())
    assert head[:3] == ["run", "state", "method"]
    assert lines[0] == ["a-done", "finished", "ldt", "0.5", "AP", "0.250", "1.500", "3", "h"]
    assert [line[:2] for line in lines] == [
        ["a-done", "finished"], ["b-nan", "finished"], ["c-failed", "failed"],
        ["d-cut", "damaged"], ["e-begun", "unfinished"],
    ]  # fmt: skip


def test_json_has_all_of_it(study):
    runs = json.loads(listed(study, "--json"), parse_constant=pytest.fail)  # a NaN is no JSON
    assert [tuple(run.values()) for run in runs] == [
        (*run[:7], pytest.approx(run.age_s, abs=30), run.error) for run in list_runs(study)
    ]
    first = runs[0]
    assert (first["metric"], first["result"], first["params"]) == ("AP", 0.25, 1_500_000)
    assert abs(first["age_s"] - 3 * 3600) < 60
    assert runs[1]["result"] is None
    assert runs[2]["error"] == "no memory"
    assert "summary.json is damaged" in runs[3]["error"]


def test_states_are_picked(study):
    assert ASKED == STATES
    picked = json.loads(listed(study, "--state", "failed", "--state", "damaged", "--json"))
    assert [run["run"] for run in picked] == ["c-failed", "d-cut"]
    assert listed(study, "--state", "unfinished").count("\n") == 2
    assert sum(len(list_runs(study, [state])) for state in STATES) == len(list_runs(study))


def test_a_missing_study_is_refused(tmp_path):
    done = CliRunner().invoke(commands, ["runs", str(tmp_path / "no")])
    assert isinstance(done.exception, FileNotFoundError)
