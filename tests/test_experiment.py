"""Real, very short runs end to end: what they leave behind, repeating them, and their failures."""

import csv
import json
import math

import pytest
import torch
import wandb_here
from hydra.core.utils import JobReturn, JobStatus
from real_data import COCO, KITTI, needs
from sampled import sampled
from short_runs import DRAWN, ROOT, SCENES, TINY, command, python, rows, summary, tiny
from small import composed

import ldt
from ldt import build, experiment
from ldt.callbacks.ldt_loss import LDTLoss
from ldt.cli.study_table import end_sweep
from ldt.data.datamodule import DetectionDataModule
from ldt.figures import from_runs
from ldt.module import DetectorModule
from ldt.runs import provenance
from ldt.runs.refusal import Refused

ROUNDS = 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its configuration, folder and result."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny(folder, "report.latency_runs=30", *DRAWN)
    return config, folder / "run", experiment.run(config, folder / "run")


@pytest.fixture
def nothing_is_trained(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model was built")

    monkeypatch.setattr(build, "DetectorModule", refuse)


@pytest.mark.slow
def test_a_run_leaves_everything_behind(finished):
    _, folder, result = finished
    found = summary(folder)
    assert found["status"] == "finished"
    assert found["input_size"] == [64, 128]
    assert result == found["rounds"][-1]["AP"]
    assert torch.__version__.startswith(found["environment"]["torch"])
    assert [start["git"] for start in provenance.starts(folder)] == [found["git"]]
    split = json.loads((folder / "split.json").read_text())
    assert (len(split["train"]), len(split["val"])) == (8, 4)
    assert not set(split["train"]) & set(split["val"])
    with (folder / "rounds.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(row["params"]) for row in table] == [row["params"] for row in found["rounds"]]
    assert all(float(row["latency_ms"]) > 0 for row in table)
    for round_ in range(ROUNDS + 1):
        ldt.load_pruned(folder / f"round-{round_}.ckpt")
    pictures = {file.name for file in (folder / "pictures").iterdir()}
    always = {
        f"{name}.png"
        for name in (
            *("labels", "results", "precision_recall", "class_ap", "confusion"),
            *("detections", "metric_vs_params", "channels", "shrinking"),
        )
    }
    assert always <= pictures <= {*always, "discriminants.png"}  # of few objects there may be none
    assert (folder / "logs/metrics.csv").is_file()


@pytest.mark.slow
def test_a_finished_run_returns_at_once(finished, nothing_is_trained, monkeypatch):
    config, folder, result = finished
    for name in ("setup", "dataset"):  # they are only fingerprinted
        monkeypatch.setattr(DetectionDataModule, name, lambda *_: pytest.fail("data were read"))
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    assert experiment.run(config, folder) == result
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())


@pytest.mark.slow
def test_a_folder_belongs_to_one_configuration(finished, nothing_is_trained):
    config, folder, _ = finished
    other = config.copy()
    other.prune.images, other.recipe.optimizer.lr = 4, 0.5
    lr = config.recipe.optimizer.lr
    difference = f"prune.images: 8 there, 4 now; recipe.optimizer.lr: {lr} there, 0.5 now"
    with pytest.raises(ValueError, match=rf"{difference}.*study=<name>"):
        experiment.run(other, folder)
    with pytest.raises(ValueError, match="another configuration"):
        experiment.run(other, folder)
    before = summary(folder)
    assert math.isnan(experiment.run(other, folder, in_sweep=True))  # the other jobs go on
    assert summary(folder) == before
    assert summary(folder)["status"] == "finished"
    detail = config.copy()
    detail.dataset.workers, detail.report.pictures = 1, 3
    experiment.run(detail, folder)


@pytest.mark.slow
def test_a_failed_drawing_loses_nothing_and_is_made_up_for(tmp_path, monkeypatch):
    config = tiny(tmp_path, "method=none", *DRAWN)
    with monkeypatch.context() as patch:
        patch.setattr(from_runs, "draw_run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            experiment.run(config, tmp_path / "run")
    before = summary(tmp_path / "run")
    assert before["status"] == "finished"
    assert [file.name for file in (tmp_path / "run/pictures").iterdir()] == ["labels.png"]
    monkeypatch.setattr(build, "DetectorModule", lambda *_, **__: pytest.fail("trained again"))
    experiment.run(config, tmp_path / "run")
    assert (tmp_path / "run/pictures/detections.png").is_file()
    assert summary(tmp_path / "run") == before | {"drawn": True}


@pytest.mark.slow
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    plain = LDTLoss._warmup_factor
    monkeypatch.setattr(
        LDTLoss,
        "_warmup_factor",
        lambda terms: float("nan") if terms._module.global_step > 2 else plain(terms),
    )
    config = tiny(tmp_path, "method=none", "ldt.enabled=true", "recipe.epochs=3")
    assert torch.isnan(torch.tensor(experiment.run(config, tmp_path / "run", in_sweep=True)))
    found = summary(tmp_path / "run")
    assert found["status"] == "failed"
    assert found["error"].startswith(
        "NonFiniteLossError: loss_ld, loss_cov is not finite at step 3"
    )
    last = ldt.load_pruned(tmp_path / "run/last.ckpt")
    assert all(parameter.isfinite().all() for parameter in last.parameters())


@pytest.mark.slow
def test_loading_processes_change_nothing(tmp_path):
    """Also not the first epoch, whose loading begins before any epoch starts."""
    plain = ["recipe.augment=mosaic", "recipe.plain_epochs=1", "method=none", "report.pictures=0"]
    for workers in ("0", "1"):
        config = tiny(tmp_path, *plain, f"dataset.workers={workers}")
        experiment.run(config, tmp_path / workers)
    one, two = (ldt.load_pruned(tmp_path / run / "last.ckpt").state_dict() for run in ("0", "1"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    sampled(
        [
            [
                "detector=mmdet",
                "detector.config=mmdet::retinanet/retinanet_r18_fpn_1x_coco.py",
                "+detector.options.backbone.frozen_stages=1",
                "recipe=short",
                "method=random",
                "prune.rate=0.3",
            ],
            ["detector=yolox_nano", "method=l1"],
            [
                "detector=atss_tiny",
                "trainer.precision=bf16-mixed",
                "method.criterion.source=detection",
            ],
        ]
    ),
    ids=["retinanet", "yolox", "atss in bf16"],
)
def test_other_detectors_run_as_they_are(options, tmp_path):
    short = ["recipe.epochs=1", "recipe.retrain_epochs=1", "prune=oneshot"]
    config = tiny(tmp_path, "prune.rate=0.5", *options, *short, "report.pictures=0")
    experiment.run(config, tmp_path / "run")
    base, last = rows(tmp_path / "run")
    assert last["rate"] == pytest.approx(config.prune.rate, abs=0.005)
    assert last["multiply_adds"] < base["multiply_adds"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("dataset", "root"),
    [
        pytest.param(KITTI.name, KITTI, marks=needs(KITTI)),
        pytest.param(COCO.name, COCO, marks=[needs(COCO), pytest.mark.long]),
    ],
)
def test_real_images_run_as_they_are(dataset, root, tmp_path):
    scale = {"kitti": "[320,96]", "coco": "[160,160]"}[dataset]
    few = ["trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "prune.images=4"]
    phases = ["recipe.epochs=1", "recipe.retrain_epochs=1", "recipe.batch_size=2", "prune=oneshot"]
    overrides = [f"dataset={dataset}", f"dataset.root={root}", "detector=yolox_nano", *few, *phases]
    more = ["prune.rate=0.3", "report.latency_runs=0", "report.pictures=1", "dataset.workers=0"]
    more.append(f"dataset.scale={scale}")
    config = composed(*overrides, *more, "trainer=cpu", "run_name=real")
    experiment.run(config, tmp_path / "run")
    base, last = rows(tmp_path / "run")
    assert last["params_rate"] == pytest.approx(0.3, abs=0.005)
    cut = {key for key in last if key.startswith("cut/")}
    assert set(base) == set(last) - {"criterion/rank_correlation"} - cut
    assert {key.removeprefix("cut/") for key in cut} < set(base)
    assert (tmp_path / "run/pictures/detections.png").is_file()


@pytest.mark.slow
def test_a_missing_data_set_says_what_to_type(tmp_path):
    with pytest.raises(ValueError, match=r"dataset.root is not set; type dataset.root="):
        experiment.run(composed("dataset=kitti", "run_name=x"), tmp_path / "a")
    gone = tmp_path / "gone"
    with pytest.raises(FileNotFoundError, match=rf"no folder {gone}.*dataset.root="):
        experiment.run(
            composed("dataset=coco", f"dataset.root={gone}", "run_name=x"), tmp_path / "b"
        )
    assert list(tmp_path.iterdir()) == []  # the right command finds no traces


def test_a_damaged_summary_is_named(tmp_path):
    (tmp_path / "summary.json").write_text('{"status": "fini')
    with pytest.raises(ValueError, match=r"summary.json is damaged .*remove it to run again"):
        experiment.run(tiny(tmp_path), tmp_path)


# The command ----------------------------------------------------------------------------------

RUN = str(ROOT / "run.py")


@pytest.mark.slow
def test_help_lists_groups_and_examples(tmp_path):
    done = python(RUN, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for group in ("dataset=", "detector=", "method=", "prune=", "recipe=", "trainer="):
        assert f"\n{group}...:\n" in done.stdout
    assert len([line for line in done.stdout.splitlines() if "  ldt run " in line]) >= 3


@pytest.mark.slow
def test_a_typo_on_the_command_line_stops_at_once(tmp_path):
    done = python(RUN, "dataset.trian=3", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "dataset.trian=3: unknown key; did you mean dataset.train?" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_refused_job_of_a_sweep_is_told_and_the_others_run(tmp_path):
    done = command(
        "-m",
        *SCENES,
        f"dataset.cache={tmp_path / 'cache'}",
        "method=none",
        "trainer=cpu",
        "recipe.epochs=0,1",
        "recipe.batch_size=4",
        "report.latency_runs=0",
        "report.pictures=0",
        cwd=tmp_path,
    )
    assert done.returncode == 1
    (study,) = (tmp_path / "runs").iterdir()
    runs = {folder.name: summary(folder) for folder in study.iterdir() if folder.is_dir()}
    states = {found["status"]: name for name, found in runs.items()}
    assert set(states) == {"finished"}  # a refused job leaves nothing
    assert "nothing to do" in done.stderr
    assert (study / states["finished"] / "run.log").is_file()


def test_a_refused_job_of_a_sweep_is_an_error_at_its_end(tmp_path, capsys):
    jobs = [
        JobReturn(_return_value=value, status=JobStatus.COMPLETED)
        for value in (0.5, Refused("nan"))
    ]
    with pytest.raises(SystemExit):
        end_sweep(tmp_path, jobs)
    assert "0 finished" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_share_a_run(tmp_path, monkeypatch):
    wandb_here.seal(monkeypatch, tmp_path)
    done = command(
        *TINY,
        f"dataset.cache={tmp_path / 'cache'}",
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "prune=oneshot",
        "prune.rate=0.5",
        "recipe.batch_size=2",
        "logger=wandb",
        "report.pictures=1",
        f"hydra.run.dir={tmp_path / 'run'}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 1
    base, last = rows(tmp_path / "run")
    assert last["params"] == pytest.approx(0.5 * base["params"], rel=0.01)
    assert (tmp_path / "run/train_ddp_process_1.log").is_file()
    assert done.stdout.count("\nresults: ") == 1  # one process speaks for both
    ldt.load_pruned(tmp_path / "run/round-1.ckpt")


@pytest.mark.slow
def test_runs_of_a_study_share_their_base_training(tmp_path, monkeypatch):
    trained = []
    plain = DetectorModule.training_step

    def step(module, batch, index):
        trained.append(module.phase_epochs)
        return plain(module, batch, index)

    monkeypatch.setattr(DetectorModule, "training_step", step)
    shared = ["base=shared", "prune=oneshot", "method=l1", "ldt.enabled=true", "recipe.epochs=3"]
    for rate in (0.3, 0.5):
        experiment.run(tiny(tmp_path, *shared, f"prune.rate={rate}"), tmp_path / f"run{rate}")
    experiment.run(tiny(tmp_path, *shared, "method=random"), tmp_path / "random")
    (base,) = tmp_path.glob("base-roadscenes-gfl_tiny-ldt-s0-*")
    assert trained.count(3) == 6  # steps: once for all
    assert trained.count(1) == 6
    expected = rows(base)[0]
    for name in ("run0.3", "run0.5", "random"):
        found = rows(tmp_path / name)
        assert {key: found[0][key] for key in expected} == pytest.approx(expected, nan_ok=True)
        assert len(found) == 2
    only = ["base=shared", "method=none", "ldt.enabled=true", "recipe.epochs=3"]
    assert experiment.run(tiny(tmp_path, *only), tmp_path / "none") == expected["AP"]
    assert len(trained) == 12  # a run that is the base itself trains nothing
    assert rows(tmp_path / "none") == [expected]
    ldt.load_pruned(tmp_path / "none" / summary(tmp_path / "none")["checkpoint"])


@pytest.mark.slow
def test_another_base_is_told(tmp_path, nothing_is_trained):
    with pytest.raises(ValueError, match=r"base='common'; allowed: own, shared"):
        experiment.run(tiny(tmp_path, "base=common"), tmp_path / "run")
