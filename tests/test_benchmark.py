"""Laws of the benchmark's plan and driver; its cells are stand-ins that write what runs write."""

import json
import shutil

import numpy as np
import pytest
import yaml
from benchmark import page, run
from benchmark.clock import CUT, EPOCH
from benchmark.plan import BASE, FULL, HERE, LIGHT, SCRATCH, WIDTHS, Plan, best
from real_data import KITTI, needs

from ldt.evaluation import kept_detections
from ldt.evaluation.detection_rows import COLUMNS, DETECTION, IMAGE, TRUTH
from ldt.experiment import composed
from ldt.runs import DONE, files

WHOLE = HERE / "plan.yaml"
GIVEN = ["detector=yolox_nano", "dataset=kitti"]


@pytest.fixture
def plan_file(tmp_path):
    content = yaml.safe_load(WHOLE.read_text())
    content["scores"] = {name: content["scores"][name] for name in ("ldt", "random", "lamp", "l1")}
    content["main"] = ["ldt", "random", "lamp"]
    content["rankings"] = content["rankings"][:1]
    content["datasets"]["kitti"]["development"] = {"replicates": [2]}
    content["datasets"]["kitti"]["test"] = {"replicates": [0, 1]}
    del content["budgets"]["params"]
    content["switches"] = {"lstsq": ["prune.repair=none"]}
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


@pytest.fixture
def driver(tmp_path, plan_file, monkeypatch):
    """Start a stage with stand-ins for runs; their names are collected in ``ran``."""
    ran = []

    def stand_in(self, cell, study="", more=()):
        folder = self.folder.parent / (study or self.study) / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        ran.append(f"{study and 'probe '}{cell.name}")
        cut = int(bool(cell.score))
        table = detections(cell)
        kept_detections.save(folder / files.detections(cut), table, ("Car",))
        row = {"round": cut, "AP": quality(cell), "params": 9, "multiply_adds": 3}
        files.write_json(folder / files.SUMMARY, {"status": DONE, "rounds": [row]})
        (folder / files.LAST).write_text("")
        return 100.0 if cell.score else 10.0 + 5 * cell.epochs

    monkeypatch.setattr(run.Stage, "run", stand_in)
    monkeypatch.setattr(run, "composed", lambda *_: CONFIG)

    def start(name, **options):
        ran.clear()
        places = {"runs": tmp_path / "runs", "records": tmp_path / "records", "file": plan_file}
        return run.start(name, GIVEN, **options, **places)

    start.ran = ran
    return start


class CONFIG:
    class recipe:
        epochs, retrain_epochs = 16, 4


def quality(cell):
    good = {"ldt": 0.8, "lamp": 0.6, "l1": 0.5, "random": 0.3}.get(cell.score, 0.9)
    return good + 0.1 * cell.trial.endswith("_own") - 0.1 * (cell.kind in (WIDTHS, SCRATCH))


def detections(cell):
    """Twelve images with three objects each, of which a cell finds its share."""
    generator = np.random.default_rng([cell.replicate, *cell.name.encode()])
    rows = []
    for image in range(12):
        rows.append([IMAGE, image, *[0] * 9])
        for corner in generator.uniform(0, 300, (3, 2)):
            box = [*corner, *(corner + 40)]
            rows.append([TRUTH, image, 0, 0, *box, 0, 0, 0])
            if generator.random() < quality(cell):
                rows.append([DETECTION, image, 0, generator.random(), *box, 0, 0, 0])
    return np.array(rows, float).reshape(-1, COLUMNS)


# The plan


@pytest.mark.parametrize("dataset", ["kitti", "coco", "roadscenes"])
@pytest.mark.parametrize("detector", ["yolox_nano", "mmdet"])
def test_stages_share_no_images_and_methods_have_equal_trials(detector, dataset):
    plan = Plan.read(detector, dataset, epochs=16, retrain_epochs=4)
    stages = {"development": plan.development(), "test": plan.test(None)}
    stages["reserved"] = plan.test(None, "reserved")
    replicates = [{cell.replicate for cell in cells} for cells in stages.values()]
    assert not set.intersection(*replicates)
    assert sum(map(len, replicates)) == len(set.union(*replicates))
    for cells in (*stages.values(), plan.finals(None)):
        assert len({cell.name for cell in cells}) == len(cells)
    trials = [cell for cell in stages["development"] if cell.score]
    counts = {score: len({c.trial for c in trials if c.score == score}) for score in plan.scores}
    assert set(counts.values()) == {6}
    by_score = {score: {c.training for c in trials if c.score == score} for score in plan.scores}
    assert by_score.pop("ldt") == {"plain", "ldt"}
    assert all(trainings == {"plain"} for trainings in by_score.values())
    rivals = [cell for cell in stages["test"] if cell.score not in ("", "ldt")]
    assert {cell.budget for cell in rivals if cell.training == "ldt"} == {"macs"}
    opened = [any("reserved" in key for key in cell.overrides) for cell in stages["reserved"]]
    assert all(opened) or dataset == "roadscenes"
    others = [*stages["development"], *stages["test"]]
    assert not any("open_reserved" in key for cell in others for key in cell.overrides)


def test_folds_of_the_plan_are_those_that_are_not_reserved():
    plan = Plan.read("yolox_nano", "kitti")
    keys = dict(key.split("=") for key in plan.shared)
    folds, last = int(keys["dataset.folds"]), int(keys["dataset.reserved_folds"])
    looked_at = sorted([*plan.replicates("development"), *plan.replicates("test")])
    assert looked_at == list(range(folds - last))
    assert plan.replicates("reserved") == list(range(folds - last, folds))


def test_scores_are_dropped_before_folds():
    plan = Plan.read("yolox_nano", "kitti")
    dropped, sizes = [], []
    while (shorter := plan.without_last_score()) is not None:
        assert shorter.replicates("test") == plan.replicates("test")
        dropped += [score for score in plan.scores if score not in shorter.scores]
        sizes.append(len(shorter.test(None)))
        plan = shorter
    assert plan.main == plan.scores == ("ldt", "random", "group_fisher")
    assert dropped[0] == "px"
    assert sizes == sorted(sizes, reverse=True)


def test_the_best_trial_is_that_of_the_highest_mean():
    assert best({"a": [0.2, 0.4], "b": [0.5, 0.0], "c": [0.3], "d": []}, 3) == ["a", "c", "b"]


@pytest.mark.slow
@needs(KITTI)
def test_every_kind_of_cell_is_a_valid_run():
    plan = Plan.read("yolox_nano", "kitti", epochs=16, retrain_epochs=4)
    stage = run.Stage(plan, [*GIVEN, f"dataset.root={KITTI}"])
    cells = [*plan.development(), *plan.test(None)]
    for cell in {cell.kind: cell for cell in cells}.values():
        config = composed(*stage._common(), *cell.overrides, "run_name=x")
        cut = cell.kind in (LIGHT, FULL, WIDTHS, SCRATCH)
        assert bool(config.method.criterion) is cut
        assert config.ldt.enabled is (cell.training == "ldt")
        assert (config.dataset.fold, config.seed) == (cell.replicate, cell.replicate)
        assert config.report.detections
        if cut:
            assert config.recipe.retrain_epochs == cell.epochs
            assert config.recipe.epochs == 16  # so that all share a base
        else:
            assert config.recipe.epochs == cell.epochs


# The driver


def test_the_estimate_is_the_number_of_cells_times_what_one_takes(driver, capsys):
    stage = driver("development", only_plan=True)
    assert all(name.startswith("probe") for name in driver.ran)
    counted = stage.counted("development")
    per = {EPOCH: (10 + 5) - (10 + 5), CUT: 100.0}  # an epoch less a step costs nothing here
    clock = stage.clock
    assert clock.measured(f"{CUT} lamp") == per[CUT]
    epoch = clock.measured(f"{EPOCH} plain")
    cuts, epochs = sum(bool(c.score) for c in counted), sum(c.epochs for c in counted)
    assert clock.total(counted) == pytest.approx(cuts * 100 + epochs * epoch)
    said = capsys.readouterr().out
    assert f"{clock.total(counted) / 3600:.2f} hours left" in said
    clock.add("light plain lamp", 50.0)  # what finished cells took counts more than a probe
    fewer = [c for c in counted if (c.kind, c.training, c.score) == (LIGHT, "plain", "lamp")]
    assert clock.total(fewer) == pytest.approx(50 * len(fewer))


def test_finished_cells_are_skipped_and_choices_are_frozen(driver, tmp_path, capsys):
    with pytest.raises(ValueError, match="run the stage development first"):
        driver("test")
    stage = driver("development")
    cells = [name for name in driver.ran if "probe" not in name]
    assert len(cells) == len(set(cells)) == len(stage.counted("development"))
    said = capsys.readouterr().out
    assert f"[{len(cells)}/{len(cells)}]" in said
    assert "0.00 h of one core left" in said
    frozen = json.loads((tmp_path / "records/yolox_nano_kitti/choices.json").read_text())
    assert {own["macs"] for own in frozen["choices"].values()} == {"global_per_cost_own"}
    driver("development")
    assert driver.ran == []
    assert not list((tmp_path / "runs").glob(f"*/light*/{files.LAST}"))
    shutil.rmtree(tmp_path / "runs")  # another machine
    driver("development")
    assert driver.ran == []
    lines = (file := tmp_path / "records/yolox_nano_kitti/cells.csv").read_text().splitlines(True)
    (lost,) = [line for line in lines if line.startswith(f"{cells[5]},")]
    file.write_text("".join(line for line in lines if line != lost))  # a killed run
    driver("development")
    assert driver.ran == [cells[5]]
    assert sorted(file.read_text().splitlines(True)) == sorted(lines)


def test_scores_are_dropped_until_the_plan_fits(driver, capsys):
    whole = driver("development", only_plan=True)
    _, needed = whole.fitting(["development", "test"], 1e9)
    short = driver("development", only_plan=True, hours=0.95 * needed)
    assert "dropped, to keep within" in capsys.readouterr().out
    assert set(short.plan.scores) < set(whole.plan.scores)
    assert short.fitting(["development", "test"], 0.95 * needed)[1] <= 0.95 * needed
    with pytest.raises(ValueError, match="with the fewest scores, more than --hours"):
        driver("development", only_plan=True, hours=0.01)


@pytest.mark.slow
def test_the_page_has_the_statistics_of_kept_detections(driver, tmp_path, plan_file, monkeypatch):
    monkeypatch.setattr(page, "DRAWS", 100)
    driver("development")
    driver("test")
    (tmp_path / "README.md").write_text("# A\n" + "\n".join(page.MARKS) + "\nend\n")
    found = page.build(tmp_path, plan_file)
    assert [results.stage for results in found] == ["development", "test"]
    text = (tmp_path / "README.md").read_text()
    assert "**Primary endpoint**" in text
    assert text.startswith("# A")
    assert text.endswith("\nend\n")
    rows = files.read_rows(tmp_path / "comparisons.csv")
    test = [row for row in rows if row["stage"] == "test"]
    ahead = [r for r in test if r["what"] == "ldt - rival" and r["kind"] == FULL]
    assert {row["and"] for row in ahead} == {"lamp"}
    assert {row["verdict"] for row in ahead} == {"ahead"}  # 0.9 against 0.7, 72 objects
    assert {r["replicates"] for r in ahead} == {2}
    whats = {row["what"].partition(":")[0] for row in rows}
    assert whats == {"ldt - rival", "score - random", "effect", "control", "switch"}
    cells = files.read_rows(tmp_path / "results.csv")
    assert {row["kind"] for row in cells if row["stage"] == "test"} > {BASE, LIGHT, FULL, SCRATCH}
    before = (tmp_path / "results.md").read_text()
    page.build(tmp_path, plan_file)
    assert (tmp_path / "results.md").read_text() == before  # nothing is drawn by chance
    assert text == (tmp_path / "README.md").read_text()
