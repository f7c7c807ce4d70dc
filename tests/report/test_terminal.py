"""Laws of the tables of runs and studies."""

import json
import math
from pathlib import Path

import pytest
from small import composed
from summaries import finished, row, summary

from ldt import report
from ldt.build import build_schedule
from ldt.config import as_dict
from ldt.report import banner
from ldt.runs.files import write_json

NAN = float("nan")
# differences ----------------------------------------------------------------------------------

NESTED = {"seed": 0, "ldt": {"alpha": 5e-4, "terms": [1, 2], "off": None}, "empty": {}}
CHANGED = {"seed": 1, "ldt": {"alpha": 5e-4, "terms": [2, 1]}, "prune": {"rate": {"a": 0.5}}}
CASES = [
    ({}, {}),
    (NESTED, NESTED),
    (NESTED, CHANGED),
    ({}, NESTED),
    ({"a": {"b": 1}}, {"a": None}),
    ({"a": {"b": 1}}, {"a": {}}),
    ({"a": None}, {}),
]


@pytest.mark.parametrize(("old", "new"), CASES)
def test_differences_are_symmetric_sorted_and_empty_only_between_equals(old, new):
    found = report.differences(old, new)
    assert found == [(key, there, now) for key, now, there in report.differences(new, old)]
    assert [key for key, *_ in found] == sorted(key for key, *_ in found)
    assert bool(found) == (old != new)


def test_differences_name_the_leaves():
    assert report.differences(NESTED, CHANGED) == [
        ("empty", {}, report.NOT_SET),
        ("ldt.off", None, report.NOT_SET),
        ("ldt.terms", [1, 2], [2, 1]),
        ("prune.rate.a", report.NOT_SET, 0.5),
        ("seed", 0, 1),
    ]


# print_run ------------------------------------------------------------------------------------


def cells(text, first):
    """The cells of the line that starts with a word."""
    (line,) = (line for line in text.splitlines() if line.split()[:1] == [first])
    return line.split()


def test_a_run_is_printed_with_one_line_a_round(tmp_path, capsys):
    faster = row(2, AP=0.45, latency_ms=6.17)
    report.print_run(summary(row(0), row(1), faster), tmp_path)
    text = capsys.readouterr().out
    size = ["0.700", "0.690", "0.630", "0.410", "0.0", "12.3"]
    assert cells(text, "base") == ["base", "0.400", *size]
    assert cells(text, "2") == ["2", "0.450", "+0.050", "0.700", "0.690", "0.210", "0.410", "50.0",
                                "6.2", "2.00x"]  # fmt: skip
    for part in ("128x256", "2 threads, cpu", "of the base's parameters"):
        assert part in text
    assert f"results: {tmp_path}" in text
    commands = [line.partition("ldt ")[2].split() for line in text.splitlines()[-3:]]
    assert [words[0] for words in commands] == ["report", "predict", "export"]
    assert {words[1] for words in commands[1:]} == {str(tmp_path)}


def test_a_noisy_latency_is_marked_and_so_is_the_speed_up_by_it(tmp_path, capsys):
    quiet, noisy = {"latency_p90_ms": 13.0}, {"latency_p90_ms": 19.0}
    report.print_run(summary(row(0, **quiet), row(1, **noisy), row(2, **quiet)), tmp_path)
    text = capsys.readouterr().out
    assert cells(text, "1")[-2:] == ["~12.3", "~1.00x"]
    assert cells(text, "2")[-2:] == ["12.3", "1.00x"]
    assert "~: noisy" in text
    report.print_run(summary(row(0, **noisy), row(1, **quiet)), tmp_path)
    assert cells(capsys.readouterr().out, "1")[-2:] == ["12.3", "~1.00x"]
    report.print_run(summary(row(0, **quiet), row(1, **quiet)), tmp_path)
    assert "~" not in capsys.readouterr().out


def test_latencies_of_two_machines_are_not_compared(tmp_path, capsys):
    report.print_run(summary(row(0), row(1, threads=4)), tmp_path)
    text = capsys.readouterr().out
    assert cells(text, "1")[-1] == "-"
    assert "2 threads, cpu; 4 threads, cpu" in text


def test_what_was_not_measured_is_a_dash(tmp_path, capsys):
    bare = {"round": 1, "AP": NAN, "params": 1_000_000, "multiply_adds": 2e9, "rate": 0.5}
    report.print_run(summary(row(0), bare), tmp_path)
    assert cells(capsys.readouterr().out, "1") == ["1", "-", "-", "-", "-", "1.000", "2.000",
                                                   "50.0", "-", "-"]  # fmt: skip
    report.print_run(summary({**bare, "round": 0}, bare), tmp_path)
    assert "latency" not in capsys.readouterr().out


def test_any_metric_can_be_the_headline(tmp_path, capsys):
    report.print_run(summary(row(0, AP75=0.321), metric="AP75"), tmp_path)
    text = capsys.readouterr().out
    assert cells(text, "round")[1:4] == ["AP75", "change", "AP"]
    assert cells(text, "base")[1] == "0.321"


def test_kittis_own_metric_is_shown_where_it_was_measured(tmp_path, capsys):
    kitti = {"kitti_easy": 0.811, "kitti_moderate": 0.722, "kitti_hard": 0.633}
    report.print_run(summary(row(0, **kitti), row(1, **kitti)), tmp_path)
    text = capsys.readouterr().out
    assert [name for name in cells(text, "round") if "kitti" in name] == list(kitti)
    assert cells(text, "1")[5:8] == ["0.811", "0.722", "0.633"]
    report.print_run(summary(), tmp_path)
    assert "kitti_" not in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 100, 120])
def test_tables_fit_a_terminal_with_whole_words(tmp_path, width, in_terminal):
    kitti = {"kitti_easy": 0.811, "kitti_moderate": 0.722, "kitti_hard": 0.633}
    rows = [row(t, **kitti, params=123_456_789) for t in range(3)]
    shown = in_terminal(width)
    report.print_run(summary(*rows, metric="kitti_moderate"), Path("runs/x"))
    for name in ("a", "b" * 60):
        finished(tmp_path, name, rounds=rows)
    report.print_study(tmp_path, {"a": "method=ldt", "b" * 60: "method=l1 prune.rate=0.5"})
    lines = shown.getvalue().splitlines()
    told = [line for line in lines if str(tmp_path) not in line and "ldt " not in line]
    assert max(map(len, told)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for word in ("kitti_moderate", "change", "parameters", "latency", "speed-up", "finished"):
        assert word in text.split()
    assert "+0.000" in text
    assert "method=l1 prune.rate=0.5" in text


def test_the_numbers_of_a_sweep_are_those_of_its_jobs(study, capsys):
    assert report.print_study(study, {"a-finished": "seed=0", "f-running": "seed=1"}) == 0
    text = capsys.readouterr().out
    assert "1 finished, 0 failed, 1 unfinished; 4 more in the study" in text
    assert "seed=0" in text
    assert "c-failed" not in text


def test_long_paths_and_markup_are_printed_whole(tmp_path, capsys):
    folder = tmp_path / ("[bold]" + "x" * 150) / ("y" * 150)
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "channels.png").touch()
    report.print_run(summary(run="a [red]b"), folder)
    lines = capsys.readouterr().out.splitlines()
    assert f"results: {folder}" in lines
    assert any("a [red]b" in line for line in lines)


# Studies --------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path):
    finished(tmp_path, "a-finished")
    finished(tmp_path, "b-nan", rounds=[row(0), row(1, AP=NAN)])
    for name in ("c-failed", "d-corrupt", "e-partial", "f-running", "notes"):
        (tmp_path / name).mkdir()
    failure = {"status": "failed", "error": "ValueError: rate [x] too high\nmore lines"}
    write_json(tmp_path / "c-failed" / "summary.json", failure)
    (tmp_path / "d-corrupt" / "summary.json").write_text('{"status": "fini')
    (tmp_path / "e-partial" / "summary.json").write_text('{"status": "finished", "rounds": []}')
    (tmp_path / "f-running" / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "table.csv").touch()
    return tmp_path


def test_a_study_counts_its_failures_and_prints_one_line_a_run(study, capsys):
    assert report.print_study(study) == 3
    lines = capsys.readouterr().out.splitlines()
    for name in ("a-finished", "b-nan", "c-failed", "d-corrupt", "e-partial", "f-running"):
        assert sum(line.strip().startswith(name) for line in lines) == 1
    text = "\n".join(lines)
    numbers = "0.400 0.390 -0.010 50.0 0.315 0.410"
    assert " ".join(cells(text, "a-finished")) == f"a-finished finished AP {numbers}"
    assert cells(text, "b-nan")[3:6] == ["0.400", "-", "-"]
    assert "rate [x] too high" in text
    assert "more lines" not in text
    assert str(study / "d-corrupt" / "summary.json") in text
    assert "notes" not in text
    assert lines[-2:] == [
        "2 finished, 1 failed, 2 damaged, 1 unfinished",
        f"next:  ldt report {study}",
    ]


def test_a_study_without_failures_returns_zero(tmp_path):
    finished(tmp_path, "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.yaml").touch()
    assert report.print_study(tmp_path) == 0
    assert report.print_study(tmp_path / "b") == 0


def test_a_missing_study_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        report.print_study(tmp_path / "nowhere")


def test_rows_of_a_study_have_the_run_its_last_round_and_its_base(study):
    rows = report.load_study(study)
    assert [r["status"] for r in rows] == [
        "finished",
        "finished",
        "failed",
        "damaged",
        "damaged",
        "unfinished",
    ]
    first = rows[0]
    assert first["run"] == "a-finished"
    assert (first["asked_rate"], first["rounds"], first["budget"]) == (0.5, 1, "params")
    assert {key: first[key] for key in row(1)} == row(1)
    assert {key: first[f"base_{key}"] for key in row(0)} == row(0)
    assert math.isnan(rows[1]["AP"])


@pytest.mark.parametrize("text", ["", "[]", "null", "7", "{", '{"status": "failed"}', "\x00"])
def test_no_summary_however_damaged_stops_the_others(tmp_path, text):
    finished(tmp_path, "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "summary.json").write_text(text)
    good, bad = report.load_study(tmp_path)
    assert good["status"] == "finished"
    assert bad["status"] == "damaged"
    assert str(tmp_path / "b" / "summary.json") in bad["error"]


def test_summaries_survive_the_round_trip_through_json(tmp_path, capsys):
    told = summary(row(0), row(1, AP=NAN))
    report.print_run(told, Path("runs/x"))
    first = capsys.readouterr().out
    report.print_run(json.loads(json.dumps(told)), Path("runs/x"))
    assert capsys.readouterr().out == first


def test_a_run_that_prunes_nothing_says_why():
    told = {}
    for method in ("none", "l1"):
        config = composed(f"method={method}", "prune.rounds=0", "run_name=x")
        told[method] = banner._method(as_dict(config), build_schedule(config))
    assert told == {
        "none": "none: nothing is pruned",
        "l1": "l1: nothing is pruned (prune.rounds=0)",
    }
