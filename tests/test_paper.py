"""The paper's tables and figures: every cell has a job, and the builder says what the runs say."""

import csv
import time
from collections import Counter
from pathlib import Path

import build
import cells as tables
import forked
import measure_latency
import pytest
from cells import METRICS, ROOT, compose_jobs, load_cells
from omegaconf import OmegaConf
from sampled import sampled
from summaries import finished, row

from ldt.runs.files import read_rows, write_json
from ldt.runs.identity import FREE

PAPER = sorted(file.parent.name for file in ROOT.glob("experiments/*/expected.csv"))
JOBS = {}


def composed(option):
    """The jobs of an experiment, composed once for all tests."""
    if option not in JOBS:
        JOBS[option] = compose_jobs(option, ())
    return JOBS[option]


@pytest.fixture(autouse=True)
def composed_once(monkeypatch):
    def once(option, given):
        return compose_jobs(option, given) if given else composed(option)

    monkeypatch.setattr(tables, "compose_jobs", once)


def test_every_table_and_figure_of_the_paper_is_here_in_two_sizes():
    tables = {"table1_coco", "table2_ldt", "table3_utility", "table4_latency"}
    curves_and_pictures = {"fig1_discriminants", "fig3_kitti", "fig4_attention"}
    assert tables | curves_and_pictures | {"fig5_detections", "fig6_stability"} <= set(PAPER)
    options = {file.stem for file in (ROOT / "conf/experiment").glob("*.yaml")}
    assert set(PAPER) | {f"{name}_small" for name in PAPER} <= options
    for name in PAPER:
        for option in (name, f"{name}_small"):
            text = (ROOT / f"conf/experiment/{option}.yaml").read_text()
            assert f"python run.py -m experiment={option}" in text.split("defaults:")[0]
        readme = (ROOT / f"experiments/{name}/README.md").read_text()
        assert f"experiment={name}" in readme
        assert f"experiment={name}_small" in readme


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(PAPER, 3))
def test_every_row_has_a_job_and_every_job_a_row(name):
    rows = read_rows(ROOT / f"experiments/{name}/expected.csv")
    found, study = load_cells(name, "full")
    assert study == "paper"
    assert [cell.keys for cell in found] == [
        {key: value for key, value in row.items() if key not in METRICS} for row in rows
    ]
    jobs = Counter(tuple(job) for job, _ in composed(name)[1])
    assert Counter(tuple(cell.job) for cell in found) == jobs
    assert all(cell.paper for cell in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(PAPER, 3))
def test_every_small_job_stands_for_a_row(name):
    found, study = load_cells(name, "small")
    assert study == "paper_small"
    assert {tuple(cell.job) for cell in found} == {
        tuple(job) for job, _ in composed(f"{name}_small")[1]
    }
    for _, config in composed(f"{name}_small")[1]:
        assert config["dataset"]["name"] == "roadscenes"
        assert config["detector"]["size"] == "tiny" or config["detector"]["name"] == "yolox_nano"
        assert config["base"] == "shared"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in PAPER if n not in ("fig5_detections", "fig6_stability")]
)
def test_the_original_detector_comes_first(name):
    found, _ = load_cells(name, "full")
    for base in build.bases(found):
        assert base.config["method.name"] == "none"
        assert not base.config["ldt.enabled"]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["", "_small"])
def test_equal_names_in_a_study_are_equal_configurations(size):
    spelt = {"detector", "dataset", "method", "seed", "prune.rate", "prune.budget", *FREE}
    known = {}
    for name in PAPER:
        for job, config in composed(name + size)[1]:
            rest = tuple(sorted(o for o in job if o.partition("=")[0] not in spelt))
            prune = config["prune"]
            named = (config["dataset"]["name"], config["detector"]["name"],
                     config["method"]["name"], prune["budget"], prune["rate"])  # fmt: skip
            assert known.setdefault((*named, rest), config) == config, name


@pytest.mark.slow
def test_the_paper_settings_are_the_paper_settings():
    for name in PAPER:
        for _, config in composed(name)[1]:
            ldt, recipe = config["ldt"], config["recipe"]
            assert (ldt["phi"], ldt["alpha"], ldt["beta"]) == (5e-3, "auto", "auto")
            epochs = 100 if config["detector"]["name"] == "yolox_s" else 24
            assert (recipe["epochs"], recipe["retrain_epochs"]) == (epochs, epochs)
            assert recipe["batch_size"] == 16


# The builder ----------------------------------------------------------------------------------

NAME = "table3_utility"


def run_of(study, config, name, seed=0, ap=0.9, **changed):
    """A finished run of a configuration, as far as the builder reads it."""
    rounds = [row(0, mAP=ap)] if config["method"]["name"] == "none" else [row(0), row(1, mAP=ap)]
    plan = {"rate": 0.5, "rounds": len(rounds) - 1, "budget": "params"}
    about = {key: config[key]["name"] for key in ("method", "detector")} | {"plan": plan}
    finished(study, name, seed=seed, rounds=rounds, **about | changed)
    OmegaConf.save(OmegaConf.create(config | {"seed": seed}), study / name / "config.yaml")


@pytest.fixture
def study(tmp_path):
    """Two seeds of the best cell, one of the base, one that is none of the table's."""
    folder = tmp_path / "study"
    folder.mkdir()
    _, jobs = composed(NAME)
    base, best = jobs[0][1], jobs[-1][1]
    run_of(folder, base | {"prune": {"rate": 0.5}, "base": "own"}, "base-kitti-plain", ap=0.9)
    for seed, value in enumerate((0.92, 0.94)):
        run_of(folder, best | {"trainer": {"accelerator": "gpu"}}, f"any-{seed}", seed, value)
    stray = best | {"ldt": best["ldt"] | {"alpha": 0.5}}
    run_of(folder, stray, "stray", 2, ap=0.1)
    (folder / "unfinished").mkdir()
    (folder / "unfinished/config.yaml").touch()
    return folder


@pytest.fixture
def built(study, tmp_path):
    build.build(NAME, "full", [study], [], tmp_path)
    with (tmp_path / "results.csv").open() as file:
        return list(csv.DictReader(file)), (tmp_path / "results.md").read_text()


def test_the_results_are_mean_deviation_and_difference(built):
    first, *_, last = built[0]
    assert (first["paper"], first["ours"], first["seeds"]) == ("90.7", "90.0", "1")
    assert (first["deviation"], first["difference"]) == ("", "-0.7")
    assert first["runs"] == "base-kitti-plain"  # a shared base is the unpruned detector's run
    assert (last["paper"], last["ours"], last["seeds"]) == ("92.6", "93.0", "2")
    assert (last["deviation"], last["difference"]) == ("1.414", "0.4")
    assert (last["paper_of_base"], last["ours_of_base"]) == ("102.1", "103.3")
    assert last["unpruned"] == "69.0"
    line = next(line for line in built[1].splitlines() if "| neck | true |" in line)
    assert "92.6 | 93.00 ± 1.41 | +0.40 |" in line


@pytest.mark.slow
def test_missing_cells_are_listed_with_a_command_that_composes(built):
    listed = [line for line in built[1].splitlines() if line.startswith("python run.py -m")]
    assert len(listed) == 3
    assert "## Missing: 3 of 5 cells" in built[1]
    for line in listed:
        option, *given = line.replace("'", "").split()[3:]
        _, jobs = compose_jobs(option.partition("=")[2], given)
        assert len(jobs) == 1


def test_a_run_with_another_setting_is_left_out_and_told(built):
    assert not any("stray" in line["runs"] for line in built[0])
    assert "- study/stray: other ldt.alpha, ldt.alpha_share\n" in built[1]


@pytest.mark.slow
def test_without_runs_the_whole_experiment_is_missing(tmp_path):
    build.build(NAME, "small", [tmp_path], [], tmp_path)
    text = (tmp_path / "results_small.md").read_text()
    assert text.count("python run.py") == 1
    assert f"python run.py -m experiment={NAME}_small\n" in text


@pytest.mark.slow
def test_small_results_show_changes_and_stand_ins_and_no_difference(tmp_path):
    for index, (_, config) in enumerate(composed(f"{NAME}_small")[1]):
        run_of(tmp_path, config, f"run-{index}", ap=0.4 + 0.01 * index)
    build.build(NAME, "small", [tmp_path], [], tmp_path)
    lines = list(csv.DictReader((tmp_path / "results_small.csv").open()))
    assert [line["ours_of_base"] for line in lines] == ["100.0", "102.5", "105.0", "107.5", "110.0"]
    assert "difference" not in lines[0]
    text = (tmp_path / "results_small.md").read_text()
    assert "`yolox_nano` for `yolox_s`" in text
    assert "Missing" not in text


@pytest.mark.slow
def test_an_experiment_of_ours_has_the_rows_that_it_sweeps(tmp_path):
    study, jobs = composed("roadscenes")
    assert study == "roadscenes"
    picked = [c for job, c in jobs if "detector=gfl_tiny" in job and "prune.rate=0.85" in job]
    for index, config in enumerate(picked):
        ap = 0.3 + 0.1 * (config["method"]["name"] == "chip")
        run_of(tmp_path, config, f"run-{index}", config["seed"], AP=ap)
    found = build.build("roadscenes", "full", [tmp_path], [], tmp_path)
    assert len(found) == 2 * 3 * 7
    assert all(cell.seeds == [0, 1, 2] for cell in found)
    assert sum(not cell.missing for cell in found) == 7
    text = (tmp_path / "results.md").read_text()
    assert "| paper |" not in text
    assert "seed=0,1,2" in text


def test_the_best_method_of_a_rate_is_bold(tmp_path):
    lines = [
        {"method": m, "prune.rate": r, "metric": "AP", "ours": v, "deviation": None, "seeds": 1}
        for m, r, v in [("a", 0.5, 40.0), ("b", 0.5, 41.0), ("a", 0.7, 39.0), ("b", 0.7, None)]
    ]
    text = build.table(lines, ["method", "prune.rate"])
    assert text.count("**") == 2
    assert "| b | 0.5 | **41.00** |" in text


@pytest.mark.slow
def test_a_latency_counts_for_the_device_it_was_measured_on(tmp_path):
    _, jobs = composed("table4_latency")
    run_of(tmp_path, jobs[0][1], "run")
    write_json(tmp_path / "run/environment.json", {"environment": {"gpus": "P100, P100"}})
    (on_cpu,) = tables.load_runs([tmp_path])
    assert tables.numbers(on_cpu)["cpu_ms"] == 12.34
    assert "gpu_ms" not in tables.numbers(on_cpu)
    write_json(tmp_path / "run/environment.json", {"environment": {"gpus": "P100, cpu"}})
    (on_gpu,) = tables.load_runs([tmp_path])
    assert tables.numbers(on_gpu)["gpu_ms"] == 12.34
    write_json(tmp_path / "run/latency.json", {"gpu_ms": 9.0, "cpu_ms": 80.0})
    (both,) = tables.load_runs([tmp_path])
    assert (tables.numbers(both)["gpu_ms"], tables.numbers(both)["cpu_ms"]) == (9.0, 80.0)


def test_a_latency_is_that_of_the_last_round(study, monkeypatch):
    loaded = []

    def load(path, device):
        loaded.append((path, device))
        return lambda image: time.sleep(0.003)

    monkeypatch.setattr(measure_latency, "load_pruned", load)
    monkeypatch.setattr(measure_latency, "raw_forward", lambda detector, image: detector(image))
    run = next(run for run in tables.load_runs([study]) if run.folder.name == "any-0")
    assert measure_latency.measure(run, "cpu", 30) >= 3
    assert loaded == [(study / "any-0/round-1.ckpt", "cpu")]


def test_a_figure_shows_the_runs_of_its_cells(study, tmp_path):
    cells, _ = load_cells(NAME, "full")
    tables.fill(cells, list(tables.load_runs([study])))
    for name, figure, folders in (
        ("fig4_attention", "attention", ["base-kitti-plain", "any-0"]),
        ("fig3_kitti", "curves", ["any-0", "any-1"]),
    ):
        (found,) = build.figure_commands(name, "full", cells)
        out = str(ROOT / f"experiments/{name}/{figure}-yolox_s.png")
        assert found == [figure, *(str(study / folder) for folder in folders), "--out", out]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            ["table9", "recipe.epochs=2"],
            "no conf/experiment/table9.yaml; there are benchmark, ",
        ),
        (["table1_coco", "table9"], "'table9' is no override like recipe.epochs=2; name one"),
    ],
)
def test_an_unknown_experiment_is_told(given, told):
    done = forked.run(str(ROOT / "experiments/build.py"), *given, cwd=Path.cwd())
    assert told in done.stderr
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
