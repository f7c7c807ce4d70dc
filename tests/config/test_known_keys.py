"""Laws of the keys: one that nobody reads is refused, with the nearest that is known."""

import inspect
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from lightning import Trainer
from lightning.pytorch.callbacks import ProgressBar
from mmengine.optim import DefaultOptimWrapperConstructor
from omegaconf import OmegaConf
from short_runs import tiny
from small import CONF, composed

from ldt import build, experiment
from ldt.config import TrainerConfig, register
from ldt.config.keys import OWNED, check_keys, explain_key
from ldt.recipe import PARAMWISE

TRAINER = set(inspect.signature(Trainer).parameters)
FREELY = [
    "+detector.options.backbone.out_indices=[1,2,3]",
    "+recipe.optimizer.betas=[0.9,0.99]",
    "+recipe.paramwise.norm_decay_mult=0.0",
    "+dataset.scales.wide=[512,64]",
    "++method.criterion.location=false",
]


@pytest.mark.slow
@pytest.mark.parametrize("plus", ["+", "++"])
@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("trainer.foo", "known in trainer: accelerator, devices"),
        ("trainer.acumulate_grad_batches", "Type trainer.accumulate_grad_batches=9"),
        ("recipe.lr", "Type recipe.optimizer.lr=9"),
        ("recipe.epoch", "Type recipe.epochs=9"),
        ("prune.rat", "Type prune.rate=9"),
        ("method.foo", "known in method: name, title, ldt"),
        ("method.rankin", "Type method.ranking=9"),
        ("dataset.foo", "known in dataset: _target_, name, root"),
        ("dataset.trian", "Type dataset.train=9"),
        ("rate", "Type prune.rate=9"),
        ("sed", "Type seed=9"),
        ("batch_size", "did you mean recipe.batch_size or prune.batch_size"),
        ("report.picture", "Type report.pictures=9"),
        ("ldt.alfa", "Type ldt.alpha=9"),
        ("trainer.max_epochs", "recipe.epochs=... and recipe.retrain_epochs"),
        ("trainer.gradient_clip_val", "type recipe.clip_grad"),
        ("trainer.max_epoch", "trainer.max_epochs cannot be set: .* recipe.epochs"),
    ],
)
def test_a_key_that_nobody_reads_is_refused_with_a_plus_too(plus, key, wanted):
    with pytest.raises(ValueError, match=wanted) as raised:
        check_keys(composed(f"{plus}{key}=9"))
    assert str(raised.value).startswith(f"{key}=9")
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_several_unknown_keys_are_told_at_once():
    with pytest.raises(ValueError, match=r"prune.rat=1: .*; report.foo=2: "):
        check_keys(composed("+prune.rat=1", "+report.foo=2"))


@pytest.mark.slow
def test_what_somebody_reads_is_not_refused():
    check_keys(composed(*FREELY))
    check_keys(composed("dataset=coco", "logger=wandb", "logger.tags=[a]"))
    plain = OmegaConf.to_container(composed("dataset=kitti"))
    check_keys(OmegaConf.create(plain))  # a saved configuration has lost its types


@pytest.mark.slow
def test_a_saved_configuration_is_checked_like_a_composed_one():
    plain = OmegaConf.to_container(composed())
    for group, key in (("prune", "rat"), ("dataset", "trian")):
        with pytest.raises(ValueError, match=f"{group}.{key}=1: unknown key"):
            check_keys(OmegaConf.create(plain | {group: plain[group] | {key: 1}}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("prune: {rat: 0.9}", r"prune.rat in experiment/mine.yaml: .*did you mean prune.rate\?"),
        ("prun: {rate: 0.9}", r"prun in experiment/mine.yaml: .*did you mean prune\?"),
        ("recipe: {epochs: many}", r"recipe.epochs in experiment/mine.yaml: .*'many'"),
    ],
)
def test_a_mistake_in_an_experiments_yaml_is_one_line(tmp_path, content, told):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(f"# @package _global_\n{content}\n")
    line = refused(f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
    with pytest.raises(ValueError, match=told):
        raise ValueError(line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("prune.rates=0.5", "prune.rates=0.5: unknown key; did you mean prune.rate? Type "
         "prune.rate=0.5"),
        ("trainer.max_epochs=3", "trainer.max_epochs=3 cannot be set: the loop ends after its last "
         "phase: type recipe.epochs=... and recipe.retrain_epochs=..."),
        ("method.criterion.sorce=1", "method.criterion.sorce=1: unknown key; did you mean "
         "method.criterion.source? Type method.criterion.source=1"),
        ("recipe.optimizer.momentum=0.9", "recipe.optimizer.momentum is not in the configuration "
         "yet; to add it type +recipe.optimizer.momentum=0.9"),
    ],
)  # fmt: skip
def test_hydras_own_errors_become_one_line(override, told):
    assert refused(override) == told


def refused(*overrides):
    """What `explain` makes of the error of a composition."""
    register()
    with (
        initialize_config_dir(CONF, version_base="1.3"),
        pytest.raises(HydraException) as raised,
    ):
        compose("config", overrides=list(overrides))
    return explain_key(raised.value) or ""


def test_checking_keys_imports_nothing_heavy():
    code = "import ldt.config.keys, sys; print({'torch', 'lightning', 'hydra'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Keys that go to a class ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("+method.criterion.sorce=neck", r"did you mean method.criterion.source\?"),
        ("method=chip +method.criterion.nomalise=true", r"method.criterion.normalise=True"),
        ("method=group_fisher_gradual +method.gradual.intervall=3", r"method.gradual.interval=3"),
        ("logger=wandb +logger.projekt=x", r"did you mean logger.project\?"),
        ("+logger.mode=online", r"logger has keys \(mode\) but no class: type logger="),
        ("logger=wandb +logger.save_dir=x", r"logger.save_dir=x: unknown key"),
        ("+recipe.optimizer.momentun=0.9", r"recipe.optimizer.momentun=0.9: unknown key"),
        ("recipe=paper +recipe.optimizer.momentun=0.9", r"Type recipe.optimizer.momentum=0.9"),
        ("+recipe.paramwise.norm_decay=0", r"did you mean recipe.paramwise.norm_decay_mult\?"),
    ],
)  # fmt: skip
def test_a_key_that_a_class_does_not_take_is_refused(tmp_path, monkeypatch, overrides, told):
    monkeypatch.setattr(build, "DetectorModule", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(Exception, match=told):
        experiment.run(tiny(tmp_path, *overrides.split()), tmp_path / "run")


OWN = ("_target_", "name", "metric", "scales", "scale")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"photos": "/data/a"}, None),
        ({"photos": "/data/a", "max_detections": 300}, None),
        ({"max_detections": 0}, r"dataset.max_detections=0; allowed: a whole number of at least 1"),
        ({"fotos": "/data/a"}, r"fotos=/data/a: unknown key; did you mean dataset.photos\?"),
        ({"photos": 3}, r"dataset.photos=3; allowed: "),
        ({"batch_size": 3}, r"dataset.batch_size=3: unknown key; did you mean"),
    ],
)  # fmt: skip
def test_a_data_set_of_ones_own_has_the_keys_of_its_constructor(more, told):
    plain = OmegaConf.to_container(composed("run_name=own"), resolve=True)
    dataset = {k: v for k, v in plain["dataset"].items() if k in OWN}
    dataset["_target_"] = "own_data.Photos"
    config = OmegaConf.create(plain | {"dataset": dataset | more})
    check_keys(config)  # knows nothing of the class
    if told is None:
        build.check_config(config)
        assert build.build_data(config).photos == more["photos"]
    else:
        with pytest.raises(ValueError, match=told):
            build.check_config(config)


def test_mmengine_reads_the_paramwise_keys_that_are_allowed():
    source = inspect.getsource(DefaultOptimWrapperConstructor.add_params)
    assert source.count("self.paramwise_cfg.get(") == len(PARAMWISE)
    assert all(f"paramwise_cfg.get('{key}'" in source for key in PARAMWISE)


# Lightning's Trainer ----------------------------------------------------------------------------


def test_every_argument_of_the_trainer_can_be_set_or_says_what_to_type_instead():
    ours = set(TrainerConfig.__dataclass_fields__) - set(build.OURS)
    assert ours | set(OWNED) == TRAINER  # else Lightning's Trainer has changed: sort its arguments
    assert ours & set(OWNED) == set()
    assert set(build.OURS) & TRAINER == set()


class Stop(Exception):
    pass


def given_to_trainer(monkeypatch, folder, *overrides):
    """What Lightning's Trainer is made with."""
    seen = {}

    def trainer(**arguments):
        seen.update(arguments)
        raise Stop

    monkeypatch.setattr(build.L, "Trainer", trainer)
    config = tiny(folder, *overrides)
    plan = build.build_schedule(config)
    with pytest.raises(Stop):
        build.build_trainer(config, plan, build.build_loop(config, plan, folder), folder)
    return seen


@pytest.mark.slow
def test_what_is_set_below_trainer_reaches_it_and_nothing_else_does(tmp_path, monkeypatch):
    chosen = {
        "accumulate_grad_batches": 4, "gradient_clip_algorithm": "value", "benchmark": True,
        "profiler": "simple", "overfit_batches": 2, "detect_anomaly": True, "inference_mode": False,
        "use_distributed_sampler": False, "enable_model_summary": True, "fast_dev_run": 3,
        "limit_val_batches": 0.5, "log_every_n_steps": 7, "enable_progress_bar": False,
    }  # fmt: skip
    before = given_to_trainer(monkeypatch, tmp_path)
    typed = [f"trainer.{key}={value}" for key, value in chosen.items()]
    after = given_to_trainer(monkeypatch, tmp_path, *typed)
    assert {key: after[key] for key in chosen} == chosen
    assert all(before.get(key) != value for key, value in chosen.items())
    assert {"benchmark", "profiler", "limit_train_batches"} & set(before) == set()  # its own choice
    assert set(after) <= TRAINER
    bars = [
        [c for c in args["callbacks"] if isinstance(c, ProgressBar)] for args in (before, after)
    ]
    assert [len(found) for found in bars] == [1, 0]


@pytest.mark.slow
def test_a_fast_dev_run_sees_every_phase(tmp_path):
    config = tiny(tmp_path, "trainer.fast_dev_run=1", "recipe.epochs=2", "recipe.batch_size=2")
    experiment.run(config, tmp_path / "run")
    assert (tmp_path / "run/round-2.ckpt").is_file()
