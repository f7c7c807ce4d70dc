"""Surroundings of the road users in the synthetic scenes: light, houses, clutter, lens."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np

from ldt.data.roadscenes_cast import CLOTHES, PAINTS, RUBBER, Body, draw_bicycle
from ldt.data.roadscenes_draw import Canvas, Colour, Light, Pen, Pose, draw_prism, pick

# tint, haze, visibility in metres, lamps
LIGHTS: dict[str, Light] = {
    "day": Light((1.0, 1.0, 1.0), (222, 212, 200), 220.0, False),
    "shadow": Light((1.08, 1.08, 1.1), (225, 210, 190), 220.0, False),
    "dusk": Light((0.60, 0.64, 0.80), (115, 130, 175), 150.0, True),
    "fog": Light((0.88, 0.88, 0.88), (196, 196, 194), 34.0, True),
    "night": Light((0.46, 0.41, 0.38), (44, 38, 34), 90.0, True),
}
SKIES: dict[str, Colour] = {
    "day": (225, 170, 110), "shadow": (220, 155, 90), "dusk": (120, 75, 75),
    "fog": (205, 205, 203), "night": (22, 14, 10),
}  # fmt: skip
# Objects that resemble or occlude road users: (height, width, length) in metres
PROPS: dict[str, tuple[float, float, float]] = {
    "bin": (1.05, 0.6, 0.6), "crate": (1.5, 1.7, 3.2), "bollard": (1.1, 0.3, 0.3),
    "bush": (1.2, 1.6, 1.6), "bicycle": (1.05, 0.5, 1.7), "kiosk": (2.3, 1.2, 1.2),
    "sign": (2.5, 0.7, 0.7), "post": (1.7, 0.35, 0.35), "pole": (6.0, 0.2, 0.2),
    "tree": (6.0, 1.2, 1.2),
}  # fmt: skip
WALLS: tuple[Colour, ...] = (
    (150, 165, 180), (110, 125, 150), (90, 105, 160), (165, 165, 165), (120, 150, 175),
    (95, 100, 105),
)  # fmt: skip
LEAVES: tuple[Colour, ...] = ((45, 95, 60), (40, 80, 75), (55, 110, 85), (50, 75, 50))
GREY: Colour = (125, 122, 120)
CUTS = (1.0, 3.0, 6.0, 10.0, 16.0, 26.0, 45.0, 90.0, 300.0)  # metres; ground bands of one tone


def paint_backdrop(canvas: Canvas, sky: Colour, verge: float, rng: np.random.Generator) -> None:
    """Paint sky, ground, road and houses; the houses stand `verge` metres from the axis."""
    _paint_sky(canvas, sky)
    _paint_skyline(canvas, rng)
    soil = pick(rng, ((70, 110, 95), (120, 125, 130), (85, 120, 125), (135, 140, 150)))
    _paint_ground(canvas, soil)
    half = float(rng.uniform(2.8, 4.5))
    middle = float(rng.uniform(-1.6, 1.6))
    grey = float(rng.uniform(70, 125))
    _paint_strip(canvas, middle - half - 2, middle + half + 2, (grey + 35, grey + 37, grey + 38))
    _paint_strip(canvas, middle - half, middle + half, (grey, grey, grey))
    for x in (middle - half + 0.25, middle + half - 0.25):
        _paint_strip(canvas, x - 0.07, x + 0.07, (205, 210, 210))
    for z in np.arange(float(rng.uniform(2, 6)), 60.0, 6.0).tolist():
        _paint_patch(canvas, middle - 0.08, middle + 0.08, z, z + 2.6, (215, 218, 218))
    if rng.random() < 0.25:  # a zebra crossing
        z = float(rng.uniform(7, 22))
        for x in np.arange(middle - half + 0.3, middle + half - 0.3, 1.0).tolist():
            _paint_patch(canvas, x, x + 0.5, z, z + 3.0, (210, 214, 214))
    _roughen(canvas, rng)
    _paint_houses(canvas, verge, rng)


def _paint_sky(canvas: Canvas, sky: Colour) -> None:
    rows = round(canvas.camera.horizon)
    share = np.linspace(0, 1, rows)[:, None] ** 1.5
    column = np.array((*sky, 0)) * (1 - share) + np.array((*canvas.light.haze, 0)) * share
    strip = np.rint(column).astype(np.uint8)[:, None]
    # cv2 repeats columns many times faster than numpy's broadcasting does
    canvas.pixels[:rows] = cv2.resize(strip, (canvas.width, rows), interpolation=cv2.INTER_NEAREST)


def _paint_ground(canvas: Canvas, colour: Colour) -> None:
    top, camera = round(canvas.camera.horizon), canvas.camera
    for near, far in pairwise(CUTS):
        last = round(camera.horizon + camera.focal * camera.height / near)
        tone = Pen(canvas, (near * far) ** 0.5).tone(colour)
        cv2.rectangle(canvas.pixels, (0, top), (canvas.width, last), tone, -1)


def _paint_skyline(canvas: Canvas, rng: np.random.Generator) -> None:
    pen = Pen(canvas, 110.0)
    base, width = canvas.camera.horizon + 2, canvas.width
    x = 0.0
    while x < width:
        span, rise = float(rng.uniform(0.03, 0.14)) * width, float(rng.uniform(1.0, 9.0))
        top = base - rise * pen.scale
        corners = np.array([(x, base), (x, top), (x + span, top), (x + span, base)])
        pen.area(corners, pick(rng, WALLS if rng.random() < 0.5 else LEAVES), 0.8)
        x += span


def _paint_strip(canvas: Canvas, x1: float, x2: float, colour: Colour) -> None:
    for near, far in pairwise(CUTS):
        _paint_patch(canvas, x1, x2, near, far, colour)


def _paint_patch(
    canvas: Canvas, x1: float, x2: float, z1: float, z2: float, colour: Colour
) -> None:
    camera = canvas.camera  # by hand: there are fifty patches in a picture
    near, far = camera.focal / z1, camera.focal / z2
    low, high = camera.horizon + camera.height * near, camera.horizon + camera.height * far
    left, right = camera.column + x1 * near, camera.column + x2 * near
    left_far, right_far = camera.column + x1 * far, camera.column + x2 * far
    corners = np.array([(left, low), (left_far, high), (right_far, high), (right, low)])
    Pen(canvas, (z1 * z2) ** 0.5).area(corners, colour)


def _roughen(canvas: Canvas, rng: np.random.Generator) -> None:
    """Give the ground stains, by adding coarse noise to everything below the horizon."""
    ground = canvas.pixels[round(canvas.camera.horizon) :]
    height, width = ground.shape[:2]
    coarse = rng.integers(116, 141, (height // 6 + 1, width // 14 + 1, 1), dtype=np.uint8)
    coarse = np.concatenate([coarse, coarse, coarse, np.full_like(coarse, 128)], axis=2)
    stains = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    cv2.addWeighted(ground, 1.0, stains, 1.0, -128.0, dst=ground)  # 128 means no change


def _paint_houses(canvas: Canvas, verge: float, rng: np.random.Generator) -> None:
    """Line both sides with houses, from far to near."""
    for side in (-1, 1):
        z, row = float(rng.uniform(4, 18)), []
        while z < 60:
            length, rise = float(rng.uniform(7, 16)), float(rng.uniform(3.5, 12.0))
            if rng.random() < 0.75:
                row.append((z, length, rise, verge + float(rng.uniform(0, 3))))
            z += length + float(rng.uniform(0, 5))
        for start, length, rise, away in reversed(row):
            _draw_house(canvas, side, (start, length, rise, away), rng)


def _draw_house(
    canvas: Canvas,
    side: int,
    plan: tuple[float, float, float, float],
    rng: np.random.Generator,
) -> None:
    start, length, rise, away = plan
    pen = Pen(canvas, start + length / 3)
    pose = Pose(side * (away + 5), start + length / 2, -np.pi / 2)
    profile = np.array([(-length / 2, 0), (-length / 2, rise), (length / 2, rise), (length / 2, 0)])
    draw_prism(pen, pose, profile, np.full(4, 5.0), pick(rng, WALLS))
    floors, axes = max(1, int(rise / 2.9)), max(2, int(length / 2.6))
    corners = []
    for floor in range(floors):
        for axis in range(axes):
            z, y = start + (axis + 0.25) * length / axes, (floor + 0.3) * rise / floors
            far, top = z + 0.5 * length / axes, y + 0.5 * rise / floors
            corners += [(z, y), (z, top), (far, top), (far, y)]
    grid = np.array(corners)
    world = np.column_stack([np.full(len(grid), side * away), grid[:, 1], grid[:, 0]])
    panes = canvas.camera.project(world).reshape(-1, 4, 2)
    pen.areas(panes, (80, 72, 66))
    if canvas.light.lamps:
        pen.areas(panes[rng.random(len(panes)) < 0.3], (160, 330, 420))


def throw_shadows(canvas: Canvas, bodies: list[Body], patches: bool, sun: float) -> None:
    """Darken the ground below bodies, and with `patches` below unseen trees, before they are drawn.

    sun: metres by which a shadow is longer on the sun's far side; negative = to the left.
    """
    mask = np.zeros((canvas.height, canvas.width), np.uint8)
    for body in bodies:
        height, width, length = body.size
        signs = ((-1, -1), (-1, 1), (1, 1), (1, -1))
        feet = np.array([(a * length * 0.55, 0, s * width * 0.6) for a, s in signs])
        base = body.pose.place(feet)
        thrown = base + (sun * height, 0, 0)
        hull = cv2.convexHull(canvas.camera.project(np.vstack([base, thrown])).astype(np.int32))
        cv2.fillConvexPoly(mask, hull, 1)
    if patches:
        for z in np.arange(3.0, 50.0, 9.0).tolist():
            ground = np.array([(-9, 0, z), (-9, 0, z + 5), (3, 0, z + 7), (1, 0, z + 3)])
            cv2.fillPoly(mask, [canvas.camera.project(ground).astype(np.int32)], 1)
    ground = canvas.pixels[round(canvas.camera.horizon) :]
    cv2.copyTo(cv2.convertScaleAbs(ground, alpha=0.55), mask[-len(ground) :], ground)


def prop(kind: str, rng: np.random.Generator) -> Body:
    """Sample the heading of a `kind` of prop, at the position (0, 0)."""
    return Body(kind, "", PROPS[kind], Pose(0.0, 0.0, float(rng.uniform(-np.pi, np.pi))))


def draw_prop(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """Draw a prop over the canvas with owner 0, so that it occludes road users."""
    pen, height = Pen(canvas, body.pose.z), body.size[0]
    at = pen.project(body.pose, np.array([(0, y * height, 0) for y in (0, 0.25, 0.5, 0.75, 1)]))
    if body.kind == "tree":
        pen.path(at[:4], 0.3, (50, 65, 80))
        _draw_leaves(pen, at[3], 1.6, rng)
    elif body.kind == "bush":
        _draw_leaves(pen, at[2], 0.6, rng)
    elif body.kind == "bicycle":
        draw_bicycle(pen, body.pose, pick(rng, PAINTS))
    elif body.kind in ("bin", "crate", "kiosk"):
        _draw_box(pen, body, rng)
    elif body.kind == "sign":
        pen.path(at, 0.08, GREY)
        pen.disc(at[4], 0.36, pick(rng, ((50, 45, 190), (170, 90, 40), (40, 170, 210))))
        pen.disc(at[4], 0.22, (220, 220, 220))
    elif body.kind == "pole":
        pen.path(at, 0.16, GREY)
    else:  # bollards and posts: a trunk with a round top, much like a person far away
        pen.path(at[:4], body.size[1], pick(rng, CLOTHES))
        pen.disc(at[4], body.size[1] * 0.45, pick(rng, PAINTS))


def _draw_leaves(pen: Pen, middle: np.ndarray, radius: float, rng: np.random.Generator) -> None:
    for dx, dy in rng.normal(0, 0.55 * radius, (6, 2)).tolist():
        pen.disc(middle + (dx * pen.scale, dy * pen.scale * 0.7), radius * 0.7, pick(rng, LEAVES))


def _draw_box(pen: Pen, body: Body, rng: np.random.Generator) -> None:
    height, width, length = body.size
    lift = 0.12 * height if body.kind == "crate" else 0.0
    ends = [(-length / 2, lift), (-length / 2, height), (length / 2, height), (length / 2, lift)]
    if lift:  # a skip or a trailer stands on feet or wheels
        for ahead in (-0.3, 0.3):
            foot = pen.project(body.pose, np.array([(ahead * length, 0.2, 0.0)]))
            pen.disc(foot[0], 0.22, RUBBER)
    draw_prism(pen, body.pose, np.array(ends), np.full(4, width / 2), pick(rng, PAINTS))


def develop(canvas: Canvas, grime: float, rng: np.random.Generator) -> np.ndarray:
    """Turn the canvas into the picture, (H/2, W/2, 3) uint8: lens blur, contrast, noise, JPEG.

    grime: 0 = as drawn, 1 = an ordinary camera.
    """
    colours = cv2.cvtColor(canvas.pixels, cv2.COLOR_BGRA2BGR)
    size = (canvas.width // 2, canvas.height // 2)
    image = cv2.resize(colours, size, interpolation=cv2.INTER_AREA)
    blur, noise, contrast, gain, quality = rng.random(5).tolist()
    if grime == 0:
        return image
    if blur < 0.5 * grime:
        image = cv2.GaussianBlur(image, (3, 3), 0.4 + 0.5 * blur * grime)
    flat = 1 - 0.35 * contrast * min(grime, 2.0)
    brighter = (1 - flat) * 110 + 24 * grime * (gain - 0.5)
    image = cv2.addWeighted(image, flat, image, 0.0, brighter)
    # the sum of two uniform bytes is nearly normal, with a deviation of 104, and quick to draw
    grain = rng.integers(0, 256, (2, *image.shape), dtype=np.uint8)
    scale = grime * (2 + 9 * noise**2) / 104
    grain = cv2.addWeighted(grain[0], scale, grain[1], scale, -255 * scale, dtype=cv2.CV_16S)
    image = cv2.add(image, grain, dtype=cv2.CV_8U)
    if quality < 0.4 * grime:
        options = [cv2.IMWRITE_JPEG_QUALITY, round(45 + 45 * quality)]
        decoded = cv2.imdecode(cv2.imencode(".jpg", image, options)[1], cv2.IMREAD_COLOR)
        assert decoded is not None  # it was encoded just now
        return decoded
    return image
