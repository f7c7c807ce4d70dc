"""Synthetic road scenes in KITTI's folder layout: a data set that needs no download.

Everything is drawn: a perspective road with houses, trees, signs and clutter; cars, pedestrians and
cyclists as small 3-D bodies under day, dusk, night, fog or hard shadows. An image depends only
on the options and its index.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, replace
from math import cos, sin
from pathlib import Path
from uuid import uuid4

import cv2
import numpy as np
from joblib import Parallel, cpu_count, delayed

from ldt.config.kinds import Difficulty, SceneCount, SceneHeight, SceneWidth, Seed
from ldt.config.places import IMAGES, LABELS
from ldt.config.values import check_fields
from ldt.data.kitti_labels import CLASSES, SETS
from ldt.data.roadscenes_cast import Body, cast, draw_actor
from ldt.data.roadscenes_draw import NEAR, Camera, Canvas, Pose
from ldt.data.roadscenes_scenery import (
    LIGHTS,
    PROPS,
    SKIES,
    develop,
    draw_prop,
    paint_backdrop,
    prop,
    throw_shadows,
)
from ldt.runs.files import locked

VERSION = 5  # increment it with every change of the pictures; part of the folder name
Box = tuple[float, float, float, float]  # x1, y1, x2, y2
SHARES = (0.48, 0.28, 0.24)  # of the classes
SIZES = ((8, 16), (16, 32), (32, 64), (70, 150))  # pixels, sqrt(w * h), at a height of 128
SIZE_SHARES = (0.13, 0.21, 0.32, 0.34)
SUPERSAMPLING = 2
# noise hardly compresses: searching for repetitions takes twice as long and saves a few per cent
PNG = (
    cv2.IMWRITE_PNG_COMPRESSION,
    1,
    cv2.IMWRITE_PNG_STRATEGY,
    cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY,
)
HIDDEN, PARTLY, LARGELY = 0.15, 0.9, 0.5  # visible shares: DontCare below, KITTI's 0 above, 1 above
SMALLEST = 7.0  # pixels, sqrt(w * h): smaller road users are DontCare


@dataclass(frozen=True)
class RoadScenes:
    """Number of scenes, image size in pixels, seed and difficulty.

    difficulty scales clutter, crowding, bad light, noise and low contrast: 0 = clean, 1 = hard.

    Raises:
        ValueError: a value is out of range.
    """

    train: SceneCount = 512
    val: SceneCount = 192
    height: SceneHeight = 128
    width: SceneWidth = 256
    seed: Seed = 0
    difficulty: Difficulty = 0.1

    def __post_init__(self) -> None:
        keys = ("train", "val", "height", "width", "difficulty")
        check_fields(self, {**{k: f"dataset.{k}" for k in keys}, "seed": "dataset.scene_seed"})


@dataclass(frozen=True)
class Label:
    """One line of a KITTI label file. box: (x1, y1, x2, y2), pixel edges inside the image.

    truncated: share of the box outside the image; occluded: 0 visible, 1 partly, 2 largely hidden;
    size: (height, width, length) and location: (x, y, z) in metres; alpha, yaw: radians.
    """

    name: str
    box: Box
    truncated: float = -1.0
    occluded: int = -1
    alpha: float = -10.0
    size: tuple[float, float, float] = (-1.0, -1.0, -1.0)
    location: tuple[float, float, float] = (-1000.0, -1000.0, -1000.0)
    yaw: float = -10.0

    def line(self) -> str:
        """Return the 15 columns of KITTI's devkit, without the newline."""
        rest = (self.alpha, *self.box, *self.size, *self.location, self.yaw)
        numbers = " ".join(f"{value:.2f}" for value in rest)
        return f"{self.name} {self.truncated:.2f} {self.occluded} {numbers}"


def render(scenes: RoadScenes, index: int) -> tuple[np.ndarray, list[Label]]:
    """Draw scene `index` deterministically: (H, W, 3) uint8 BGR, and its labels."""
    rng = np.random.default_rng([scenes.seed, index])
    scale = SUPERSAMPLING
    light = _choose_light(scenes, rng)
    camera = Camera(
        focal=scale * scenes.width * float(rng.uniform(0.55, 0.75)),
        column=scale * scenes.width * float(rng.uniform(0.45, 0.55)),
        horizon=scale * scenes.height * float(rng.uniform(0.32, 0.46)),
        height=float(rng.uniform(1.4, 2.1)),
    )
    pixels = np.zeros((scale * scenes.height, scale * scenes.width, 4), np.uint8)
    canvas = Canvas(pixels, camera, LIGHTS[light])
    verge = float(rng.uniform(7, 11) if rng.random() < 0.5 else rng.uniform(16, 40))
    paint_backdrop(canvas, SKIES[light], verge, rng)
    bodies = _populate(scenes, _Stage(canvas, rng), verge)
    throw_shadows(canvas, bodies, light == "shadow", float(rng.uniform(-0.7, 0.7)))
    labels = _draw_bodies(canvas, bodies, rng)
    return develop(canvas, scenes.difficulty, rng), labels


def _choose_light(scenes: RoadScenes, rng: np.random.Generator) -> str:
    bad = np.array([0.0, 0.13, 0.15, 0.11, 0.12]) * min(scenes.difficulty, 1.5)
    bad[0] = 1 - bad.sum()
    return str(rng.choice(list(LIGHTS), p=bad))


class _Stage:
    """Finds places for bodies: `placed` holds each with its box in canvas pixels, unclipped."""

    def __init__(self, canvas: Canvas, rng: np.random.Generator) -> None:
        self.canvas, self.rng = canvas, rng
        self.placed: list[tuple[Body, Box]] = []

    def settle(self, body: Body, aim: float, verge: float, crowd: float) -> None:
        """Place `body` where sqrt(w * h) of its box is about `aim` canvas pixels, or drop it.

        verge: largest |x|, metres; crowd: maximum share of a body's box covered by another.
        """
        camera = self.canvas.camera
        nearest, yaw = 1.3 + body.size[2] / 2, body.pose.ry
        for share in self.rng.uniform(-0.03, 1.03, 8).tolist():
            ray = (share * self.canvas.width - camera.column) / camera.focal
            z = max(nearest, camera.focal * (body.size[0] * body.size[1]) ** 0.5 / aim)
            # the box's size depends on where it is seen from: correct the depth once
            seen = _area(outline(camera, body.size, Pose(ray * z, z, yaw))) ** 0.5
            z = max(nearest, z * seen / aim)
            if abs(ray * z) > verge:
                continue
            pose = Pose(ray * z, z, yaw)
            box = outline(camera, body.size, pose)
            if self._fits(z, box, crowd):
                self.placed.append((replace(body, pose=pose), box))
                return

    def _fits(self, z: float, box: Box, crowd: float) -> bool:
        frame = _frame(self.canvas)
        if _shared(box, frame) < 0.5 * _area(box):
            return False
        for other, other_box in self.placed:
            shared = _shared(box, other_box)
            if shared and shared > crowd * _area(box if z > other.pose.z else other_box):
                return False
        return True


def _frame(canvas: Canvas) -> Box:
    return 0.0, 0.0, float(canvas.width), float(canvas.height)


def outline(camera: Camera, size: tuple[float, float, float], pose: Pose) -> Box:
    """Return the box around a body's 3-D box, in canvas pixels, not clipped to the image.

    size: (height, width, length) in metres. In plain Python, because this runs a hundred times per
    scene and numpy's overhead would be many times the work of eight points.
    """
    height, width, length = size
    c, s = cos(pose.ry) / 2, sin(pose.ry) / 2
    us, scales = [], []
    for ahead, left in ((length, width), (length, -width), (-length, width), (-length, -width)):
        scale = camera.focal / max(pose.z - ahead * s + left * c, NEAR)
        us.append(camera.column + (pose.x + ahead * c + left * s) * scale)
        scales.append(scale)
    near, above = max(scales), camera.height - height
    top = above * (min(scales) if above > 0 else near)  # what is above the eye rises when near
    return min(us), camera.horizon + top, max(us), camera.horizon + camera.height * near


def _shared(a: Box, b: Box) -> float:
    """Return the intersection area of two boxes, with an early exit for disjoint boxes."""
    if a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]:
        return 0.0
    return (min(a[2], b[2]) - max(a[0], b[0])) * (min(a[3], b[3]) - max(a[1], b[1]))


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _populate(scenes: RoadScenes, stage: _Stage, verge: float) -> list[Body]:
    """Choose road users and props and find each a place; returned from far to near."""
    rng, unit = stage.rng, SUPERSAMPLING * scenes.height / 128
    crowd = float(rng.uniform(0.1, 0.5)) + 0.25 * scenes.difficulty
    users = min(2 + int(rng.poisson(4.4)), 11)
    bounds = np.log(SIZES)[rng.choice(len(SIZES), users, p=SIZE_SHARES)]
    aims = unit * np.exp(rng.uniform(bounds[:, 0], bounds[:, 1]))
    kinds = rng.choice(CLASSES, users, p=SHARES).tolist()
    for kind, aim in zip(kinds, -np.sort(-aims), strict=True):  # place the large ones first
        stage.settle(cast(kind, rng), float(aim), min(verge - 1, 20.0), crowd)
    for _ in range(int(rng.integers(2, 6)) if rng.random() < 0.35 else 0):
        # far away and too small to recognise: labelled DontCare
        kind = str(rng.choice(CLASSES, p=SHARES))
        stage.settle(cast(kind, rng), unit * float(rng.uniform(3.0, 5.5)), verge, 0.9)
    for kind in rng.choice(list(PROPS), int(rng.poisson(2 + 4.5 * scenes.difficulty))).tolist():
        aim = unit * float(np.exp(rng.uniform(np.log(6), np.log(44))))
        stage.settle(prop(kind, rng), aim, verge, 0.7 * crowd)
    return [body for body, _ in sorted(stage.placed, key=lambda item: -item[0].pose.z)]


def _draw_bodies(canvas: Canvas, bodies: list[Body], rng: np.random.Generator) -> list[Label]:
    """Draw from far to near, then label every road user by its visible silhouette."""
    users = [body for body in bodies if body.kind in CLASSES]
    silhouettes: list[tuple[Box, int]] = []
    for body in bodies:
        if body.kind in CLASSES:
            draw_actor(canvas, body, len(silhouettes) + 1, rng)
            # just drawn and not occluded yet: the full silhouette
            silhouettes.append(_measure(canvas, body, len(silhouettes) + 1))
        else:
            draw_prop(canvas, body, rng)
    labels = []
    for owner, (body, (box, area)) in enumerate(zip(users, silhouettes, strict=True), start=1):
        left_box, left_area = _measure(canvas, body, owner)
        if left_area == 0:
            continue
        if left_area < HIDDEN * area or _area(box) ** 0.5 < SMALLEST:
            labels.append(Label("DontCare", left_box))
        else:
            labels.append(_label(canvas, body, box, left_area / area))
    return labels


def _measure(canvas: Canvas, body: Body, owner: int) -> tuple[Box, int]:
    """Return the box (in image pixels) and the area (in canvas pixels) of an owner's silhouette."""
    x1, y1, x2, y2 = outline(canvas.camera, body.size, body.pose)
    reach_x, reach_y = (x2 - x1) / 2 + 4, (y2 - y1) / 2 + 4  # ample: just spares a full search
    left, top = max(int(x1 - reach_x), 0), max(int(y1 - reach_y), 0)
    part = canvas.pixels[top : int(y2 + reach_y), left : int(x2 + reach_x)]
    mask = cv2.inRange(part, (0, 0, 0, owner), (255, 255, 255, owner))
    x, y, width, height = cv2.boundingRect(mask)
    x, y, s = x + left, y + top, SUPERSAMPLING
    return (x / s, y / s, (x + width) / s, (y + height) / s), cv2.countNonZero(mask)


def _label(canvas: Canvas, body: Body, box: Box, visible: float) -> Label:
    whole = outline(canvas.camera, body.size, body.pose)
    pose = body.pose
    return Label(
        name=body.kind,
        box=box,
        truncated=1 - _shared(whole, _frame(canvas)) / _area(whole),
        occluded=0 if visible >= PARTLY else 1 if visible >= LARGELY else 2,
        alpha=_wrapped(pose.ry - float(np.arctan2(pose.x, pose.z))),
        size=body.size,
        location=(pose.x, canvas.camera.height, pose.z),
        yaw=_wrapped(pose.ry),
    )


def _wrapped(angle: float) -> float:
    return float((angle + np.pi) % (2 * np.pi) - np.pi)


def folder_name(scenes: RoadScenes) -> str:
    """Return `roadscenes-<hash>` with a hash of all options and the generator version."""
    options = {**asdict(scenes), "difficulty": float(scenes.difficulty)}  # 1 draws what 1.0 draws
    text = json.dumps({"version": VERSION, **options}, sort_keys=True)
    return f"roadscenes-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def write(scenes: RoadScenes, cache: Path) -> Path:
    """Write the data set below `cache` unless it exists, and return its root.

    The write is atomic: everything is drawn into a sibling folder that is renamed at the end. A
    second process waits for the first; what killed ones have left is removed.
    """
    root = Path(cache) / folder_name(scenes)
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with locked(root.with_name(f".{root.name}.lock")):
        for left in root.parent.glob(f".{root.name}-*"):
            shutil.rmtree(left, ignore_errors=True)
        if not root.is_dir():
            _write_whole(scenes, root)
    return root


def _write_whole(scenes: RoadScenes, root: Path) -> None:
    draft = root.with_name(f".{root.name}-{uuid4().hex[:8]}")
    try:
        _write_all(scenes, draft)
        try:
            draft.rename(root)
        except OSError:  # not empty: without locks, another process was faster
            if not root.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_all(scenes: RoadScenes, root: Path) -> None:
    for part in (IMAGES, LABELS, SETS):
        (root / part).mkdir(parents=True)
    count = scenes.train + scenes.val
    # processes, because most of the time goes to Python; starting them takes as long as 64 images
    workers = min(cpu_count(), 1 + count // 64)
    Parallel(workers)(delayed(_save)(scenes, root, index) for index in range(count))
    for name, ids in (
        ("train", range(scenes.train)),
        ("val", range(scenes.train, scenes.train + scenes.val)),
    ):
        lines = "".join(f"{index:06d}\n" for index in ids)
        (root / SETS / f"{name}.txt").write_text(lines, encoding="utf-8", newline="\n")


def _save(scenes: RoadScenes, root: Path, index: int) -> None:
    image, labels = render(scenes, index)
    (root / IMAGES / f"{index:06d}.png").write_bytes(cv2.imencode(".png", image, PNG)[1].tobytes())
    text = "".join(f"{label.line()}\n" for label in labels)
    (root / LABELS / f"{index:06d}.txt").write_text(text, encoding="utf-8", newline="\n")
