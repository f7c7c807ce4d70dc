"""What a run is: commands that are the same run, seeds of one cell, or other runs; their names."""

import inspect
from functools import cache
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from lightning import Trainer
from omegaconf import OmegaConf
from small import CONF

from ldt import config
from ldt.runs import files, identity
from ldt.runs.run import stored_config

OLD = sorted(Path(__file__).parents[2].glob("notebooks/runs/probe/*/config.yaml"))
UNPRUNED = "method=none "
GFL = "detector=mmdet detector.config=mmdet::gfl/gfl_r50_fpn_1x_coco.py"


@pytest.fixture(scope="module")
def command():
    """The composed configuration of a command line, and the name of its run."""
    config.register()
    before = HydraConfig.instance().cfg

    @cache
    def composed(line):
        with initialize_config_dir(CONF, version_base="1.3"):
            found = compose("config", overrides=line.split(), return_hydra_config=True)
        HydraConfig.instance().set_config(found)
        own = OmegaConf.masked_copy(found, [key for key in found if key != "hydra"])
        return OmegaConf.to_container(own, resolve=True), found.run_name

    yield composed
    HydraConfig.instance().cfg = before


PAIRS = [
    # where things are, how fast they load, where they are computed
    ("dataset=kitti dataset.root=/a", "dataset=kitti dataset.root=/b", "same run"),
    ("", "dataset.cache=/tmp/x", "same run"),
    ("", "dataset.workers=7", "same run"),
    ("dataset=kitti", "dataset=kitti dataset.workers=3", "same run"),
    ("", "trainer.compile=true", "same run"),
    ("", "trainer.devices=2 trainer.strategy=ddp", "same run"),
    ("", "trainer=cpu", "same run"),
    ("trainer=gpu", "trainer=ddp trainer.num_nodes=2", "same run"),
    ("", "trainer.threads=1", "same run"),
    # what is watched, drawn, recorded, returned
    ("", "report.latency_runs=0", "same run"),
    ("", "report.pictures=0", "same run"),
    ("", "logger=wandb logger.mode=online", "same run"),
    ("", "trainer.log_every_n_steps=1 trainer.validate_every=2", "same run"),
    ("", "objectives=[mAP,params]", "same run"),
    ("", "study=another", "same run"),
    ("", "run_name=another", "same run"),
    # what nobody reads
    (UNPRUNED, UNPRUNED + "prune.rate=0.2 prune=oneshot", "same run"),
    (UNPRUNED, UNPRUNED + "prune.budget=macs recipe.retrain_epochs=7", "same run"),
    (UNPRUNED, "method=l1 prune.rounds=0", "same run"),
    ("method=l1", "method=l1 ldt.alpha=0.5 ldt.memory=9", "same run"),
    ("", "ldt.alpha_share=0.2", "same run"),  # alpha is a number
    ("", "detector.mixup=false", "same run"),  # there are no mosaics
    # spelling
    ("prune.budget=flops", "prune.budget=macs", "same run"),
    ("recipe.optimizer.lr=1e-3", "recipe.optimizer.lr=0.001", "same run"),
    ("recipe.epochs=3", "++recipe.epochs=3", "same run"),
    ("trainer=debug", "trainer.limit_train_batches=2 trainer.limit_val_batches=2", "same run"),
    ("", "trainer.limit_val_batches=1.0", "same run"),
    ("", "trainer.precision=32", "same run"),
    ("trainer.precision=bf16", "trainer.precision=bf16-mixed", "same run"),
    ("", "trainer.gradient_clip_algorithm=norm", "same run"),
    ("prune.scope=[neck,backbone]", "prune.scope=[backbone,neck]", "same run"),
    ("", "prune.rounds=2", "same run"),
    ("experiment=table2_ldt_small method=none", "experiment=fig6_stability_small", "same run"),
    # chance
    ("seed=0", "seed=1", "same cell"),
    ("", "seed=3 report.latency_runs=0 trainer.devices=4", "same cell"),
    ("base=own", "base=shared", "same cell"),
    # settings
    ("", "prune.rate=0.5", "other run"),
    ("prune.budget=params", "prune.budget=macs", "other run"),
    ("method=ldt", "method=l1", "other run"),
    ("method=l1", "method=l1 ldt.enabled=true", "other run"),
    (UNPRUNED, UNPRUNED + "ldt.enabled=true", "other run"),
    ("", "ldt.alpha=0.5", "other run"),
    ("ldt=paper", "ldt=default", "other run"),
    ("ldt=default", "ldt=default ldt.alpha_share=0.2", "other run"),
    ("ldt=default", "ldt=default ldt.estimation=epoch", "other run"),
    ("ldt=paper", "ldt=paper ldt.estimation=epoch", "same run"),
    ("", "ldt.covariance=correlation", "other run"),
    ("", "ldt.background=true", "other run"),
    ("", "recipe.epochs=10", "other run"),
    ("", "recipe.batch_size=4", "other run"),
    ("", "recipe.warmup_epochs=1", "other run"),
    ("recipe=mmdet_yolox", "recipe=mmdet_yolox detector.mixup=false", "other run"),
    (GFL, f"{GFL} recipe.gamma=0.5", "other run"),
    (f"{GFL} recipe=mmdet_1x", GFL, "same run"),
    ("", "trainer.precision=bf16-mixed", "other run"),
    ("", "trainer.deterministic=true", "other run"),
    ("", "trainer.precision=bf16", "other run"),
    ("", "trainer.gradient_clip_algorithm=value", "other run"),
    ("", "prune.scope=[neck]", "other run"),
    ("", "trainer.sync_batchnorm=true", "other run"),
    ("", "trainer.limit_train_batches=2", "other run"),
    ("", "trainer.accumulate_grad_batches=2", "other run"),
    ("trainer.limit_train_batches=1", "trainer.limit_train_batches=1.0", "other run"),
    ("", "dataset.scene_seed=1", "other run"),
    ("", "dataset.max_detections=300", "other run"),
    ("dataset=kitti", "dataset=kitti dataset.split_seed=1", "other run"),
    ("dataset=coco", "dataset=coco dataset.train_ann=tenth.json", "other run"),
    ("detector=gfl", "detector=gfl detector.size=tiny", "other run"),
    ("", "+detector.options.backbone.norm_cfg.type=GN", "other run"),
    ("", "seed=1 prune.rate=0.5", "other run"),
]
OTHER_NAMES = {  # the same run in another folder: it is shown as one run, but trained again
    *("study=another", "run_name=another", "method=l1 prune.rounds=0"),
    *(UNPRUNED + "prune.rate=0.2 prune=oneshot", "experiment=fig6_stability_small"),
    UNPRUNED + "prune.budget=macs recipe.retrain_epochs=7",
}


def lines(pair):
    return " | ".join(part.strip() or "(default)" for part in pair[:2])


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other", "relation"), PAIRS, ids=map(lines, PAIRS))
def test_two_commands(command, one, other, relation, tmp_path, monkeypatch):
    (first, first_name), (second, second_name) = command(one), command(other)
    assert identity.compare(first, second) == identity.compare(second, first) == relation
    monkeypatch.chdir(tmp_path)
    folder = Path("runs", first["study"], first_name)
    folder.mkdir(parents=True)
    (folder / files.CONFIG).write_text(yaml.safe_dump(first))
    if other not in OTHER_NAMES:  # a command finds the directory of its run, however it is spelt
        if relation == "same run" and second_name != first_name:
            second_name = command.__wrapped__(other)[1]  # now that the directory exists
        assert (second_name == first_name) is (relation == "same run")


@pytest.mark.slow
def test_a_folder_is_claimed_by_the_same_run_only(command, tmp_path):
    known = command("")[0]
    identity.claim(tmp_path, known, {})
    identity.claim(tmp_path, command("dataset.workers=3")[0], known)
    told = "prune.rate: 0.7 there, 0.5 now; seed: 0 there, 1 now"
    with pytest.raises(identity.OtherRunError, match=rf"{told}.*study=<name>"):
        identity.claim(tmp_path, command("prune.rate=0.5 seed=1")[0], known)
    known = {**known, "recipe": {**known["recipe"], "milestones": [2 / 3]}}
    told = r"type recipe.milestones=\[0.6666666666666666\]; for another one, study=<name>"
    with pytest.raises(identity.OtherRunError, match=told):
        identity.claim(tmp_path, command("")[0], known)
    added = {**command("")[0], "recipe": {**command("")[0]["recipe"], "new": 1}}
    with pytest.raises(identity.OtherRunError, match=r"now\)\. Type study=<name>"):
        identity.claim(tmp_path, added, command("")[0])


def test_every_argument_of_the_trainer_has_its_place():
    """What is new in Lightning has to be thought through."""
    own = {"callbacks", "max_epochs", "min_epochs", "plugins", "gradient_clip_val"}
    results = {
        *("precision", "deterministic", "sync_batchnorm", "limit_train_batches"),
        *("limit_val_batches", "limit_test_batches", "limit_predict_batches", "min_steps"),
        *("max_time", "gradient_clip_algorithm"),
    }
    known = own | results | {
        key.removeprefix("trainer.") for key in (*identity.FREE, *identity.BEFORE)
    }  # fmt: skip
    assert set(inspect.signature(Trainer.__init__).parameters) - {"self"} <= known


# Earlier versions -----------------------------------------------------------------------------


@pytest.mark.parametrize("file", OLD, ids=lambda file: file.parent.name)
def test_a_key_that_an_old_configuration_lacks_means_what_it_meant_then(file):
    known = stored_config(file.parent)
    today = identity.essence(OmegaConf.to_container(_with_schema(known), resolve=True))
    assert identity.essence(known) == today
    assert identity.essence(known | {"logger": {}}) == today


def _with_schema(known):
    return OmegaConf.merge(OmegaConf.structured(config.Config), known)


@pytest.mark.parametrize(
    ("missing", "then", "other"),
    [
        ("method.inner_rounds", 1, 10),
        ("recipe.channels_last", False, True),
        ("trainer.accumulate_grad_batches", 1, 4),
        ("method.criterion.bn", "fuse", "keep"),
        ("method.criterion.aggregate", "sum", "mean"),
    ],
)
def test_missing_keys(missing, then, other):
    *groups, key = missing.split(".")

    def given(keys):
        for group in reversed(groups):
            keys = {group: {"name": "x", **keys}}
        return keys

    assert identity.compare(given({}), given({key: then})) == "same run"
    assert identity.compare(given({}), given({key: other})) == "other run"


def test_batches_of_several_processes_were_counted_by_process():
    old = {"recipe": {"batch_size": 4}, "trainer": {"devices": 2, "num_nodes": 1}}
    new = {"recipe": {"batch_size": 8}, "trainer": {"devices": 2, "accumulate_grad_batches": 1}}
    assert identity.compare(old, new) == "same run"
    one = {"recipe": {"batch_size": 8}, "trainer": {"devices": 1, "accumulate_grad_batches": 1}}
    assert identity.compare(old, one) == "same run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "before"),
    [
        ("trainer.threads=1", "roadscenes-gfl_tiny-ldt-params0.7-s0-3030b8eb"),
        (
            "method=l1 recipe=short recipe.epochs=2 recipe.retrain_epochs=3 dataset.train=64 "
            "dataset.val=32",
            "roadscenes-gfl_tiny-l1-params0.7-s0-895c756c",
        ),
        ("method=l1 seed=3 trainer.threads=1", "roadscenes-gfl_tiny-l1-params0.7-s3-3030b8eb"),
    ],
)
def test_a_run_that_an_earlier_version_named_is_found(command, line, before, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/old", before)
    folder.mkdir(parents=True)
    (folder / files.CONFIG).write_text("seed: 0\n")
    assert command(f"{line} study=old")[1] == before
    assert ("threads" in line) is (command(line)[1] != before)  # the others are named as they were


# Names ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_name_spells_out_what_runs_are_compared_by(command):
    assert command("")[1] == command("seed=0")[1] == "roadscenes-gfl_tiny-ldt-params0.7-s0"
    assert command("detector=yolox_nano method=l1 prune.rate=0.25 seed=3")[1] == (
        "roadscenes-yolox_nano-l1-params0.25-s3"
    )
    assert command("prune.budget=macs")[1] == "roadscenes-gfl_tiny-ldt-flops0.7-s0"


@pytest.mark.slow
def test_order_does_not_matter_and_any_other_override_does(command):
    one, two = "recipe.epochs=3", "ldt.alpha=0.1"
    assert command(f"{one} {two}")[1] == command(f"{two} {one}")[1]
    others = ["", one, two, f"{one} {two}", "recipe.epochs=4", "recipe=paper"]
    assert len({command(line)[1] for line in others}) == len(others)


@pytest.mark.slow
@pytest.mark.parametrize(
    "detail",
    ["dataset.root=/data", "dataset.cache=/tmp/x", "dataset.workers=7", "logger=wandb",
     "trainer.devices=2", "study=another", "report.pictures=3", "experiment=roadscenes",
     "logger=wandb logger.mode=online logger.project=mine logger.entity=us logger.checkpoint=false",
     "'dataset.root=/my_data/${dataset.name}'"],
)  # fmt: skip
def test_where_things_are_does_not_change_the_name(command, detail):
    assert command(f"{detail} recipe.epochs=3".replace("'", ""))[1] == command("recipe.epochs=3")[1]


def test_the_suffix_is_short_and_empty_for_nothing():
    assert identity.suffix_of([], {}) == ""
    suffix = identity.suffix_of(["recipe.epochs=3"], {})
    assert len(suffix) == 9
    assert int(suffix[1:], 16) >= 0
    same = (["+recipe.epochs=3"], ["recipe.epochs=4", "recipe.epochs=3"], ["recipe.epochs='3'"])
    assert [identity.suffix_of(given, {}) == suffix for given in same] == [True, True, False]
    assert identity.suffix_of(["~recipe.epochs"], {}) not in ("", suffix)
    quoted = ["detector.config='my file, 1=2.py'"]
    assert identity.suffix_of(quoted, {}) == identity.suffix_of(quoted, {}) != suffix


@pytest.mark.slow
def test_the_run_of_a_configuration_is_found_whatever_it_is_called(command, tmp_path):
    known = command("method=l1")[0]
    for name, line in (("base-x", "method=l1"), ("b", "method=px")):
        (tmp_path / name).mkdir()
        (tmp_path / name / files.CONFIG).write_text(yaml.safe_dump(command(line)[0]))
    file = tmp_path / "base-x" / files.CONFIG  # as an earlier version wrote it
    target = "ldt.data.{}.RoadScenesDataModule"
    file.write_text(file.read_text().replace(target.format("roadscenes"), target.format("kitti")))
    assert target.format("kitti") in file.read_text()
    assert identity.find(tmp_path, known) == tmp_path / "base-x"
    assert identity.find(tmp_path, known, "base-") == tmp_path / "base-x"
    assert identity.find(tmp_path, command("method=px")[0], "base-") is None
    assert identity.find(tmp_path, command("seed=4")[0]) is None
