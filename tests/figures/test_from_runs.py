"""The pictures of a run made of real checkpoints."""

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mmengine.structures import InstanceData
from pruned_files import write_cut_run
from summaries import row, summary

from ldt.data.roadscenes import RoadScenesDataModule
from ldt.figures import from_runs


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
    return folder, write_cut_run(folder)


def written(folder):
    return sorted(path.name for path in (folder / "pictures").glob("*"))


def link(run, target):
    for file in run.glob("*.ckpt"):
        (target / file.name).symlink_to(file)
    return target


@pytest.mark.slow
def test_a_run_is_drawn(run, data, tmp_path):
    folder = link(run[0], tmp_path)
    from_runs.draw_run(summary(), folder, data, pictures=2)
    assert written(folder) == [
        "channels.png",
        "detections.png",
        "metric_vs_params.png",
        "shrinking.png",
    ]
    for name in written(folder):
        assert matplotlib.image.imread(folder / "pictures" / name).std() > 0


@pytest.mark.slow
def test_without_pictures_no_image_is_read(run, data, tmp_path, monkeypatch):
    folder = link(run[0], tmp_path)
    for name in ("probe_dataloader", "val_dataloader"):
        monkeypatch.setattr(data, name, None)
    from_runs.draw_run(summary(ldt=True), folder, data, pictures=0)
    assert written(folder) == ["channels.png", "metric_vs_params.png", "shrinking.png"]


@pytest.mark.slow
def test_the_base_of_a_run_with_ldt_shows_its_discriminants(run, data, tmp_path, caplog):
    (tmp_path / "round-0.ckpt").symlink_to(run[0] / "round-0.ckpt")
    from_runs.draw_run(summary(row(0), ldt=True), tmp_path, data, pictures=1)
    assert written(tmp_path) == ["detections.png", "discriminants.png", "metric_vs_params.png"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "images"), [(None, 5), (1.0, 5), (0.6, 3), (2, 2), (0, 1), (1000, 256)]
)
def test_discriminants_are_of_no_more_images_than_a_validation(
    run, data, tmp_path, monkeypatch, limit, images
):
    (tmp_path / "round-0.ckpt").symlink_to(run[0] / "round-0.ckpt")
    asked = []

    def spaces(detector, batches, *_, **__):
        asked.append(len(list(batches)))
        raise ValueError("too few objects")

    monkeypatch.setattr(from_runs, "neck_spaces", spaces)
    monkeypatch.setattr(from_runs, "draw_detections", lambda *_: Figure())
    monkeypatch.setattr(data, "val_batch_size", 1)
    monkeypatch.setattr(data, "probe_dataloader", lambda *_: range(1000))
    from_runs.draw_run(summary(row(0), ldt=True), tmp_path, data, pictures=1, limit=limit)
    assert asked == [images]


@pytest.mark.slow
def test_too_few_objects_for_discriminants_are_told(run, data, tmp_path, caplog, monkeypatch):
    (tmp_path / "round-0.ckpt").symlink_to(run[0] / "round-0.ckpt")
    nothing = data.val_dataloader().dataset[0]
    nothing["data_samples"].gt_instances = nothing["data_samples"].gt_instances[:1]
    batch = {"inputs": [nothing["inputs"]], "data_samples": [nothing["data_samples"]]}
    monkeypatch.setattr(data, "probe_dataloader", lambda *_: [batch])
    from_runs.draw_run(summary(row(0), ldt=True), tmp_path, data, pictures=1)
    assert written(tmp_path) == ["detections.png", "metric_vs_params.png"]
    assert "no discriminants.png" in caplog.text
    assert "use more images" in caplog.text


@pytest.mark.slow
def test_a_run_that_pruned_nothing_needs_one_checkpoint_and_shows_no_channels(run, data, tmp_path):
    (tmp_path / "round-0.ckpt").symlink_to(run[0] / "round-0.ckpt")
    from_runs.draw_run(summary(row(0)), tmp_path, data, pictures=1)
    assert written(tmp_path) == ["detections.png", "metric_vs_params.png"]


def test_the_drawn_channels_are_those_of_the_pruned_network(run):
    folder, pruned = run
    kept = from_runs.channels(folder / "round-1.ckpt")
    convolutions = {
        name: module.out_channels
        for name, module in pruned.named_modules()
        if isinstance(module, torch.nn.Conv2d) and name.startswith(("backbone", "neck"))
    }
    assert list(kept.items()) == list(convolutions.items())
    assert sum(kept.values()) < sum(from_runs.channels(folder / "round-0.ckpt").values())


@pytest.mark.parametrize("asked", [1, 3, 5, 50])
def test_scenes_are_spread_over_the_split_and_hold_its_annotations(run, data, asked):
    scenes = from_runs.scenes([run[0] / "round-0.ckpt"], data, asked)
    count = min(asked, 5)
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
    found = from_runs._detect(Echo(), items)
    for item, boxes in zip(items, found, strict=True):
        scene = from_runs._scene(item, [boxes])
        assert np.array_equal(scene.truth.corners, scene.found[0].corners)
        assert np.array_equal(scene.truth.labels, scene.found[0].labels)


def test_padding_is_not_shown(data):
    padded = RoadScenesDataModule(
        cache=data.cache, train=1, val=5, height=64, width=128, scale=(192, 192), pad="square"
    )
    padded.setup("fit")
    item, plain = padded.val_dataloader().dataset[0], data.val_dataloader().dataset[0]
    assert item["inputs"].shape == (3, 192, 192)
    assert np.array_equal(from_runs._scene(item, []).pixels, from_runs._scene(plain, []).pixels)
