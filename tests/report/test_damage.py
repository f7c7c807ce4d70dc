"""A damaged file costs its own run at most, and is named once."""

import io
import json
import os
import shutil

import numpy as np
import pytest
from cells import load_runs
from PIL import Image
from summaries import configured, row, summary

from ldt.cli import main
from ldt.figures.curve_data import panels
from ldt.report import load_study, open_run, open_runs, print_study
from ldt.report.images import album
from ldt.runs.files import DamagedError, write_json
from ldt.runs.run import readable

LOG = [{"step": step, "train/loss": 3 / step} for step in (10, 20, 30)]
INPUTS = {"data": {}, "model": {}, "weights": {}, "code": {}}
STARTS = {"starts": [{"environment": {"gpus": "none"}, "git": {"commit": "c0ffee"}}]}
PNG = "pictures/channels.png"


def new_run(study, name):
    folder = configured(study, name, {"seed": 0, "method": {"name": "ldt"}}, LOG)
    write_json(folder / "inputs.json", INPUTS)
    write_json(folder / "environment.json", STARTS)
    write_json(folder / "split.json", {"train": [1], "val": [2]})
    (folder / "pictures").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / PNG)
    return folder


def text(name, content):
    return name, lambda file: file.write_text(content)


def data(name, content):
    return name, lambda file: file.write_bytes(content)


def cut(name):
    return name, lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def told(**changed):
    return text("summary.json", json.dumps(summary(**changed)))


def last(**changed):
    return told(rounds=[row(0), row(1, **changed)])


def directory(name):
    return name, lambda file: (file.unlink(), file.mkdir())


def pipe(name):
    return name, lambda file: (file.unlink(), os.mkfifo(file))


def link(name):
    return name, lambda file: (file.unlink(), file.symlink_to("nowhere"))


def unfinished(content):
    """A run whose rounds are all it has."""

    def damage(file):
        (file.parent / "summary.json").unlink()
        file.write_text(content)

    return "rounds.csv", damage


def dangling(folder):
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


LOST = {  # what tells the run's results is damaged: the run is left out
    "config empty": text("config.yaml", ""),
    "config cut": text("config.yaml", "seed: 0\nmethod: {name: l"),
    "config binary": data("config.yaml", b"\xff\x00\xfe"),
    "config a list": text("config.yaml", "[1, 2]"),
    "config a number": text("config.yaml", "5"),
    "config with groups of other types": text("config.yaml", "trainer: 5\nldt: on\nmethod: [1]\n"),
    "config with a scope of numbers": text("config.yaml", "prune: {scope: 5}\n"),
    "config deeply nested": text("config.yaml", "{a: " * 2000 + "1" + "}" * 2000),
    "config a directory": directory("config.yaml"),
    "config a broken link": link("config.yaml"),
    "config a pipe": pipe("config.yaml"),
    "config with half a character": text("config.yaml", 'seed: 0\nstudy: "\\uD800"\n'),
    "summary empty": text("summary.json", ""),
    "summary a pipe": pipe("summary.json"),
    "summary with half a character": told(method="\ud800"),
    "summary with a size for a metric": told(metric="rate"),
    "summary with a number for a commit": told(git={"commit": True}),
    "summary cut": cut("summary.json"),
    "summary binary": data("summary.json", b"\xff\xfe\x00"),
    "summary a list": text("summary.json", "[1]"),
    "summary a number": text("summary.json", "7"),
    "summary null": text("summary.json", "null"),
    "summary deeply nested": text("summary.json", "[" * 100_000),
    "summary with a seed of null": told(seed=None),
    "summary with a plan of null": told(plan=None),
    "summary with null for a round": told(rounds=[row(0), None]),
    "summary without rounds": told(rounds=[]),
    "summary without a column": text(
        "summary.json", json.dumps({k: v for k, v in summary().items() if k != "input_size"})
    ),
    "summary with one number for a size": told(input_size=[1]),
    "summary with another budget": told(plan={"rate": 0.5, "rounds": 1, "budget": "energy"}),
    "summary with the git of a text": told(git="abc"),
    "rounds without parameters": told(rounds=[{"round": 0, "AP": 0.1}]),
    "rounds without the metric": told(metric="PQ"),
    "rounds with texts": last(AP="high"),
    "rounds with a text for another metric": last(kitti_easy="high"),
    "rounds with a text for what a cut left": last(**{"cut/AP": "high"}),
    "rounds with a text for the slowest calls": last(latency_p90_ms="slow"),
    "rounds with a device without threads": last(device="cpu", threads=None),
    "rounds with null": last(params=None),
    "rounds with infinity": last(latency_ms=float("inf")),
    "rounds with huge numbers": last(multiply_adds=10**400),
    "rounds with a huge number by class": last(**{"AP/Car": 1e300}),
    "rounds with a text for a latency": last(**{"onnxruntime/cpu_ms": "fast"}),
    "rounds with a huge latency": last(**{"latency/asked_ms": 10**400}),
    "rounds with digits without end": text("summary.json", '{"seed": ' + "9" * 10_000 + "}"),
    "rounds without any parameter": last(params=0),
    "rounds with NaN parameters": last(params=float("nan")),
    "rounds repeated": told(rounds=[row(0)] * 9000),
    "rounds with a negative number": told(rounds=[row(0, round=-1), row(1)]),
    "rounds with a long device": last(device="x" * 10**6),
    "summary with a long name": told(method="x" * 10**6),
    "summary with a name of two lines": told(detector="a\nb"),
    "inputs cut": cut("inputs.json"),
    "inputs a pipe": pipe("inputs.json"),
    "inputs with a number for places": text("inputs.json", json.dumps(INPUTS | {"places": 5})),
    "inputs empty": text("inputs.json", ""),
    "inputs a list": text("inputs.json", "[]"),
    "inputs with null": text("inputs.json", json.dumps(INPUTS | {"model": None})),
    "inputs without a part": text("inputs.json", "{}"),
    "rounds.csv binary": unfinished("\0\0\0\n\0\0"),
    "rounds.csv with texts": unfinished("round,params\n0,many\n"),
    "rounds.csv without columns": unfinished("AP\n0.5\n"),
    "broken link": ("", dangling),
}
LESS = {  # the run is shown without it
    "log binary": data("logs/metrics.csv", b"\0\xff" * 200),
    "log with an open quote": text("logs/metrics.csv", 'step,train/loss\n1,2\n2,"3\n'),
    "log without steps": text("logs/metrics.csv", "epoch,train/loss\n1,2\n"),
    "log with texts": text("logs/metrics.csv", "step,train/loss\n1,low\n"),
    "log with a column twice": text("logs/metrics.csv", "step,train/loss,train/loss\n1,2,3\n"),
    "log with an infinite step": text("logs/metrics.csv", "step,train/loss\ninf,1\n"),
    "log with a huge step": text("logs/metrics.csv", "step,train/loss\n1" + "0" * 300 + ",1\n"),
    "log of ten billion cells": text(
        "logs/metrics.csv", "step," + ",".join(map(str, range(10**5))) + "\n1" * 10**5
    ),
    "log a directory": directory("logs/metrics.csv"),
    "environment a pipe": pipe("environment.json"),
    "environment with a number for a commit": text(
        "environment.json", json.dumps({"starts": [{"environment": {}, "git": {"commit": True}}]})
    ),
    "environment cut": cut("environment.json"),
    "environment a list": text("environment.json", "[]"),
    "environment with null": text("environment.json", '{"starts": [null]}'),
    "environment with a number": text("environment.json", '{"starts": 5}'),
    "picture a pipe": pipe(PNG),
    "picture empty": data(PNG, b""),
    "picture cut": cut(PNG),
    "picture a text": text(PNG, "half"),
    "picture a directory": directory(PNG),
    "picture a broken link": link(PNG),
}
WHOLE = {  # nothing is missing
    "keys of a run in its round": last(
        method=7,
        asked_rate="x",
        rounds="x",
        dataset=[1],
        detector=None,
        input_size="x",
        budget="energy",
        metric="nix",
        cell=5,
        seed="x",
        run=3,
        base={},
    ),
    "NaN for a metric": last(AP=float("nan")),
    "killed before its first logged step": text("logs/metrics.csv", ""),
    "only the names of the columns logged": text("logs/metrics.csv", "step,train/loss\n"),
    "killed in a line of the log": text("logs/metrics.csv", "step,train/loss,val/AP\n1,2,\n2,"),
    "logs a file": ("logs", lambda logs: (shutil.rmtree(logs), logs.write_text(""))),
    "pictures a file": ("pictures", lambda path: (shutil.rmtree(path), path.write_text(""))),
    "split, which no comparison reads": data("split.json", b"\xff"),
}


def damaged(study, kinds):
    """A run of each kind of damage; return the file of each, by the run's name."""
    found = {}
    for kind, (name, damage) in kinds.items():
        folder = new_run(study, kind.replace(" ", "-"))
        found[folder.name] = folder / name if name else folder
        damage(found[folder.name])
    return found


@pytest.fixture
def study(tmp_path):
    new_run(tmp_path, "good")
    (tmp_path / "inner/run").mkdir(parents=True)  # a study inside of a study
    (tmp_path / "inner/run/config.yaml").touch()
    (tmp_path / "a-file").write_text("in place of a run")
    return tmp_path


def lines_about(caplog, file):
    return [line for line in caplog.messages if f"{file} is damaged" in line]


@pytest.mark.slow
def test_a_page_is_made_whatever_is_damaged(study, caplog, capsys):
    lost, less, whole = (damaged(study, kinds) for kinds in (LOST, LESS, WHOLE))
    main(["report", str(study)])
    assert capsys.readouterr().out.strip() == str(study / "report.html")
    named = {name: len(lines_about(caplog, file)) for name, file in (lost | less).items()}
    assert named == dict.fromkeys(lost | less, 1)
    assert len(caplog.messages) == len(lost | less)
    assert not any("\n" in line for line in caplog.messages)
    page = (study / "report.html").read_text()
    shown = page.split('id="all-runs"')[1].split("</table>")[0]
    names = {"good", *lost, *less, *whole}
    assert {name for name in names if f">{name}</a>" in shown} == {"good", *less, *whole}
    others = page.split('id="others"')[1]
    assert all(f"<td>{name}</td>" in others for name in lost)


@pytest.mark.slow
def test_damaged_runs_are_told_wherever_a_study_is_read(study, caplog, capsys):
    lost = damaged(study, LOST)
    assert [run.name for run in readable(open_runs(study))] == ["good"]
    assert len(caplog.messages) == len(lost)
    for name, file in lost.items():
        with pytest.raises((DamagedError, FileNotFoundError), match=file.name):
            open_run(study / name)
    caplog.clear()
    assert [run.name for run in load_runs([study])] == ["good"]  # of the tables of experiments
    assert len(caplog.messages) == len(lost)
    caplog.clear()
    (panel,) = panels([study])
    assert len(panel.methods["LDT"]) == 1
    assert len(caplog.messages) == len(lost)
    rows = {line["run"]: line["status"] for line in load_study(study)}
    unreadable = [name for name, file in lost.items() if file.name in ("summary.json", name)]
    assert [name for name, status in rows.items() if status == "damaged"] == sorted(unreadable)
    assert print_study(study) == len(unreadable)


def test_damaged_pictures_are_not_counted_as_too_many(study, caplog):
    damaged(study, {kind: how for kind, how in LESS.items() if kind.startswith("picture")})
    found = album(open_runs(study), 20)
    assert [picture.run.name for picture in found.pictures["channels"]] == ["good"]
    assert found.left_out == 0


def test_a_study_of_damaged_runs_is_an_error_of_one_line(tmp_path, caplog, capsys):
    damaged(tmp_path, LOST)
    with pytest.raises(SystemExit, match="1"):
        main(["report", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: all runs of {tmp_path} are damaged ({len(LOST)})")
    assert caplog.messages == []


def test_a_directory_without_permission_is_told(study, caplog, monkeypatch):
    closed = new_run(study, "closed")

    def refusing(function):
        def refuse(path, *args, **more):
            if str(path).startswith(f"{closed}/"):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **more)

        return refuse

    monkeypatch.setattr(os, "stat", refusing(os.stat))  # root may read everything
    for module in (io, os):
        monkeypatch.setattr(module, "open", refusing(module.open))
    assert [run.name for run in readable(open_runs(study))] == ["good"]
    (line,) = caplog.messages
    assert "closed/summary.json is damaged (PermissionError" in line
