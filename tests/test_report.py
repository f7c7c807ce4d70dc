"""Laws of the tables, and the pictures of a run made of real checkpoints."""

import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from ldt import report
from ldt.data.kitti import RoadScenesDataModule
from ldt.detectors import build, evaluating, model_config, raw_forward
from ldt.pruning import structure
from ldt.pruning.graph import PruningGraph
from ldt.records import write_json

NAN = float("nan")
OPTIONS = {
    "backbone": {"depth": 18, "base_channels": 8, "frozen_stages": -1, "norm_eval": False},
    "neck": {
        "in_channels": [8, 16, 32, 64],
        "out_channels": 16,
        "start_level": 0,
        "num_outs": 4,
        "add_extra_convs": False,
    },
    "bbox_head": {
        "in_channels": 16,
        "feat_channels": 16,
        "stacked_convs": 1,
        "norm_cfg": {"type": "GN", "num_groups": 4, "requires_grad": True},
        "anchor_generator": {"octave_base_scale": 4, "strides": [4, 8, 16, 32]},
    },
}


def row(round_, **changed):
    known = {
        "round": round_,
        "AP": 0.4 - 0.01 * round_,
        "AP50": 0.7,
        "mAP": 0.69,
        "params": 630_000 // (1 + round_),
        "multiply_adds": 410_000_000,
        "rate": 0.5 if round_ else 0.0,
        "latency_ms": 12.34,
        "threads": 2,
        "device": "cpu",
    }
    return known | changed


def summary(*rows, **changed):
    rows = list(rows or (row(0), row(1)))
    known = {
        "status": "finished",
        "run": "roadscenes-gfl_tiny-ldt-params0.5-s0",
        "study": "default",
        "detector": "gfl_tiny",
        "dataset": "roadscenes",
        "method": "ldt",
        "metric": "AP",
        "seed": 0,
        "input_size": [128, 256],
        "plan": {"rate": 0.5, "rounds": len(rows) - 1, "budget": "params"},
        "rounds": rows,
        "checkpoint": f"round-{len(rows) - 1}.ckpt",
    }
    return known | changed


def finished(study, name, **changed):
    (study / name).mkdir()
    write_json(study / name / "summary.json", summary(run=name, **changed))


# differences ----------------------------------------------------------------------------------

NESTED = {"seed": 0, "ldt": {"alpha": 5e-4, "terms": [1, 2], "off": None}, "empty": {}}
CHANGED = {"seed": 1, "ldt": {"alpha": 5e-4, "terms": [2, 1]}, "prune": {"rate": {"a": 0.5}}}
CASES = [
    ({}, {}),
    (NESTED, NESTED),
    (NESTED, CHANGED),
    ({}, NESTED),
    ({"a": {"b": 1}}, {"a": None}),
    ({"a": {"b": 1}}, {"a": {}}),
    ({"a": None}, {}),
]


@pytest.mark.parametrize(("old", "new"), CASES)
def test_differences_are_symmetric_sorted_and_empty_only_between_equals(old, new):
    found = report.differences(old, new)
    assert found == [(key, there, now) for key, now, there in report.differences(new, old)]
    assert [key for key, *_ in found] == sorted(key for key, *_ in found)
    assert bool(found) == (old != new)


def test_differences_name_the_leaves():
    assert report.differences(NESTED, CHANGED) == [
        ("empty", {}, report.NOT_SET),
        ("ldt.off", None, report.NOT_SET),
        ("ldt.terms", [1, 2], [2, 1]),
        ("prune.rate.a", report.NOT_SET, 0.5),
        ("seed", 0, 1),
    ]


# print_run ------------------------------------------------------------------------------------


def cells(text, first):
    """The cells of the line that starts with a word."""
    (line,) = (line for line in text.splitlines() if line.split()[:1] == [first])
    return line.split()


def test_a_run_is_printed_with_one_line_a_round(tmp_path, capsys):
    report.print_run(summary(row(0), row(1), row(2)), tmp_path)
    text = capsys.readouterr().out
    assert cells(text, "base") == ["base", "0.400", "0.700", "0.690", "0.630", "0.410", "12.3",
                                   "0.0"]  # fmt: skip
    assert cells(text, "2") == ["2", "0.380", "0.700", "0.690", "0.210", "0.410", "12.3", "50.0"]
    for part in ("AP *", "128x256", "2 threads, cpu", "parameters removed (%)"):
        assert part in text
    assert str(tmp_path / "round-2.ckpt") in text.splitlines()[-1]


def test_what_was_not_measured_is_a_dash(tmp_path, capsys):
    bare = {"round": 1, "AP": NAN, "params": 1_000_000, "multiply_adds": 2e9, "rate": 0.5}
    report.print_run(summary(row(0), bare), tmp_path)
    assert cells(capsys.readouterr().out, "1") == ["1", "-", "-", "-", "1.000", "2.000", "-",
                                                   "50.0"]  # fmt: skip


def test_any_metric_can_be_the_headline(tmp_path, capsys):
    report.print_run(summary(row(0, AP75=0.321), metric="AP75"), tmp_path)
    text = capsys.readouterr().out
    assert "AP75 *" in text
    assert "AP *" not in text
    assert "0.321" in cells(text, "base")


def test_long_paths_and_markup_are_printed_whole(tmp_path, capsys):
    folder = tmp_path / ("[bold]" + "x" * 150) / ("y" * 150)
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "channels.png").touch()
    report.print_run(summary(run="a [red]b"), folder)
    lines = capsys.readouterr().out.splitlines()
    assert any(str(folder / "pictures" / "channels.png") in line for line in lines)
    assert any("a [red]b" in line for line in lines)


# Studies --------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path):
    finished(tmp_path, "a-finished")
    finished(tmp_path, "b-nan", rounds=[row(0), row(1, AP=NAN)])
    for name in ("c-failed", "d-corrupt", "e-partial", "f-running", "notes"):
        (tmp_path / name).mkdir()
    failure = {"status": "failed", "error": "ValueError: rate [x] too high\nmore lines"}
    write_json(tmp_path / "c-failed" / "summary.json", failure)
    (tmp_path / "d-corrupt" / "summary.json").write_text('{"status": "fini')
    (tmp_path / "e-partial" / "summary.json").write_text('{"status": "finished", "rounds": []}')
    (tmp_path / "f-running" / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "table.csv").touch()
    return tmp_path


def test_a_study_counts_its_failures_and_prints_one_line_a_run(study, capsys):
    assert report.print_study(study) == 3
    lines = capsys.readouterr().out.splitlines()
    for name in ("a-finished", "b-nan", "c-failed", "d-corrupt", "e-partial", "f-running"):
        assert sum(line.strip().startswith(name) for line in lines) == 1
    text = "\n".join(lines)
    numbers = "0.400 0.390 0.315 0.410 at 128x256 50.0 params"
    assert " ".join(cells(text, "a-finished")) == f"a-finished finished AP {numbers}"
    assert cells(text, "b-nan")[3:5] == ["0.400", "-"]
    assert "rate [x] too high" in text
    assert "more lines" not in text
    assert str(study / "d-corrupt" / "summary.json") in text
    assert "notes" not in text
    assert lines[-1] == "2 finished, 3 failed, 1 unfinished"


def test_a_study_without_failures_returns_zero(tmp_path):
    finished(tmp_path, "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.yaml").touch()
    assert report.print_study(tmp_path) == 0
    assert report.print_study(tmp_path / "b") == 0


def test_a_missing_study_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        report.print_study(tmp_path / "nowhere")


def test_rows_of_a_study_have_the_run_its_last_round_and_its_base(study):
    rows = report.load_study(study)
    assert [r["status"] for r in rows] == ["finished"] * 2 + ["failed"] * 3 + ["unfinished"]
    first = rows[0]
    assert first["run"] == "a-finished"
    assert (first["asked_rate"], first["rounds"], first["budget"]) == (0.5, 1, "params")
    assert {key: first[key] for key in row(1)} == row(1)
    assert {key: first[f"base_{key}"] for key in row(0)} == row(0)
    assert math.isnan(rows[1]["AP"])


@pytest.mark.parametrize("text", ["", "[]", "null", "7", "{", '{"status": "failed"}', "\x00"])
def test_no_summary_however_damaged_stops_the_others(tmp_path, text):
    finished(tmp_path, "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "summary.json").write_text(text)
    good, bad = report.load_study(tmp_path)
    assert good["status"] == "finished"
    assert bad["status"] == "failed"
    assert str(tmp_path / "b" / "summary.json") in bad["error"]


# Pictures -------------------------------------------------------------------------------------


def checkpoint(detector, model, path):
    about = {
        "model": model,
        "classes": ["Car", "Pedestrian", "Cyclist"],
        "structure": structure.record(detector),
    }
    state = {f"detector.{key}": value for key, value in detector.state_dict().items()}
    torch.save({"state_dict": state, "ldt": about}, path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    module = RoadScenesDataModule(
        cache=str(tmp_path_factory.mktemp("scenes")), train=1, val=5, height=64, width=128,
        scale=(192, 96),
    )  # fmt: skip
    module.prepare_data()
    module.setup("fit")
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with the checkpoints of an untrained detector before and after a real cut."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = model_config("mmdet::gfl/gfl_r50_fpn_1x_coco.py", OPTIONS, 3, pretrained=False)
    detector = build(model)
    checkpoint(detector, model, folder / "round-0.ckpt")
    with evaluating(detector):
        graph = PruningGraph(detector, raw_forward, torch.zeros(1, 3, 64, 128), ["backbone"])
        graph.remove({n: list(range(g.size // 2)) for n, g in graph.groups.items() if g.parts == 1})
    checkpoint(detector, model, folder / "round-1.ckpt")
    return folder, detector


def written(folder):
    return sorted(path.name for path in (folder / "pictures").glob("*"))


def link(run, target):
    for file in run.glob("*.ckpt"):
        (target / file.name).symlink_to(file)
    return target


def test_a_run_is_drawn(run, data, tmp_path):
    folder = link(run[0], tmp_path)
    report.draw_run(summary(), folder, data, pictures=2)
    assert written(folder) == ["channels.png", "detections.png", "map_vs_params.png"]
    for name in written(folder):
        assert matplotlib.image.imread(folder / "pictures" / name).std() > 0


def test_no_pictures_leaves_out_the_detections_only(run, data, tmp_path):
    folder = link(run[0], tmp_path)
    report.draw_run(summary(), folder, data, pictures=0)
    assert written(folder) == ["channels.png", "map_vs_params.png"]


def test_a_run_that_pruned_nothing_needs_one_checkpoint_and_shows_no_channels(run, data, tmp_path):
    (tmp_path / "round-0.ckpt").symlink_to(run[0] / "round-0.ckpt")
    report.draw_run(summary(row(0)), tmp_path, data, pictures=1)
    assert written(tmp_path) == ["detections.png", "map_vs_params.png"]


def test_a_negative_number_of_pictures_is_refused(run, data, tmp_path):
    with pytest.raises(ValueError, match=r"report\.pictures=-1"):
        report.draw_run(summary(), tmp_path, data, pictures=-1)


def test_the_drawn_channels_are_those_of_the_pruned_network(run):
    folder, pruned = run
    kept = report._channels(folder / "round-1.ckpt")
    convolutions = {
        name: module.out_channels
        for name, module in pruned.named_modules()
        if isinstance(module, torch.nn.Conv2d) and name.startswith(("backbone", "neck"))
    }
    assert list(kept.items()) == list(convolutions.items())
    assert sum(kept.values()) < sum(report._channels(folder / "round-0.ckpt").values())


@pytest.mark.parametrize("pictures", [1, 3, 5, 50])
def test_scenes_are_spread_over_the_split_and_hold_its_annotations(run, data, pictures):
    scenes = report._scenes([run[0] / "round-0.ckpt"], data, pictures)
    count = min(pictures, 5)
    assert len(scenes) == count
    dataset = data.val_dataloader().dataset
    places = np.array([_place(scene, dataset) for scene in scenes])
    assert (np.diff(places) > 0).all()
    assert np.abs((places + 0.5) / 5 - (np.arange(count) + 0.5) / count).max() <= 0.1 + 1e-9


def _place(scene, dataset):
    """The index of the image that a scene shows, told by its annotations."""
    for index in range(len(dataset)):
        sample = dataset[index]["data_samples"]
        truth = sample.gt_instances.bboxes.tensor.numpy()
        if np.array_equal(scene.truth.corners, truth):
            assert scene.size == sample.ori_shape[:2] == (64, 128)
            assert scene.pixels.shape == (96, 192, 3)
            assert len(scene.ignored) == len(sample.ignored_instances)
            return index
    raise AssertionError("no such annotations in the split")


class Echo(torch.nn.Module):
    """A detector that finds the ground truth."""

    def data_preprocessor(self, batch, training):
        assert not training
        return batch

    def forward(self, inputs, data_samples, mode):
        for sample in data_samples:
            truth = sample.gt_instances
            sample.pred_instances = InstanceData(
                bboxes=truth.bboxes.tensor, labels=truth.labels, scores=torch.ones(len(truth))
            )
        return data_samples


def test_detections_and_truth_share_their_coordinates(data):
    items = [data.val_dataloader().dataset[i] for i in range(5)]
    found = report._detect(Echo(), items)
    for item, boxes in zip(items, found, strict=True):
        scene = report._scene(item, [boxes])
        assert np.array_equal(scene.truth.corners, scene.found[0].corners)
        assert np.array_equal(scene.truth.labels, scene.found[0].labels)


def test_padding_is_not_shown(data):
    padded = RoadScenesDataModule(
        cache=data.cache, train=1, val=5, height=64, width=128, scale=(192, 192), pad="square"
    )
    padded.setup("fit")
    item, plain = padded.val_dataloader().dataset[0], data.val_dataloader().dataset[0]
    assert item["inputs"].shape == (3, 192, 192)
    assert np.array_equal(report._scene(item, []).pixels, report._scene(plain, []).pixels)


def test_summaries_survive_the_round_trip_through_json(tmp_path, capsys):
    told = summary(row(0), row(1, AP=NAN))
    report.print_run(told, Path("runs/x"))
    first = capsys.readouterr().out
    report.print_run(json.loads(json.dumps(told)), Path("runs/x"))
    assert capsys.readouterr().out == first
