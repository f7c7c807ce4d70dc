"""Figures from the directory of a tiny run, by their command."""

import re
import shutil

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image
from short_runs import DRAWN, summary, tiny

from ldt import cli, experiment
from ldt.build import data_of, module_of
from ldt.criteria.ldt import LDTCriterion
from ldt.detectors.checkpoints import load_pruned
from ldt.evaluation import gradcam, neck_statistics, score_stability
from ldt.figures import NAMES, from_runs, paper
from ldt.figures.curve_data import panels
from ldt.runs.run import open_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run in a study, of one cut."""
    folder = tmp_path_factory.mktemp("figures")
    changed = ("prune=oneshot", "dataset.val=12", "prune.batch_size=4", *DRAWN)
    experiment.run(tiny(folder, *changed), folder / "study" / "tiny")
    return folder / "study" / "tiny"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a command saves, to be read."""
    kept: list[Figure] = []
    write = paper.save
    monkeypatch.setattr(
        paper, "save", lambda figure, path: (kept.append(figure), write(figure, path))
    )
    return kept


def main(name, *paths, out=None, **options):
    given = [f"--{key}={value}" for key, value in options.items()]
    cli.main(["figures", name, *map(str, paths), *([f"--out={out}"] if out else []), *given])


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_drawn_from_one_run(run, name, tmp_path, capsys):
    options = {"images": 8} if name == "stability" else {}
    main(name, run, out=tmp_path / f"{name}.png", **options)
    assert capsys.readouterr().out.split() == [str(tmp_path / f"{name}.png")]
    assert imread(tmp_path / f"{name}.png").std() > 0.01


@pytest.mark.parametrize("name", ["discriminants", "attention", "detections"])
def test_several_rounds_are_drawn_beside_each_other(run, name, tmp_path, drawn):
    main(name, run / "round-0.ckpt", run / "round-1.ckpt", out=tmp_path / "a.png", images=12)
    (figure,) = drawn
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert len(titles) >= 2
    assert len(set(titles)) == len(titles)


def test_without_out_the_pictures_of_the_run_and_of_the_study_are_written(run, tmp_path, capsys):
    study = tmp_path / "study"
    shutil.copytree(run.parent, study)
    copy = study / "tiny"
    for file in (copy / "pictures").iterdir():
        file.unlink()
    main("shrinking", copy)
    assert sorted(path.name for path in (copy / "pictures").iterdir()) == [
        "shrinking.gif",
        "shrinking.png",
    ]
    with Image.open(copy / "pictures" / "shrinking.gif") as film:
        assert film.n_frames > 2
    main("curves", study)
    assert [path.name for path in (study / "pictures").iterdir()] == ["curves.png"]
    main("detections", copy / "round-0.ckpt", copy / "round-1.ckpt", images=1)
    assert (study / "pictures" / "detections.png").stat().st_size > 0
    assert len(capsys.readouterr().out.split()) == 4


def test_the_curve_is_that_of_the_summary(run):
    (panel,) = panels([run.parent])
    base, last = summary(run)["rounds"]
    ((name, (point,)),) = panel.methods.items()
    assert (name, panel.metric) == ("LDT", "AP")
    assert (point.left, *point.values) == (last["params"] / 1e6, last["AP"])
    ((name, unpruned),) = panel.unpruned.items()
    assert name == "unpruned, LDT"
    assert (unpruned.left, *unpruned.values) == (base["params"] / 1e6, base["AP"])
    assert panels([run]) == [panel]


def test_runs_that_differ_in_more_than_seed_and_rate_are_not_pooled(run, tmp_path):
    for name, old, new in (
        ("seed", "\nseed: 0", "\nseed: 1"),
        ("uniform", "ranking: global", "ranking: uniform"),
    ):
        shutil.copytree(run, tmp_path / name)
        config, result = tmp_path / name / "config.yaml", tmp_path / name / "summary.json"
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new))
        seed = '"seed": 1' if name == "seed" else '"seed": 0'
        result.write_text(result.read_text().replace('"seed": 0', seed))
    (panel,) = panels([run, tmp_path / "seed"])
    assert [len(point.values) for point in panel.methods["LDT"]] == [2]
    (panel,) = panels([run, tmp_path])
    assert {name: len(points[0].values) for name, points in panel.methods.items()} == {
        "LDT (ranking=global)": 2,
        "LDT (ranking=uniform)": 1,
    }


def test_bars_are_the_channels_of_the_checkpoints(run, tmp_path, drawn):
    main("channels", run, out=tmp_path / "a.png")
    before, after = drawn[0].axes[0].containers
    for bars, round_ in ((before, 0), (after, 1)):
        detector = load_pruned(run / f"round-{round_}.ckpt")
        widths = [
            module.out_channels
            for name, module in detector.named_modules()
            if isinstance(module, torch.nn.Conv2d) and name.startswith(("backbone", "neck"))
        ]
        assert [bar.get_width() for bar in bars] == widths


def test_the_strongest_scale_is_chosen_and_any_can_be_asked_for(run, tmp_path, drawn):
    opened = open_run(run).at(0)
    loader = data_of(opened).probe_dataloader("val", 4)
    found = neck_statistics.neck_spaces(load_pruned(opened.checkpoint()), loader)
    best = max(found, key=lambda space: space.power).scale
    main("discriminants", run, out=tmp_path / "a.png")
    main("discriminants", run, out=tmp_path / "a.png", scale=3)
    for figure, scale in zip(drawn, (best, 3), strict=True):
        scatter, _, ratio, _ = figure.axes
        assert f"scale {scale}," in scatter.get_title()
        expected = np.sort(found[scale].ratio)[::-1]
        shown = ratio.lines[0].get_ydata()
        assert np.allclose(shown[np.isfinite(shown)], expected[np.isfinite(shown)], rtol=1e-4)


def test_utilities_are_the_criterions_own_batch_by_batch(run):
    opened = open_run(run).at(0)
    module, criterion = module_of(opened), LDTCriterion()
    loader = data_of(opened).calibration_dataloader(8, 4)
    found = score_stability.batch_utilities(module.adapter, criterion, loader, ["backbone", "neck"])
    assert [stage.utilities.shape[0] for stage in found] == [2] * len(found)
    names = dict(module.detector.named_modules())
    assert len({stage.name.rsplit(".", 2)[0] for stage in found}) == len(found)
    for stage in found:
        scores = criterion.channel_scores(names[stage.name]).numpy()
        weights = np.array(criterion.batch_images)[:, None]
        mean = (stage.utilities * weights).sum(0) / weights.sum()
        assert np.allclose(mean, scores)
        one, two = stage.utilities.argsort().argsort()
        assert stage.correlation == pytest.approx(np.corrcoef(one, two)[0, 1], abs=1e-2)


@pytest.mark.parametrize(
    ("name", "path", "told"),
    [
        ("channels", "nowhere", "give the directory of a run"),
        ("channels", "tiny/round-7.ckpt", "the run has round-0.ckpt, round-1.ckpt"),
        ("channels", "tiny/last.ckpt", "not the checkpoint of a round; give .*round-<t>.ckpt"),
        ("curves", "nowhere", "no study at"),
        ("curves", "tiny/pictures", "no finished run that pruned something"),
    ],
)
def test_what_is_no_run_is_told(run, name, path, told, capsys):
    assert re.search(told, refused(capsys, name, run.parent / path))


def refused(capsys, *arguments, code=2, **options):
    """The line with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(*arguments, **options)
    assert ended.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_wrong_numbers_are_told(run, tmp_path, capsys):
    for told, name, runs, options in (
        ("3 runs given; discriminants shows one or two", "discriminants", 3, {}),
        ("2 runs given; stability shows one: give a single RUN", "stability", 2, {}),
        ("--scale 9; the neck has the scales 0 to 3", "discriminants", 1, {"scale": 9}),
        ("'--images': 0 is not in the range x>=1", "detections", 1, {"images": 0}),
        ("a.doc: no format '.doc'; choose from .", "attention", 1, {"out": tmp_path / "a.doc"}),
        ("'nose' is not one of 'curves', 'discriminants'", "nose", 1, {}),
    ):
        assert told in refused(capsys, name, *[run] * runs, **options)
    line = refused(capsys, "stability", run, code=1, out=tmp_path / "a.png", images=1)
    assert "two batches to compare" in line


@pytest.mark.parametrize("name", ["detections", "discriminants"])
def test_a_config_that_is_not_allowed_is_refused_before_any_work(run, name, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("  batch_size: 4", "  batch_size: -4"))
    assert "batch_size=-4; allowed" in refused(capsys, name, tmp_path / "run")


def test_the_names_of_the_figures_are_those_that_can_be_drawn(capsys):
    assert ("curves", *paper.DRAWN) == NAMES
    cli.main(["figures", "--help"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert set(NAMES) <= set(listed)


def test_a_run_without_a_finished_round_is_told(run, tmp_path, capsys):
    shutil.copy(run / "config.yaml", tmp_path)
    assert "has no finished round" in refused(capsys, "shrinking", tmp_path)


# Attention ------------------------------------------------------------------------------------


def test_heat_is_the_gradient_weighted_sum_of_the_necks_maps(run):
    opened = open_run(run).at(0)
    detector = load_pruned(opened.checkpoint())
    torch.nn.init.constant_(detector.bbox_head.gfl_cls.bias, -1.0)  # sure enough to find something
    item = data_of(opened).val_dataloader().dataset[0]
    found, corners = gradcam.heatmap(detector, item, score=0.0)
    expected = _grad_cam(detector, item, len(corners))
    assert found.shape == expected.shape == (64, 128)
    assert found.min() >= 0
    assert found.max() == pytest.approx(1, abs=1e-5)
    assert np.abs(found - expected).max() < 1e-4
    assert not any(len(module._forward_hooks) for module in detector.modules())


def _grad_cam(detector, item, count):
    """Grad-CAM as its paper has it, of the same detections."""
    import cv2

    data = detector.data_preprocessor(
        {"inputs": [item["inputs"]], "data_samples": [item["data_samples"]]}, False
    )
    images = data["inputs"]
    with torch.no_grad():
        predicted = detector(**data, mode="predict")[0].pred_instances
    predicted = predicted[predicted.scores.argsort(descending=True)][:count]
    maps = [m.detach().requires_grad_() for m in detector.extract_feat(images)]
    logits = torch.cat([m[0].flatten(1) for m in detector.bbox_head(maps)[0]], 1)  # [G, cells]
    target = 0
    for label, score in zip(predicted.labels, predicted.scores, strict=True):
        target = target + logits[label][(logits[label].sigmoid() - score).abs().argmin()]
    target.backward()
    total = np.zeros(images.shape[2:])
    for m in maps:
        heat = (m.grad.mean((2, 3), keepdim=True) * m).sum(1)[0].detach().clamp(min=0).numpy()
        heat = (heat - heat.min()) / (1e-7 + np.ptp(heat))
        total += cv2.resize(heat, images.shape[:1:-1])
    return (total - total.min()) / np.ptp(total)


def test_without_detections_nothing_is_hot(run):
    opened = open_run(run).at(0)
    detector = load_pruned(opened.checkpoint())
    torch.nn.init.constant_(detector.bbox_head.gfl_cls.bias, -30.0)
    found, corners = gradcam.heatmap(detector, data_of(opened).val_dataloader().dataset[0])
    assert not found.any()
    assert corners.shape == (0, 4)


def test_a_detector_without_a_dense_head_is_refused(run):
    opened = open_run(run).at(0)
    detector = load_pruned(opened.checkpoint())
    del detector.bbox_head
    with pytest.raises(ValueError, match="available for single-stage detectors only"):
        gradcam.heatmap(detector, data_of(opened).val_dataloader().dataset[0])


def test_without_the_package_the_extra_is_named(run, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "pytorch_grad_cam", None)
    assert "pip install 'ldt[figures]'" in refused(capsys, "attention", run)


def test_views_and_scenes_show_the_same_images(run):
    opened = open_run(run)
    files = [opened.at(0).checkpoint(), opened.checkpoint()]
    views, scenes = (
        draw(files, data_of(opened), 2) for draw in (from_runs.views, from_runs.scenes)
    )
    for view, scene in zip(views, scenes, strict=True):
        assert np.array_equal(view.pixels, scene.pixels)
        assert np.array_equal(view.truth, scene.truth.corners)
        assert [looked.heat.shape for looked in view.attention] == [(64, 128)] * 2
