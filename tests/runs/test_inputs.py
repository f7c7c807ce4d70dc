"""What a run reads: its fingerprints, and a command that meets a run with other ones."""

import json
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from short_runs import SCENES, rows, summary, tiny
from small import composed

from ldt import experiment
from ldt.build import build_data, data_of, read_inputs
from ldt.data.coco import CocoDataModule
from ldt.data.kitti import KittiDataModule
from ldt.data.roadscenes import RoadScenesDataModule
from ldt.module import DetectorModule
from ldt.runs import files, inputs
from ldt.runs.identity import OtherRunError
from ldt.runs.run import open_run

IMAGES, LABELS = Path("training/image_2"), Path("training/label_2")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Twelve scenes in KITTI's layout, with ImageSets."""
    cache = tmp_path_factory.mktemp("scenes")
    options = {"train": 8, "val": 4, "height": 64, "width": 128}
    data = RoadScenesDataModule(cache=str(cache), scale=(128, 64), **options)
    return data.folder()


@pytest.fixture
def kitti(scenes, tmp_path):
    """A copy of them without ImageSets, to be changed."""
    root = tmp_path / "kitti"
    shutil.copytree(scenes / "training", root / "training")
    return root


def label_of(root, split="val"):
    name = KittiDataModule(root=str(root)).split_ids()[split][0]
    return root / LABELS / f"{name}.txt"


def kitti_config(root, *overrides):
    few = [o for o in SCENES if o.startswith(("dataset.scale", "dataset.workers"))]
    short = ["recipe.epochs=2", "recipe.batch_size=4", "method=none", "report.latency_runs=0"]
    more = ["report.figures=false", "trainer=cpu", "run_name=r"]
    return composed("dataset=kitti", f"dataset.root={root}", *few, *short, *more, *overrides)


# Fingerprints ---------------------------------------------------------------------------------


def print_of(root):
    return KittiDataModule(root=str(root)).fingerprint()


def test_the_place_of_the_data_is_not_among_the_inputs(kitti, tmp_path):
    before = print_of(kitti)
    shutil.copytree(kitti, tmp_path / "elsewhere")
    assert print_of(tmp_path / "elsewhere") == before
    assert (before["train"]["images"], before["val"]["images"]) == (10, 2)


def grow(root):
    for folder, suffix in ((IMAGES, ".png"), (LABELS, ".txt")):
        source = next((root / folder).glob(f"*{suffix}"))
        for name in ("900001", "900002", "900003"):
            shutil.copy(source, root / folder / f"{name}{suffix}")


def swap_splits(root):
    ids = KittiDataModule(root=str(root)).split_ids()
    ids["train"][0], ids["val"][0] = ids["val"][0], ids["train"][0]
    (root / "ImageSets").mkdir()
    for split, names in ids.items():
        (root / f"ImageSets/{split}.txt").write_text("\n".join(names))


def append_to_an_image(root):
    name = KittiDataModule(root=str(root)).split_ids()["train"][3]
    with (root / IMAGES / f"{name}.png").open("ab") as file:
        file.write(b"\0" * 7)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (grow, [r"training images: 10 there, 12 now \(2 more\)", r"3 now \(1 more\)"]),
        (
            swap_splits,
            ["training images: different images or a different order", "validation images"],
        ),
        (lambda root: label_of(root).write_text(""), ["validation annotations changed"]),
        (append_to_an_image, [r"training images: file sizes differ \([\d,]+ bytes there"]),
    ],
    ids=["grown", "split", "labels", "image"],
)
def test_what_differs_in_the_data_is_told(kitti, change, told):
    before = {"data": print_of(kitti), "model": {}, "weights": {}, "code": {}}
    change(kitti)
    found = inputs.changes(before, before | {"data": print_of(kitti)})
    assert len(found) == len(told)
    for line, expected in zip(found, told, strict=True):
        assert re.search(expected, line)


def coco_set(root, images=3, **changed):
    """A data set in COCO's format, whose images are files without content."""
    root.mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).mkdir()
        listed = [
            {"id": i + 1, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in range(images)
        ]
        for image in listed:
            (root / split / image["file_name"]).write_bytes(b"jpg")
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 3, 3], "area": 9}
        content = {"images": listed, "annotations": [box], "categories": [{"id": 1, "name": "a"}]}
        (root / f"{split}.json").write_text(json.dumps(content | changed))
    return root


def coco(root):
    annotations = {"train_ann": "train.json", "val_ann": "val.json"}
    images = {"train_img": "train", "val_img": "val"}
    return CocoDataModule(root=str(root), classes=("a",), **annotations, **images)


def test_annotations_of_coco_count_by_content_and_images_by_size(tmp_path):
    before = coco(coco_set(tmp_path / "a")).fingerprint()
    assert coco(coco_set(tmp_path / "b")).fingerprint() == before
    (tmp_path / "b/train/unlisted.jpg").write_bytes(b"x")
    assert coco(tmp_path / "b").fingerprint() == before
    (tmp_path / "b/train/1.jpg").write_bytes(b"other")
    after = coco(tmp_path / "b").fingerprint()
    assert after["val"] == before["val"]
    assert {k for k in after["train"] if after["train"][k] != before["train"][k]} == {
        "bytes",
        "sizes",
    }
    other = coco(coco_set(tmp_path / "c", annotations=[])).fingerprint()
    assert other["val"]["annotations"] != before["val"]["annotations"]
    (tmp_path / "b/train/2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"2\.jpg"):
        coco(tmp_path / "b").fingerprint()


def test_whatever_else_is_called_images_the_list_of_images_is_found(tmp_path):
    expected = coco(coco_set(tmp_path / "a")).fingerprint()["train"]["ids"]
    for number, info in enumerate(({"images": [7]}, {"about": 'the key "images": [', "n": 1})):
        root = coco_set(tmp_path / str(number), info=info)
        assert coco(root).fingerprint()["train"]["ids"] == expected
    (root / "train.json").write_text('{"images": [{"id": 1}')
    with pytest.raises(ValueError, match=r"train.json is not a JSON file"):
        coco(root).fingerprint()


@pytest.mark.slow
def test_the_general_fingerprint_sees_the_same_changes(kitti):
    general = super(KittiDataModule, KittiDataModule).fingerprint
    before = general(KittiDataModule(root=str(kitti)))
    assert general(KittiDataModule(root=str(kitti))) == before
    label_of(kitti).write_text("")
    after = general(KittiDataModule(root=str(kitti)))
    assert after["train"] == before["train"]
    assert {k for k in after["val"] if after["val"][k] != before["val"][k]} == {"annotations"}


def test_generated_data_count_by_options_and_version(tmp_path, monkeypatch):
    found = RoadScenesDataModule(cache=str(tmp_path), train=3).fingerprint()
    assert list(tmp_path.iterdir()) == []  # nothing is generated for it
    assert found["options"]["train"] == 3
    assert RoadScenesDataModule(cache="/elsewhere", train=3).fingerprint() == found
    monkeypatch.setattr("ldt.data.roadscenes_generator.VERSION", 6)
    record = {"model": {}, "weights": {}, "code": {}}
    now = RoadScenesDataModule(train=3).fingerprint()
    told = inputs.changes(record | {"data": found}, record | {"data": now})
    assert told == ["data: version 5 there, 6 now"]


def test_what_a_large_file_holds_is_remembered_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("LDT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(inputs, "LARGE", 10)
    file, calls = tmp_path / "large", []

    def find(path):
        calls.append(path.read_bytes())
        return len(calls)

    file.write_bytes(b"a" * 20)
    assert [inputs.remembered(file, "x", find) for _ in range(2)] == [1, 1]
    assert inputs.remembered(file, "y", find) == 2
    state = file.stat()
    time.sleep(0.01)
    file.write_bytes(b"b" * 20)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # as rsync does
    assert inputs.remembered(file, "x", find) == 3
    (tmp_path / "small").write_bytes(b"a")
    assert [inputs.remembered(tmp_path / "small", "x", find) for _ in range(2)] == [4, 5]
    monkeypatch.setenv("LDT_CACHE", str(file))  # no folder: nothing can be kept
    assert inputs.remembered(file, "x", find) == 6


# The model ------------------------------------------------------------------------------------

CONFIG = """
_base_ = './base.py'
custom_imports = dict(imports=['my_parts.head'], allow_failed_imports=False)
"""
BASE = """
model = dict(
    type='Any',
    neck=dict(type='FPN', out_channels={}),
    head=[dict(init_cfg=dict(type='Pretrained', checkpoint='backbone.pth'))],
)
"""


@pytest.fixture
def own_model(tmp_path, monkeypatch):
    """The configuration of a model of one's own, with a base, a module and weights."""
    (tmp_path / "base.py").write_text(BASE.format(8))
    (tmp_path / "own.py").write_text(CONFIG)
    (tmp_path / "my_parts").mkdir()
    (tmp_path / "my_parts/__init__.py").write_text("")
    (tmp_path / "my_parts/neck.py").write_text("x = 1\n")
    (tmp_path / "my_parts/head.py").write_text("import beside\n")
    (tmp_path / "beside.py").write_text("def later():\n    import further\n")
    (tmp_path / "further.py").write_text("x = 1\n")
    (tmp_path / "backbone.pth").write_bytes(b"one")
    (tmp_path / "weights.pth").write_bytes(b"one")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tiny(
        tmp_path,
        "detector=mmdet",
        "recipe=mmdet_1x",  # the config says how to build the model only
        "detector.pretrained=true",
        f"detector.config={tmp_path / 'own.py'}",
        f"detector.checkpoint={tmp_path / 'weights.pth'}",
    )
    for name in ("my_parts", "my_parts.head", "beside"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("base.py", BASE.format(16), "detector.config: neck.out_channels 8 there, 16 now"),
        ("my_parts/neck.py", "x = 2\n", "other code in my_parts.head"),
        ("beside.py", "x = 2\n", "other code in my_parts.head"),
        ("further.py", "x = 2\n", "other code in my_parts.head"),
        ("backbone.pth", "two", "other weights in model.head.0.init_cfg.checkpoint"),
        ("weights.pth", "two", "other weights in detector.checkpoint"),
    ],
)
def test_what_differs_in_the_model_is_told(own_model, tmp_path, file, content, told):
    plain = OmegaConf.to_container(own_model, resolve=True)
    data = build_data(own_model)
    before = read_inputs(plain, data)
    assert inputs.changes(before, read_inputs(plain, data)) == []
    (tmp_path / file).write_text(content)
    assert inputs.changes(before, read_inputs(plain, data)) == [told]
    (tmp_path / "weights.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"detector.checkpoint=.*weights.pth"):
        read_inputs(plain, data)


# A command that meets a run -------------------------------------------------------------------


def until_second_epoch(module, batch, index, plain=DetectorModule.training_step):
    return plain(module, batch, index) if module.current_epoch == 0 else 1 / 0


@pytest.fixture
def begun(kitti, tmp_path, monkeypatch):
    """A run on KITTI's layout that ended in its second epoch, and its data."""
    folder = tmp_path / "study" / "r"
    with monkeypatch.context() as patch:
        patch.setattr(DetectorModule, "training_step", until_second_epoch)
        with pytest.raises(ZeroDivisionError):
            experiment.run(kitti_config(kitti), folder)
    assert (folder / "last.ckpt").is_file()
    return folder, kitti


def content(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_a_run_neither_resumes_over_other_data_nor_shows_its_numbers_for_them(begun, tmp_path):
    folder, root = begun
    label = label_of(root, "train")
    text = label.read_text()
    label.write_text("")
    before, lock = content(folder), folder / files.LOCK
    changed = rf"{folder} .*training annotations changed.*study=<name> or run_name=<name>"
    with pytest.raises(OtherRunError, match=changed):
        experiment.run(kitti_config(root), folder)
    assert content(folder) | {lock: b""} == before | {lock: b""}
    label.write_text(text)  # restored: it goes on, also elsewhere
    shutil.move(root, tmp_path / "moved")
    experiment.run(kitti_config(tmp_path / "moved"), folder)
    record = json.loads((folder / files.INPUTS).read_text())
    assert record["places"] == [str(root), str(tmp_path / "moved")]
    assert yaml.safe_load((folder / files.CONFIG).read_text())["dataset"]["root"] == str(root)
    assert len(data_of(open_run(folder)).dataset("val")) == 2  # read where they are now
    grow(tmp_path / "moved")
    with pytest.raises(OtherRunError, match="training images: 10 there, 12 now"):
        experiment.run(kitti_config(tmp_path / "moved"), folder)
    assert math.isnan(experiment.run(kitti_config(tmp_path / "moved"), folder, in_sweep=True))
    assert summary(folder)["status"] == "finished"


@pytest.mark.slow
def test_a_finished_run_is_shown_where_its_data_are_gone(begun, caplog, capsys):
    folder, root = begun
    experiment.run(kitti_config(root), folder)
    label = next((root / "training/label_2").iterdir())
    text = label.read_text()
    label.unlink()  # data that are there in part have changed
    with pytest.raises((ValueError, FileNotFoundError)):
        experiment.run(kitti_config(root), folder)
    assert summary(folder)["status"] == "finished"
    label.write_text(text)
    shutil.rmtree(root)
    capsys.readouterr()
    assert experiment.run(kitti_config(root), folder) == rows(folder)[-1]["mAP"]
    assert "cannot be checked: no folder" in caplog.text
    assert "base" in capsys.readouterr().out
    record = json.loads((folder / files.INPUTS).read_text())
    for damaged in ({}, {"data": {}}, {**record, "model": []}):
        (folder / files.INPUTS).write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=r"inputs.json is damaged \(.*model"):
            experiment.run(kitti_config(root), folder)
    (folder / files.INPUTS).write_text(json.dumps({**record, "model": {"type": "Another"}}))
    with pytest.raises(OtherRunError, match=r"other inputs: detector.config: "):
        experiment.run(kitti_config(root), folder)  # the rest is compared without the data


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_resumed_and_recorded_then(begun, caplog, monkeypatch):
    folder, root = begun
    (folder / files.INPUTS).unlink()
    with pytest.raises(ValueError, match=r"one process only, not in 2.*trainer.devices=1"):
        inputs.check_processes(folder, 2)
    grow(root)
    with pytest.raises(OtherRunError, match="training images: 10 there, 12 now"):
        experiment.run(kitti_config(root), folder)  # split.json tells
    for file in (root / "training").rglob("90000?.*"):
        file.unlink()
    experiment.run(kitti_config(root), folder)
    assert "created by an earlier version" in caplog.text
    record = json.loads((folder / files.INPUTS).read_text())
    assert record["begun_by_earlier_version"]
    assert record["data"] == print_of(root)
    with pytest.raises(ValueError, match=r"resumed in one process only"):
        inputs.check_processes(folder, 2)
    (folder / files.INPUTS).unlink()
    experiment.run(kitti_config(root), folder)  # finished: shown, and nothing is claimed of it
    assert not (folder / files.INPUTS).exists()


@pytest.mark.slow
def test_before_the_first_checkpoint_the_data_may_be_mended(kitti, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(DetectorModule, "training_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            experiment.run(kitti_config(kitti), folder)
        first = json.loads((folder / files.INPUTS).read_text())
        label_of(kitti).write_text("")
        with pytest.raises(ZeroDivisionError):
            experiment.run(kitti_config(kitti), folder)
    assert json.loads((folder / files.INPUTS).read_text())["data"] == print_of(kitti)
    assert first["data"] != print_of(kitti)


@pytest.mark.slow
def test_a_shared_base_is_checked_too(kitti, tmp_path):
    shared = ("base=shared", "method=l1", "prune=oneshot", "prune.rate=0.3", "prune.images=4",
              "recipe.retrain_epochs=1", "recipe.epochs=1")  # fmt: skip
    study = tmp_path / "study"
    experiment.run(kitti_config(kitti, *shared), study / "one")
    (base,) = study.glob("base-*")
    assert json.loads((base / files.INPUTS).read_text())["data"] == print_of(kitti)
    again = experiment.run(kitti_config(kitti, *shared), study / "one")
    assert again == rows(study / "one")[-1]["mAP"]
    renamed = base.rename(study / "base-of-an-earlier-version")
    other = ("prune.rate=0.2",)
    experiment.run(kitti_config(kitti, *shared, *other), study / "two")
    assert list(study.glob("base-*")) == [renamed]  # found by what it is
    label_of(kitti).write_text("")
    with pytest.raises(OtherRunError, match=r"base-of-an-earlier-version .*annotations changed"):
        experiment.run(kitti_config(kitti, *shared, "prune.rate=0.1"), study / "three")
    assert not (study / "three/round-0.ckpt").exists()
