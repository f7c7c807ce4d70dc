"""Laws of the configuration: every option composes, mistakes are named, runs have an identity."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf
from short_runs import tiny
from small import CONF, composed

from ldt import build, config, experiment
from ldt.data.roadscenes_generator import RoadScenes

GROUPS = sorted(folder.name for folder in Path(CONF).iterdir() if folder.is_dir())
OPTIONS = [
    f"{group}={file.stem}"
    for group in GROUPS
    if group != "hydra"
    for file in sorted(Path(CONF, group).glob("*.yaml"))
]


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_what_it_names_exists(option):
    needed = ["detector.config=mmdet::gfl/gfl_r50_fpn_1x_coco.py"] * (option == "detector=mmdet")
    found = composed(option, *needed, "run_name=x")
    plain = OmegaConf.to_container(found, resolve=True, throw_on_missing=True)
    get_object(plain["dataset"]["_target_"])
    instantiate(found.method.criterion)
    assert len(plain["dataset"]["scale"]) == 2


@pytest.mark.slow
def test_options_bring_their_typed_schema():
    kinds = {
        "roadscenes": config.RoadScenesConfig,
        "kitti": config.KittiConfig,
        "coco": config.CocoConfig,
    }
    for name, kind in kinds.items():
        assert OmegaConf.get_type(composed(f"dataset={name}").dataset) is kind
    assert OmegaConf.get_type(composed().prune) is config.PruneConfig


def test_the_scenes_of_the_schema_are_those_of_the_generator():
    schema, scenes = config.RoadScenesConfig(), RoadScenes()
    for key in ("train", "val", "height", "width", "difficulty"):
        assert getattr(schema, key) == getattr(scenes, key)
    assert schema.scene_seed == scenes.seed


@pytest.mark.slow
def test_a_detector_brings_its_recipe_which_can_be_replaced():
    assert composed("detector=yolox_s").recipe == composed("recipe=paper_yolox").recipe
    assert composed("detector=gfl", "recipe=short").recipe == composed("recipe=short").recipe
    assert composed("detector=gfl").ldt.alpha == composed("detector=yolox_s").ldt.beta == "auto"
    assert composed("detector=gfl", "ldt=paper").ldt.alpha == 5e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake",
    [
        "prune.rates=0.5",
        "prune.rate=abc",
        "dataset.trian=3",
        "dataset.train=abc",
        "dataset.scale=big",
        "method.criterion.sorce=x",
        "recipe.epochs=1.5",
        "recipe.epoch=3",
        "detector.option=3",
        "detector.pretrained=maybe",
        "ldt.alfa=1",
        "trainer.max_epochs=3",
        "report.pictures=all",
        "seed=abc",
        "sead=1",
        "dataset=coco dataset.grouping=merged",
        "dataset=kitti dataset.train_fraction=most",
    ],
)
def test_a_mistake_is_named(mistake):
    with pytest.raises(ConfigCompositionException) as raised:
        composed(*mistake.split())
    key = mistake.split()[-1].partition("=")[0]
    assert key in f"{raised.value} {raised.value.__cause__}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("prune.rate=1.5", r"prune.rate=1.5"),
        ("prune.budget=param", r"prune.budget='param'; allowed: params, macs, flops"),
        ("method.ranking=best", r"method.ranking='best'"),
        ("dataset.metric=rate", r"dataset.metric='rate'; allowed: AP, AP50"),
        ("trainer.limit_val_batches=0", r"trainer.limit_val_batches=0; allowed: a number above 0"),
        ("dataset.name=../x", r"dataset.name='../x'; allowed: the name of a folder"),
        ("detector.name=a/b", r"detector.name='a/b'; allowed: the name of a folder"),
        ("method.criterion.source=nek", r"method.criterion.source='nek'; allowed: neck, neck_all"),
        ("method.criterion.phi=abc", r"method.criterion.phi='abc'"),
        ("method.criterion.location=maybe", r"method.criterion.location='maybe'"),
        ("method.criterion.a=-1", r"method.criterion.a=-1"),
        ("method=group_fisher_gradual method.gradual.lr=abc", r"method.gradual.lr='abc'"),
        ("ldt.covariance=max", r"ldt.covariance='max'; allowed: mean, sum"),
        (
            "method=none ldt.enabled=true ldt.phi=3",
            r"ldt.phi=3.0; allowed: a number above 0",
        ),
        ("ldt.memory=-1", r"ldt.memory=-1; allowed: a whole number of at least 0"),
        ("recipe.schedule=poly", r"recipe.schedule='poly'; allowed: step, cosine, constant"),
        ("recipe.optimizer.lr=abc", r"recipe.optimizer.lr='abc'"),
        ("report.latency_runs=5", r"report.latency_runs=5 must be at least 30"),
        ("trainer.devices=abc", r"`devices` .* should be an int"),
        ("trainer.precision=half", r"half"),
        ("recipe.augment=mosaics", r"recipe.augment='mosaics'; allowed: none, flip, shift,"),
        ("recipe.batch_size=0", r"recipe.batch_size=0; allowed: a whole number of at least 1"),
        ("dataset.max_detections=0", r"dataset.max_detections=0; allowed: a whole number of at"),
        ("recipe.clip_grad=-1", r"recipe.clip_grad=-1.0; allowed: a number above 0 or null"),
        ("recipe.ema=2", r"recipe.ema=2.0; allowed: a number above 0 and below 1 or null"),
        ("recipe.milestones=[0.5,2]", r"recipe.milestones"),
        ("prune.rate=nan", r"prune.rate=nan"),
        ("recipe.optimizer.lr=nan", r"recipe.optimizer.lr=nan"),
        ("ldt.alpha=inf", r"ldt.alpha=inf; allowed: a number of at least 0"),
        ("dataset.grouping=mixed", r"grouping"),
        ("dataset.root=/tmp", r"dataset.cache=/tmp"),
        ("recipe.epochs=0", r"detector.checkpoint=<file>"),
    ],
)
def test_a_wrong_choice_is_told_before_a_model_is_built(mistake, message, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(build, "DetectorModule", lambda *_, **__: built.append(1))
    with pytest.raises(Exception, match=message):
        experiment.run(tiny(tmp_path, *mistake.split()), tmp_path / "run")
    assert built == []


# Sweeps -----------------------------------------------------------------------------------------


def composed_with_hydra(*overrides):
    config.register()
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


@pytest.mark.slow
def test_slurm_composes_with_its_keys():
    more = ["hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=4"]
    launcher = composed_with_hydra("hydra/launcher=slurm", *more).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.partition, launcher.gpus_per_node, launcher.tasks_per_node) == ("gpu", 4, 4)
    assert launcher.timeout_min > 0
    assert launcher.max_num_timeout > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target"),
    [("joblib", "JoblibLauncher"), ("submitit_local", "LocalLauncher")],
)
def test_other_launchers_compose(name, target):
    launcher = composed_with_hydra(f"hydra/launcher={name}").hydra.launcher
    assert launcher._target_.endswith(target)


EXPERIMENTS = sorted(file.stem for file in Path(CONF, "experiment").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_has_a_study(name):
    found = composed_with_hydra(f"experiment={name}")
    paper = "paper_small" if name.endswith("_small") else "paper"  # its tables share their bases
    assert found.study == (name if name in ("roadscenes", "search", "benchmark") else paper)
    if name != "benchmark":  # experiments/benchmark/plan.yaml names its cells
        assert found.hydra.sweeper.params or found.hydra.sweeper.grids


@pytest.mark.slow
def test_the_comparison_names_methods_and_detectors_that_exist():
    params = composed_with_hydra("experiment=roadscenes").hydra.sweeper.params
    for group in ("method", "detector"):
        known = {file.stem for file in Path(CONF, group).glob("*.yaml")}
        assert set(params[group].split(",")) <= known
