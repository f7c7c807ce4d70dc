"""Laws of paths: as people have them, from the command line and in yaml."""

from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from short_runs import SCENES, python, tiny
from small import CONF, composed

from ldt import experiment
from ldt.config import register
from ldt.config.paths import PATHS, expand_home, quote_paths

NAMES = [
    "größe", "数据", "my photos (1)", "run=3", "a#b", "a[1]", "{x}", "a:b", "it's", 'say "hi"',
    "100%", "a&b;c", "a,b", "plain", "e\u0301", "$x", "a!*?", "=",
]  # fmt: skip


def read(argument):
    """What Hydra makes of an argument: its value, or the values of a sweep."""
    override = OverridesParser.create().parse_override(argument)
    if override.is_sweep_override():
        return [text.strip("'") for text in override.sweep_string_iterator()]
    return override.value()


@pytest.mark.slow
@pytest.mark.parametrize("key", [*PATHS, "+dataset.photos"])
@pytest.mark.parametrize("name", NAMES)
def test_a_path_arrives_as_it_was_typed(key, name):
    (argument,) = quote_paths([f"{key}=/data/{name}"])
    assert read(argument) == f"/data/{name}"
    assert quote_paths([argument]) == [argument]  # as the processes of a run do once more


def test_relative_and_odd_ones_arrive_too():
    for path in ("~/kitti", "[x]", "run=3/y", "annotations (2)/x.json", "true", "1e3"):
        assert read(*quote_paths([f"dataset.root={path}"])) == path


@pytest.mark.parametrize(
    "argument",
    [
        "dataset.root=/data/kitti",  # also keeps the hash of the name
        "dataset.root=null",
        "dataset.root=",
        "dataset.root='/my photos (1)'",
        "detector.config=mmdet::gfl/gfl_r50_fpn_1x_coco.py",
        "dataset.root=/data/${dataset.name}",
        "dataset.root=choice(/a,/b)",
        r"dataset.root=/data/my\ photos\ \(1\)",  # escaped for Hydra
        "dataset.scale=[640,192]",
        "method.criterion.a=1.5",
        "prune.rate=0.5,0.7",
        "~dataset.root",
        "--help",
        "-m",
        "hydra/launcher=joblib",
    ],
)
def test_what_hydra_reads_rightly_is_left_alone(argument):
    assert quote_paths([argument]) == [argument]


def test_commas_separate_the_values_of_a_sweep_only():
    assert read(quote_paths(["dataset.root=/a (1),/b"])[0]) == "/a (1),/b"
    assert read(quote_paths(["-m", "dataset.root=/a (1),/b"])[1]) == ["/a (1)", "/b"]
    assert quote_paths(["-m", "dataset.root='/a,b'"])[1] == "dataset.root='/a,b'"


def test_home_is_expanded_wherever_a_path_comes_from(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me (1)")
    assert read(*quote_paths(["hydra.run.dir=~/runs"])) == "/home/me (1)/runs"
    config = composed(
        "dataset=coco",
        *quote_paths(["dataset.root=~/coco", "detector.checkpoint=~/w.pth"]),
        "+detector.options.backbone.init_cfg={checkpoint:'~/r50.pth'}",
    )
    expand_home(config)
    assert config.dataset.root == "/home/me (1)/coco"
    assert config.detector.checkpoint == "/home/me (1)/w.pth"
    assert config.detector.options.backbone.init_cfg.checkpoint == "/home/me (1)/r50.pth"
    assert config.dataset.train_ann == "annotations/instances_train2017.json"


@pytest.mark.slow
def test_home_and_signs_in_yaml(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "experiment").mkdir()
    yaml = '# @package _global_\ndataset: {cache: "~/größe #1 [x]=(2)"}\n'
    (tmp_path / "experiment/mine.yaml").write_text(yaml, encoding="utf-8")
    register()
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("config", [f"hydra.searchpath=['file://{tmp_path}']", "experiment=mine"])
    expand_home(config)
    assert config.dataset.cache == f"{tmp_path}/größe #1 [x]=(2)"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_whole_run_in_an_odd_folder(tmp_path, monkeypatch):
    folder = tmp_path / "größe [1] 100% #2=(x)"
    monkeypatch.setenv("HOME", str(folder))
    once = ["dataset.cache=~/scenes", "prune.rounds=1"]
    experiment.run(tiny(tmp_path, *quote_paths(once)), folder / "run")
    assert list((folder / "scenes").iterdir())
    checkpoint = f"detector.checkpoint={folder / 'run/round-0.ckpt'}"
    again = [*once, checkpoint, "recipe.epochs=0"]
    experiment.run(tiny(tmp_path, *quote_paths(again)), folder / "again")
    assert (folder / "again/round-1.ckpt").is_file()


@pytest.mark.slow
def test_the_command_line_takes_them(tmp_path):
    odd = tmp_path / "größe (1)=3, x"
    root = Path(__file__).parents[2]
    done = python(
        str(root / "run.py"), *SCENES, f"dataset.cache={odd}", f"hydra.run.dir={odd}/run",
        f"detector.checkpoint={odd}/w [1].pth", "--cfg", "job", "--resolve", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert config["dataset"]["cache"] == str(odd)
    assert config["detector"]["checkpoint"] == f"{odd}/w [1].pth"
