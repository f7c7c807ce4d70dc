"""Laws of the synthetic road scenes: determinism, tight boxes, balance, all-or-nothing writing."""

import hashlib
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from forked import PATIENCE

from ldt.data import roadscenes_generator as roadscenes
from ldt.data.roadscenes_cast import CAR_SHAPES, Body, cast, draw_actor
from ldt.data.roadscenes_draw import Camera, Canvas, Pose
from ldt.data.roadscenes_generator import CLASSES, RoadScenes, folder_name, outline, render, write
from ldt.data.roadscenes_scenery import LIGHTS, PROPS, develop

SMALL = RoadScenes(train=5, val=3)


@pytest.fixture(scope="module")
def sample():
    """160 scenes with the default options: [(image, labels)]."""
    return [render(RoadScenes(), index) for index in range(160)]


@pytest.fixture(scope="module")
def objects(sample):
    return [label for _, labels in sample for label in labels if label.name != "DontCare"]


def blank_canvas() -> Canvas:
    pixels = np.zeros((256, 512, 4), np.uint8)
    pixels[..., :3] = (1, 2, 3)  # no paint is as dark as this
    return Canvas(pixels, Camera(330.0, 256.0, 100.0, 1.65), LIGHTS["day"])


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def geometric_size(label) -> float:
    x1, y1, x2, y2 = label.box
    return ((x2 - x1) * (y2 - y1)) ** 0.5


# ---- pictures ------------------------------------------------------------------------------------


def test_a_scene_depends_on_options_and_index_only():
    image, labels = render(RoadScenes(seed=3), 7)
    render(RoadScenes(seed=3), 8)
    again, labels_again = render(RoadScenes(seed=3, train=1, val=1), 7)
    assert np.array_equal(image, again)
    assert labels == labels_again
    for other in (render(RoadScenes(seed=4), 7), render(RoadScenes(seed=3), 6)):
        assert not np.array_equal(image, other[0])


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(128, 256), (96, 320), (200, 200)])
def test_image_has_the_size_asked_for_and_boxes_lie_inside(height, width):
    scenes = RoadScenes(height=height, width=width)
    for index in range(12):
        image, labels = render(scenes, index)
        assert image.shape == (height, width, 3)
        assert image.dtype == np.uint8
        for label in labels:
            x1, y1, x2, y2 = label.box
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
def test_boxes_are_tight_around_what_was_painted(kind):
    rng = np.random.default_rng(0)
    for _ in range(40):
        canvas, actor = blank_canvas(), cast(kind, rng)
        pose = Pose(float(rng.uniform(-6, 6)), float(rng.uniform(4, 30)), actor.pose.ry)
        body = Body(kind, actor.shape, actor.size, pose)
        draw_actor(canvas, body, 1, rng)
        painted = (canvas.pixels[..., :3] != (1, 2, 3)).any(axis=2)
        if not painted.any():
            continue
        rows, columns = np.nonzero(painted.any(axis=1))[0], np.nonzero(painted.any(axis=0))[0]
        expected = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 2
        box, area = roadscenes._measure(canvas, body, 1)
        assert box == pytest.approx(expected)
        assert area == painted.sum()


@pytest.mark.parametrize("shape", list(CAR_SHAPES))
@pytest.mark.parametrize("yaw", np.linspace(-3, 3, 7).tolist())
def test_the_three_d_numbers_agree_with_the_picture(shape, yaw):
    canvas, rng = blank_canvas(), np.random.default_rng(1)
    body = Body("Car", shape, (1.6, 1.7, 4.2), Pose(0.5, 9.0, yaw))
    draw_actor(canvas, body, 1, rng)
    drawn = np.array(roadscenes._measure(canvas, body, 1)[0])
    solid = np.array(outline(canvas.camera, body.size, body.pose)) / 2
    low, high = np.maximum(drawn[:2], solid[:2]), np.minimum(drawn[2:], solid[2:])
    shared = np.prod(high - low)
    joined = np.prod(drawn[2:] - drawn[:2]) + np.prod(solid[2:] - solid[:2]) - shared
    assert shared / joined > 0.8


@pytest.mark.parametrize(
    ("cover", "x", "occluded"),
    [(None, 0, 0), ("post", 2, 0), ("bollard", 0.2, 1), ("bollard", 0, 2), ("crate", 0, "gone")],
)
def test_occlusion_is_what_nearer_things_hide(cover, x, occluded):
    person = Body("Pedestrian", "", (1.8, 0.55, 0.65), Pose(0.0, 12.0, 0.3))
    bodies = [person]
    if cover:
        bodies.append(Body(cover, "", PROPS[cover], Pose(x, 9.0, 0.0)))
    alone = roadscenes._draw_bodies(blank_canvas(), [person], np.random.default_rng(5))
    labels = roadscenes._draw_bodies(blank_canvas(), bodies, np.random.default_rng(5))
    named = [label for label in labels if label.name != "DontCare"]
    if occluded == "gone":
        assert named == []
    else:
        assert [label.occluded for label in named] == [occluded]
        assert named[0].box == alone[0].box  # the whole object, not what is left of it


@pytest.mark.slow
def test_a_scene_costs_a_bounded_number_of_calls():
    """Interpreter calls are what a scene costs, about 7000 of them: counts, not clocks."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    previous = sys.getprofile()
    sys.setprofile(count)
    try:
        for index in range(20):
            render(RoadScenes(), index)
    finally:
        sys.setprofile(previous)
    assert calls / 20 < 9000


# ---- balance -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_neck_level_gets_objects(objects):
    sizes = np.array([geometric_size(label) for label in objects])
    shares = np.histogram(sizes, [0, 16, 32, 64, np.inf])[0] / len(sizes)
    assert shares.min() >= 0.10
    assert sizes.min() >= roadscenes.SMALLEST
    assert sizes.max() > 100


def test_classes_are_balanced_and_scenes_filled(sample, objects):
    shares = {name: sum(o.name == name for o in objects) / len(objects) for name in CLASSES}
    assert max(shares, key=lambda name: shares[name]) == "Car"
    assert min(shares.values()) >= 0.15
    assert 4 <= len(objects) / len(sample) <= 7
    assert sum(label.name == "DontCare" for _, labels in sample for label in labels) > 20
    assert {label.occluded for label in objects} == {0, 1, 2}
    assert 0.05 < np.mean([label.truncated > 0 for label in objects]) < 0.5


@pytest.mark.slow
def test_difficulty_hides_more():
    def hidden(difficulty: float) -> float:
        scenes = [render(RoadScenes(difficulty=difficulty), index)[1] for index in range(40)]
        return float(np.mean([o.occluded > 0 for s in scenes for o in s if o.occluded >= 0]))

    clean, ordinary, hard = (hidden(difficulty) for difficulty in (0.0, 1.0, 2.0))
    assert clean < ordinary < hard


def test_difficulty_adds_noise():
    camera = Camera(focal=100, column=64, horizon=64, height=1.5)
    canvas = Canvas(np.full((128, 128, 4), 100, np.uint8), camera, LIGHTS["day"])

    def noise(difficulty: float) -> float:
        rngs = (np.random.default_rng(seed) for seed in range(20))
        return float(np.mean([develop(canvas, difficulty, rng).std() for rng in rngs]))

    clean, ordinary, hard = (noise(difficulty) for difficulty in (0.0, 1.0, 2.0))
    assert clean == 0 < ordinary < hard


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_processes_draw_what_one_draws(tmp_path):
    scenes = RoadScenes(train=100, val=30, height=64, width=64)
    root = write(scenes, tmp_path)
    for index in (0, 64, 129):
        written = cv2.imread(str(root / f"training/image_2/{index:06d}.png"))
        np.testing.assert_array_equal(written, render(scenes, index)[0])


@pytest.mark.slow
def test_layout_is_kittis_and_holds_what_render_gives(tmp_path):
    root = write(SMALL, tmp_path)
    ids = {part: (root / f"ImageSets/{part}.txt").read_text().split() for part in ("train", "val")}
    assert ids["train"] == [f"{i:06d}" for i in range(5)]
    assert ids["val"] == [f"{i:06d}" for i in range(5, 8)]
    for name in ids["train"] + ids["val"]:
        image, labels = render(SMALL, int(name))
        stored = cv2.imread(str(root / f"training/image_2/{name}.png"))
        assert stored is not None
        assert np.array_equal(stored, image)
        lines = (root / f"training/label_2/{name}.txt").read_text().splitlines()
        assert len(lines) == len(labels)
        for line, label in zip(lines, labels, strict=True):
            kind, *numbers = line.split()
            assert len(numbers) == 14
            assert kind == label.name
            assert tuple(float(n) for n in numbers[3:7]) == pytest.approx(label.box, abs=0.006)


def test_written_once(tmp_path):
    root = write(SMALL, tmp_path)
    mark = root / "training/label_2/000000.txt"
    mark.write_text("kept")
    assert write(SMALL, tmp_path) == root
    assert mark.read_text() == "kept"


def test_options_that_change_pictures_change_the_folder():
    changes = (
        {"train": 6}, {"val": 4}, {"height": 96}, {"width": 320}, {"seed": 1}, {"difficulty": 0.5}
    )  # fmt: skip
    names = {folder_name(RoadScenes(**{"train": 5, "val": 3, **change})) for change in changes}
    assert len(names | {folder_name(SMALL)}) == 7
    # 1 and 1.0 draw the same pictures, so they must share a folder
    assert folder_name(RoadScenes(difficulty=1)) == folder_name(RoadScenes(difficulty=1.0))


def test_half_written_folder_is_never_taken(tmp_path):
    leftover = tmp_path / f".{folder_name(SMALL)}-0123abcd"
    (leftover / "training/image_2").mkdir(parents=True)
    root = write(SMALL, tmp_path)
    assert len(digest(root)) == 2 * 8 + 2


def written(cache):
    """What lies in a cache beside the locks, which stay."""
    return [file for file in cache.iterdir() if file.suffix != ".lock"]


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(scenes, index):
        if index == 3:
            raise KeyboardInterrupt
        return render(scenes, index)

    monkeypatch.setattr(roadscenes, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(SMALL, tmp_path)
    assert written(tmp_path) == []


def test_the_slower_of_two_uses_the_winners_folder(tmp_path, monkeypatch):
    slow = roadscenes._write_all

    def overtaken(scenes, draft):
        slow(scenes, draft)
        slow(scenes, tmp_path / folder_name(scenes))
        (tmp_path / folder_name(scenes) / "winner").touch()

    monkeypatch.setattr(roadscenes, "_write_all", overtaken)
    root = write(SMALL, tmp_path)
    assert (root / "winner").exists()
    assert written(tmp_path) == [root]


@pytest.mark.slow
def test_processes_at_once_write_the_same_bytes_as_this_one(tmp_path):
    code = (
        "import sys; from pathlib import Path;"
        "from ldt.data.roadscenes_generator import RoadScenes, write;"
        "print(write(RoadScenes(train=5, val=3), Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "shared")]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {run.communicate(timeout=PATIENCE)[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    shared = tmp_path / "shared" / folder_name(SMALL)
    assert printed == {str(shared)}
    assert written(tmp_path / "shared") == [shared]
    assert digest(shared) == digest(write(SMALL, tmp_path / "own"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("train", 0), ("val", -1), ("height", 16), ("width", 2.5), ("seed", -1), ("seed", True),
        ("difficulty", 3.0), ("difficulty", float("nan")), ("difficulty", "hard"),
    ],
)  # fmt: skip
def test_impossible_options_are_named(option, value):
    key = "scene_seed" if option == "seed" else option
    with pytest.raises(ValueError, match=rf"dataset\.{key}=.*; allowed: .* of at least .*up to "):
        RoadScenes(**{option: value})
