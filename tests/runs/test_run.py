"""What is read back from runs' directories."""

import numpy as np
import pytest
from summaries import configured, finished, row

from ldt.report import open_run, open_runs
from ldt.runs.files import write_json, write_rows
from ldt.runs.run import checkpoint_of

LOG = [
    {"step": 9, "epoch": 0, "train/loss": 3.0, "val/AP": None},
    {"step": 9, "epoch": 0, "train/loss": None, "val/AP": 0.1},
    {"step": 19, "epoch": 1, "train/loss": 2.0, "val/AP": None},
    {"step": 29, "epoch": 1, "train/loss": 1.5, "val/AP": None},
]


def test_a_run_has_its_configuration_rounds_and_log(tmp_path):
    folder = configured(tmp_path, "a", {"seed": 3, "ldt": {"alpha": 1e-6}}, LOG)
    run = open_run(folder)
    assert (run.name, run.finished) == ("a", True)
    assert run.config == {"seed": 3, "ldt": {"alpha": 1e-6}}
    assert run.rounds["AP"].tolist() == [row(0)["AP"], row(1)["AP"]]
    assert run.log["train/loss"].tolist() == [3.0, 2.0, 1.5]
    assert run.log.loc[9, "val/AP"] == 0.1


def test_of_steps_that_were_trained_twice_the_later_counts(tmp_path):
    folder = configured(tmp_path, "a", {}, LOG)
    for number, value in ((10, 0.5), (2, 1.0)):  # the tenth attempt comes after the second
        (folder / f"logs-{number}").mkdir()
        write_rows(folder / f"logs-{number}/metrics.csv", [{"step": 19, "train/loss": value}])
    log = open_run(folder).log
    assert log.index.tolist() == [9, 19]
    assert log["train/loss"].tolist() == [3.0, 0.5]


def test_a_run_without_logs_has_an_empty_one(tmp_path):
    folder = configured(tmp_path, "a", {})
    assert open_run(folder).log.empty
    (folder / "logs").mkdir()
    (folder / "logs/metrics.csv").touch()
    assert open_run(folder).log.empty


def test_cuts_are_read_by_round_in_order(tmp_path):
    folder = configured(tmp_path, "a", {})
    for index in (10, 2):
        arrays = {"score/neck.a": np.arange(3.0), "removed/neck.a": np.array([index % 3])}
        np.savez(folder / f"scores-{index}.npz", **arrays)
    cuts = open_run(folder).cuts
    assert list(cuts) == [2, 10]
    assert cuts[10]["neck.a"].removed.tolist() == [1]
    assert cuts[2]["neck.a"].scores.tolist() == [0, 1, 2]


def test_layers_are_in_network_order(tmp_path):
    folder = configured(tmp_path, "a", {})
    sizes = {"in": 1, "out": 2, "params": 3, "multiply_adds": 4}
    layers = {"backbone.z": sizes, "backbone.a": sizes, "neck.b": sizes}
    write_json(folder / "structure.json", {"rounds": {"0": layers}, "groups": {"g": ["neck.b"]}})
    run = open_run(folder)
    assert run.layers.loc[0].index.tolist() == list(layers)
    assert run.layers["part"].tolist() == ["backbone", "backbone", "neck"]
    assert run.groups == {"g": ["neck.b"]}


def test_a_missing_structure_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ldt layers "):
        _ = open_run(configured(tmp_path, "a", {})).layers


def test_what_is_no_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run at .*nowhere; expected there"):
        open_run(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["a: [", "{", "\x00"])
def test_a_damaged_configuration_concerns_its_run_only(tmp_path, text):
    finished(tmp_path, "a")
    finished(tmp_path, "b")
    (tmp_path / "b" / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="damaged"):
        open_run(tmp_path / "b")
    good, bad = open_runs(tmp_path)
    assert good.finished
    assert bad.damaged
    assert "config.yaml is damaged" in bad.row["error"]


def test_unfinished_runs_keep_the_rounds_they_have(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.yaml").write_text("seed: 1\n")
    assert open_run(tmp_path / "a").rounds.empty
    write_rows(tmp_path / "a/rounds.csv", [row(0)])
    assert open_run(tmp_path / "a").rounds["AP"].tolist() == [0.4]


def test_the_checkpoint_of_a_run_is_its_last_rounds(tmp_path):
    folder = configured(tmp_path, "a", {})
    for round_ in (0, 1):
        (folder / f"round-{round_}.ckpt").touch()
    assert checkpoint_of(folder) == folder / "round-1.ckpt"
    assert checkpoint_of(folder / "round-0.ckpt") == folder / "round-0.ckpt"
    assert checkpoint_of(tmp_path / "nowhere") == tmp_path / "nowhere"
    (folder / "round-1.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*round-1.ckpt.*the run has round-0.ckpt"):
        checkpoint_of(folder)


def test_the_checkpoint_of_an_unfinished_run_is_the_newest_complete_one(tmp_path, caplog):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(FileNotFoundError, match="has no finished round"):
        checkpoint_of(folder)
    write_rows(folder / "rounds.csv", [row(0), row(1)])
    for round_ in (0, 1, 2):  # the last one is not measured yet
        (folder / f"round-{round_}.ckpt").touch()
    assert checkpoint_of(folder) == folder / "round-1.ckpt"
    assert caplog.messages == [
        f"{folder} is unfinished: taking its newest checkpoint, round-1.ckpt"
    ]


def test_a_study_is_no_run_but_has_some(tmp_path):
    for number in range(12):
        finished(tmp_path, f"run-{number:02d}")
    with pytest.raises(FileNotFoundError, match=r"is a study.*: run-00, .*run-09, ... \(12 runs\)"):
        checkpoint_of(tmp_path)
