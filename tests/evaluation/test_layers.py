"""The inventory of a run's found agrees with what is counted for the whole."""

import json
from functools import partial

import pytest
from pruned_files import SIZE, write_cut_run

from ldt.cli import main
from ldt.detectors.checkpoints import load_pruned
from ldt.detectors.forward import raw_forward
from ldt.evaluation import layers
from ldt.evaluation.profiling import count_macs, count_parameters
from ldt.runs.files import read_rows, write_text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with checkpoints of a base and of what a cut left of it."""
    folder = tmp_path_factory.mktemp("run")
    write_cut_run(folder)
    write_text(folder / "config.yaml", "prune: {scope: [backbone]}\n")
    layers.write_inventory(folder)
    return folder


@pytest.mark.slow
def test_the_layers_add_up_to_the_network(run):
    rounds = json.loads((run / "structure.json").read_text())["rounds"]
    assert list(rounds) == ["0", "1"]
    for index, inside in rounds.items():
        detector = load_pruned(run / f"round-{index}.ckpt")
        forward = partial(raw_forward, detector)
        whole = count_macs(detector, forward, (1, 3, *SIZE))
        assert sum(layer["params"] for layer in inside.values()) == count_parameters(detector)
        assert sum(layer["multiply_adds"] for layer in inside.values()) == whole
    before, after = (rounds[index]["backbone.layer1.0.conv1"] for index in "01")
    assert (before["out"], after["out"]) == (8, 4)


def test_the_table_of_layers_has_them_before_and_after(run):
    rounds = json.loads((run / "structure.json").read_text())["rounds"]
    rows = read_rows(run / "layers.csv")
    assert [row["layer"] for row in rows] == list(rounds["0"])
    for row in rows:
        before, after = (rounds[index][row["layer"]] for index in "01")
        assert {key: row[key] for key in before} == before
        assert {key: row[f"{key}_after"] for key in after} == after
    assert all(row["latency_ms"] > 0 for row in rows if row["layer"].startswith("backbone"))


def test_groups_tell_which_layers_are_cut_together(run):
    groups = json.loads((run / "structure.json").read_text())["groups"]
    (stem,) = (members for members in groups.values() if "backbone.conv1" in members)
    assert {"backbone.layer1.0.conv2", "backbone.layer1.1.conv2"} <= set(stem)  # one residual sum
    assert all(name.startswith("backbone.") for name in groups)


def test_a_folder_without_checkpoints_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["layers", str(tmp_path)])
    assert "no run at" in capsys.readouterr().err
