"""Detections in one's own images: what the run saw, in the images' own pixels."""

import contextlib
import io
import json
import os
import re
from collections import Counter
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pruned_files import data_of, pruned_checkpoint
from pycocotools.coco import COCO
from summaries import finished

import ldt
from ldt.cli import main
from ldt.data.videos import Video
from ldt.deployment.drawing import writing_video
from ldt.deployment.prediction import Predictor, find_images, predict

SIZES = {"wide.png": (64, 150), "tall.jpg": (333, 41), "tiny.bmp": (9, 7)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: Any) -> Any:
    return data_of(tmp_path_factory.mktemp("scenes"), scale=(100, 70))


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    file = tmp_path_factory.mktemp("run") / "round-1.ckpt"
    return pruned_checkpoint(file, data, "detector=gfl_tiny")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for name, size in SIZES.items():
        pixels = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
        assert cv2.imwrite(str(tmp_path / "images" / name), pixels)
    (tmp_path / "images/notes.txt").write_text("no image")
    return tmp_path / "images"


def command(*arguments):
    main(["predict", *map(str, arguments)])


@pytest.mark.slow
def test_an_image_is_seen_as_in_validation(data, checkpoint):
    detector, predictor = ldt.load_pruned(checkpoint), Predictor(checkpoint)
    for item in data.val_dataloader().dataset:
        batch = {"inputs": [item["inputs"]], "data_samples": [item["data_samples"]]}
        with torch.no_grad():
            expected = detector.test_step(batch)[0].pred_instances
        pixels, sample = predictor(item["data_samples"].img_path)
        found: Any = sample.pred_instances
        assert len(found) > 0
        assert torch.equal(found.bboxes, expected.bboxes)
        assert torch.equal(found.scores, expected.scores)
        assert pixels.shape == (*item["data_samples"].ori_shape, 3)


def test_a_folder_of_any_sizes_gives_pictures_and_cocos_format(checkpoint, folder, tmp_path):
    command(checkpoint, folder, "--out", tmp_path / "out", "--threshold", "0.5")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(tmp_path / "out/images.json")
        results = truth.loadRes(str(tmp_path / "out/predictions.json"))
    images = {truth.imgs[i]["file_name"]: truth.imgs[i] for i in truth.imgs}
    assert set(images) == {str(folder / name) for name in SIZES}
    for name, (height, width) in SIZES.items():
        about = images[str(folder / name)]
        assert (about["height"], about["width"]) == (height, width)
        found = results.loadAnns(results.getAnnIds(imgIds=[about["id"]]))
        assert found
        for one in found:
            x, y, w, h = one["bbox"]
            assert min(x, y) >= 0
            assert (x + w, y + h) <= (width + 1e-2, height + 1e-2)
            assert 0 <= one["score"] <= 1
    assert [c["name"] for c in truth.dataset["categories"]] == ["Car", "Pedestrian", "Cyclist"]
    pictures = sorted((tmp_path / "out/pictures").iterdir())
    drawn = {p.stem.partition("-")[2]: cv2.imread(str(p)) for p in pictures}
    assert {f"{stem}": p.shape[:2] for stem, p in drawn.items() if p is not None} == {
        name.partition(".")[0]: size for name, size in SIZES.items()
    }


def test_numbers_are_those_of_the_detector(checkpoint, folder, tmp_path):
    predict(checkpoint, [folder / "wide.png"], tmp_path / "out")
    _, sample = Predictor(checkpoint)(folder / "wide.png")
    found: Any = sample.pred_instances
    rows = json.loads((tmp_path / "out/predictions.json").read_text())
    boxes = torch.tensor([row["bbox"] for row in rows])
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    torch.testing.assert_close(corners, found.bboxes)
    assert [row["category_id"] - 1 for row in rows] == found.labels.tolist()
    assert [row["score"] for row in rows] == found.scores.tolist()
    assert {row["image_id"] for row in rows} == {1}
    names = dict(enumerate(ldt.load_pruned(checkpoint).dataset_meta["classes"], 1))
    assert all(row["category_name"] == names[row["category_id"]] for row in rows)


def test_boxes_above_the_threshold_are_drawn_and_no_others(checkpoint, folder, tmp_path):
    image = folder / "grey.png"
    assert cv2.imwrite(str(image), np.full((64, 64, 3), 128, np.uint8))
    changes = {}
    for name, threshold in (("all", 0.0), ("none", 1.0)):
        predict(checkpoint, [image], tmp_path / name, threshold)
        picture = cv2.imread(str(tmp_path / name / "pictures/0001-grey.jpg"))
        assert picture is not None
        changes[name] = np.abs(picture.astype(int) - 128).mean()
    assert changes["none"] < 1
    assert changes["all"] > 5


def test_images_of_a_folder_come_by_name_and_files_as_given(folder):
    names = [file.name for file in find_images([folder])]
    assert names == sorted(SIZES)
    assert find_images([folder / "wide.png", folder / "tall.jpg"])[0].name == "wide.png"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{folder}/gone.png"], 2, "no image or folder at .*gone.png"),
        (["{empty}"], 2, "no image in the folder .*empty.*looked for: .jpg"),
        (["{folder}/notes.txt"], 1, "cannot read the image .*notes.txt"),
        (["{folder}", "--threshold", "30"], 2, "'--threshold': 30.0 is not in the range 0<=x<=1"),
    ],
)
def test_wrong_arguments_end_the_command_with_a_line(
    arguments, code, message, checkpoint, folder, tmp_path, capsys
):
    (tmp_path / "empty").mkdir()
    given = [text.format(folder=folder, empty=tmp_path / "empty") for text in arguments]
    found, line = ended(capsys, checkpoint, *given, "--out", tmp_path / "out")
    assert found == code
    assert re.search(message, line)


def ended(capsys, *arguments):
    """Exit code of a command that fails, and its line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command(*arguments)
    (line,) = capsys.readouterr().err.splitlines()
    return ended.value.code, line


def test_images_that_cannot_be_read_are_named_and_the_others_written(
    checkpoint, folder, tmp_path, capsys
):
    mixed, out = tmp_path / "mixed", tmp_path / "out"
    mixed.mkdir()
    (mixed / "._a.png").write_text("Mac OS X AppleDouble")
    (mixed / "cut.png").write_bytes((folder / "wide.png").read_bytes()[:60])
    assert cv2.imwrite(str(mixed / "thin.png"), np.zeros((1, 2000, 3), np.uint8))
    (mixed / "wide.png").write_bytes((folder / "wide.png").read_bytes())
    code, line = ended(capsys, checkpoint, mixed, "--out", out)
    assert code == 1
    assert "3 of 4 files are left out; the results of the other 1 images are in" in line
    assert all(name in line for name in ("._a.png", "cut.png", "thin.png of 2000x1 pixels"))
    images = json.loads((out / "images.json").read_text())["images"]
    assert [image["file_name"] for image in images] == [str(mixed / "wide.png")]
    assert {row["image_id"] for row in json.loads((out / "predictions.json").read_text())} == {4}
    code, line = ended(capsys, checkpoint, mixed / "wide.png", "--out", out, "--max-pixels", "9")
    assert (code, "type --max-pixels " in line) == (1, True)


def test_a_threshold_is_a_score(checkpoint, folder, tmp_path):
    with pytest.raises(ValueError, match=r"threshold=30.0; allowed: a score from 0 to 1"):
        predict(checkpoint, [folder], tmp_path / "out", threshold=30.0)


def test_what_is_no_checkpoint_of_ours_is_told(folder, tmp_path, capsys):
    torch.save({"state_dict": {}}, tmp_path / "foreign.pth")
    (tmp_path / "text.pth").write_text("x = 1")
    for name, message in (
        ("foreign.pth", "was not written by ldt"),
        ("text.pth", "is damaged or not a checkpoint"),
        ("gone", "no checkpoint at"),
    ):
        found, line = ended(capsys, tmp_path / name, folder, "--out", tmp_path / "out")
        assert found == 2
        assert message in line
        assert len(line) < 200
    assert not (tmp_path / "out").exists()


def test_a_pattern_is_the_images_that_it_matches(folder):
    names = [file.name for file in find_images(str(folder / "*.[pj]*g"))]
    assert names == ["tall.jpg", "wide.png"]
    assert find_images(str(folder / "*")) == find_images(folder)
    with pytest.raises(FileNotFoundError, match=r"no image or folder at .*\*.gif"):
        find_images(str(folder / "*.gif"))


def test_what_may_never_end_is_not_read(folder, tmp_path):
    image = folder / "wide.png"
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "image.png").write_bytes(image.read_bytes())
    assert find_images(tmp_path) == find_images(str(tmp_path / "*")) == [tmp_path / "image.png"]
    with pytest.raises(ValueError, match=r"pipe.png is a pipe or a device, not an image"):
        find_images([image, tmp_path / "pipe.png"])


# What is told ---------------------------------------------------------------------------------


def told(checkpoint, images, out, **options):
    lines = []
    predict(checkpoint, images, out, tell=lines.append, **options)
    return lines, json.loads((out / "predictions.json").read_text())


def test_what_is_told_are_the_counts_above_the_threshold(checkpoint, folder, tmp_path):
    lines, rows = told(checkpoint, folder, tmp_path / "out", threshold=0.005)
    above = Counter(row["category_name"] for row in rows if row["score"] > 0.005)
    listed = ", ".join(f"{name} {count}" for name, count in above.most_common())
    assert re.fullmatch(r"3 images, \d\.\d{3} s each \(median\)", lines[0])
    assert lines[1] == f"{above.total()} boxes above threshold=0.005: {listed}"


def test_what_to_type_where_nothing_is_above_the_threshold(checkpoint, folder, tmp_path, capsys):
    command(checkpoint, folder, "--out", tmp_path / "out", "--threshold", "1")
    line = capsys.readouterr().out
    best = max(row["score"] for row in json.loads((tmp_path / "out/predictions.json").read_text()))
    assert f"nothing above --threshold 1: the best score is {best:.3g} (" in line
    (typed,) = re.findall(r"type --threshold (\S+)", line)
    lines, _ = told(checkpoint, folder, tmp_path / "again", threshold=float(typed))
    assert "boxes above" in lines[1]


# Videos ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Five frames, each of another brightness."""
    file = tmp_path_factory.mktemp("videos") / "clip.avi"
    with writing_video(file, rate=10) as add:
        for number in range(5):
            pixels = np.random.default_rng(number).integers(0, 50, (64, 128, 3), dtype=np.uint8)
            add(pixels + np.uint8(50 * number))
    return file


@pytest.mark.slow
def test_frames_of_a_video_are_images(checkpoint, clip, folder, tmp_path):
    arguments = {"every": 2, "frames": "pictures"}
    lines, rows = told(checkpoint, [folder / "wide.png", clip], tmp_path / "out", **arguments)
    assert lines[0].startswith("4 images")
    about = json.loads((tmp_path / "out/images.json").read_text())["images"]
    assert [(image["id"], image.get("frame")) for image in about] == [
        (1, None), (2, 0), (3, 2), (4, 4)
    ]  # fmt: skip
    for number, (frame, pixels) in enumerate(Video(clip, 2, 10**6), 2):
        cv2.imwrite(str(tmp_path / f"{frame}.png"), pixels)
        found: Any = Predictor(checkpoint)(tmp_path / f"{frame}.png")[1].pred_instances
        scores = [row["score"] for row in rows if row["image_id"] == number]
        assert scores == found.scores.tolist()
        assert (tmp_path / f"out/pictures/{number:04d}-clip.jpg").is_file()


def test_a_video_becomes_a_video(checkpoint, clip, tmp_path):
    told(checkpoint, clip, tmp_path / "out", every=2, threshold=0.0)
    (file,) = (tmp_path / "out/pictures").iterdir()
    drawn = Video(file, 1, 10**6)
    assert (file.name, drawn.rate) == ("0001-clip.mp4", 5)
    frames = [pixels for _, pixels in drawn]
    assert [frame.shape for frame in frames] == [(64, 128, 3)] * 3
    plain = [pixels for _, pixels in Video(clip, 2, 10**6)]
    assert all(np.abs(a.astype(int) - b).max() > 100 for a, b in zip(frames, plain, strict=True))


def test_a_video_opens_no_other_file(clip, tmp_path):
    list_of_files = tmp_path / "list.mp4"
    list_of_files.write_text(f"ffconcat version 1.0\nfile '{clip.name}'\n")
    (tmp_path / clip.name).write_bytes(clip.read_bytes())
    with pytest.raises(ValueError, match=r"cannot read the video .*list.mp4"):
        Video(list_of_files, 1, 10**6)
    with pytest.raises(ValueError, match=r"clip.avi has 128x64 pixels, more than"):
        Video(clip, 1, 100)


# Runs -----------------------------------------------------------------------------------------


@pytest.fixture
def run(checkpoint, tmp_path):
    """A finished run whose last round, the first, is the checkpoint."""
    study = tmp_path / "study"
    study.mkdir()
    finished(study, "one")
    (study / "one/round-1.ckpt").write_bytes(checkpoint.read_bytes())
    return study / "one"


@pytest.mark.slow
def test_a_run_is_its_last_round(run, folder, tmp_path):
    command(run, folder, "--out", tmp_path / "of-run")
    command(run / "round-1.ckpt", folder, "--out", tmp_path / "of-file")
    one, other = (tmp_path / name / "predictions.json" for name in ("of-run", "of-file"))
    assert one.read_text() == other.read_text()
    main(["export", str(run), str(tmp_path / "exported")])
    assert (tmp_path / "exported/config.py").is_file()


def test_a_study_is_refused_with_the_names_of_its_runs(run, folder, tmp_path, capsys):
    line = f"error: {run.parent} is a study; give one of its runs, {run.parent}/<run>: one"
    for arguments in (
        ["predict", run.parent, folder],
        ["export", run.parent, tmp_path / "out"],
        ["export", run.parent, tmp_path / "out.onnx", "--format", "onnx"],
        ["benchmark", run.parent],
        ["layers", run.parent],
        ["figures", "channels", run.parent],
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        assert ended.value.code == 2
        assert capsys.readouterr().err.splitlines() == [line]
