"""`ldt prune`: what would go and what it costs, without training."""

import re
from typing import Any

import cv2
import pytest
import torch
from click.testing import CliRunner
from mmengine.config import Config
from omegaconf import OmegaConf
from real_data import COCO, YOLOX_NANO, needs
from short_runs import ROOT, tiny
from small import composed, randomise_norms

import ldt
from ldt.build import build_data
from ldt.cli.commands import ldt as command
from ldt.detectors.models import build, model_config
from ldt.runs.files import read_rows


def prune(*arguments):
    return CliRunner().invoke(command, ["prune", *map(str, arguments)])


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """An own config, weights, and data in KITTI's layout."""
    folder = tmp_path_factory.mktemp("own")
    data = build_data(tiny(folder))
    data.prepare_data()
    chosen: Any = OmegaConf.to_container(composed("detector=gfl_tiny").detector, resolve=True)
    model = model_config(chosen["config"], chosen["options"], n_classes=3, pretrained=False)
    pipeline = [{"type": "Resize", "scale": (128, 64), "keep_ratio": True}]
    Config({"model": model, "test_pipeline": pipeline}).dump(folder / "config.py")
    torch.manual_seed(0)
    detector = build(model)
    randomise_norms(detector, torch.Generator().manual_seed(0))
    torch.save({"state_dict": detector.state_dict()}, folder / "weights.pth")
    return folder / "config.py", folder / "weights.pth", data.folder()


@pytest.mark.slow
def test_it_tells_what_goes_and_what_it_costs(own, tmp_path):
    out = tmp_path / "pruned.ckpt"
    done = prune(*own, "--rate", "0.3", "--budget", "macs", "--images", "4", "--out", out)
    assert done.exit_code == 0, done.output
    assert "GMACs (-30." in done.output or "GMACs (-29." in done.output
    assert "backbone.layer1.0.conv1" in done.output
    assert "AP on" in done.output
    assert "AP50 on" in done.output
    pruned = ldt.load_pruned(out)
    assert pruned.dataset_meta["classes"] == ("Car", "Pedestrian", "Cyclist")
    ldt.export(out, tmp_path / "exported")


@pytest.mark.slow
def test_the_documented_command_prunes_a_pruned_detector_once_more(own, tmp_path):
    page = (ROOT / "docs/own_detector.md").read_text()
    (line,) = re.findall(r"(?m)^ldt prune (pruned.ckpt .*)$", page)
    places = {"pruned.ckpt": str(tmp_path / "pruned.ckpt"), "/data/mine": str(own[2])}
    places["smaller.ckpt"] = str(tmp_path / "smaller.ckpt")
    few = ("--images", "4", "--val", "0")
    assert prune(*own, "--rate", "0.3", "--out", places["pruned.ckpt"], *few).exit_code == 0
    done = prune(*(places.get(word, word) for word in line.split()), *few)
    assert done.exit_code == 0, done.output
    sizes = [
        sum(p.numel() for p in ldt.load_pruned(places[name]).parameters())
        for name in ("pruned.ckpt", "smaller.ckpt")
    ]
    assert sizes[1] < sizes[0]
    refused = prune(own[0], places["pruned.ckpt"], own[2], "--rate", "0.3", *few)
    assert f"ldt prune {places['pruned.ckpt']} DATA" in str(refused.exception)


@pytest.mark.slow
def test_sensitivity_is_drawn_and_told(own, tmp_path):
    options = ["--criterion", "l1", "--criterion", "random", "--rate", "0.5"]
    options += ["--images", "2", "--val", "2", "--out", str(tmp_path)]
    done = CliRunner().invoke(command, ["sensitivity", *map(str, own), *options])
    assert done.exit_code == 0, done.output
    rows = read_rows(tmp_path / "sensitivity.csv")
    assert list(rows[0]) == ["criterion", "group", "channels", "removed", "loss"]
    groups = {row["group"] for row in rows}
    assert len(rows) == 2 * 2 * len(groups)  # criteria, shares with 0, groups
    assert {row["loss"] for row in rows if not row["removed"]} == {rows[0]["loss"]}
    assert cv2.imread(str(tmp_path / "sensitivity.png")) is not None
    assert f"mean of {len(groups)} groups" in done.output
    assert "most sensitive" in done.output
    wrong = CliRunner().invoke(command, ["sensitivity", str(own[0]), str(own[2])])
    assert "a run), or CONFIG WEIGHTS DATA" in str(wrong.exception)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--rate": "30"}, "--rate=30.0; allowed: a number above 0 and below 1 (e.g. --rate=0.3)"),
        ({"--rate": "40%"}, "--rate='40%'; allowed: a number above 0 and below 1 (e.g. --rate=0.4"),
        ({"--target-ms": "5"}, "--target-ms is for --budget latency"),
        (
            {"--budget": "latency", "--target-ms": "5"},
            "give either --rate",
        ),
        ({"--budget": "time"}, "--budget='time'; choose params, macs, latency or flops"),
        ({"--criterion": "best"}, "--criterion best: choose from chip"),
        ({"--repair": "gn"}, "repair='gn'; allowed: none, bn, lstsq"),
        ({"--out": "/nowhere/pruned.ckpt"}, "there is no folder /nowhere"),
        ({"--out": "pruned.pth"}, "--out pruned.pth: the name of a checkpoint ends in .ckpt"),
        ({"config": "nowhere.py"}, "no file or folder at 'nowhere.py'"),
        ({"weights": "nowhere.pth"}, "no file or folder at 'nowhere.pth'"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_what_is_wrong_is_refused(own, change, message):
    given = {"config": own[0], "weights": own[1], "data": own[2], "--rate": "0.3", **change}
    places = [given.pop(name) for name in ("config", "weights", "data")]
    options = [part for option in given.items() for part in option]
    done = prune(*places, *options, "--val", "0", "--images", "4")
    assert done.exit_code == 1  # `exit_codes` gives it its number, in tests/test_cli.py
    assert getattr(done.exception, "refused", False)
    assert message in str(done.exception)


@pytest.mark.slow
@pytest.mark.long
@needs(YOLOX_NANO)
def test_published_weights_keep_some_of_their_precision():
    config = "mmdet::yolox/yolox_nano_8xb8-300e_coco.py"
    options = ("--rate", "0.05", "--budget", "macs", "--ranking", "global_per_cost")
    done = prune(config, YOLOX_NANO, COCO, *options, "--images", "16", "--val", "16")
    assert done.exit_code == 0, done.output
    before, after = (float(word) for word in done.output.split("retraining: ")[1].split()[::2][:2])
    assert before > 0.25
    assert 0.5 * before < after <= before + 0.02
