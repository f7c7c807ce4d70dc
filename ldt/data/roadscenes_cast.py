"""The road users of the synthetic road scenes: cars, pedestrians and cyclists as 3-D bodies.

Local frame of a body: metres (ahead, up, to the left) from the ground point below its middle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldt.data.roadscenes_draw import Canvas, Colour, Pen, Pose, draw_prism, pick, turned_to_camera

# Side views from the rear to the front, as shares of length and height: rear bumper, trunk, roof,
# hood, front bumper. Segment 3 is always the rear window, segment 5 the windscreen.
CAR_SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "sedan": ((0, 0.16), (0, 0.56), (0.03, 0.66), (0.17, 0.67), (0.30, 1.0))
    + ((0.58, 1.0), (0.75, 0.66), (0.97, 0.57), (1, 0.45), (1, 0.16)),
    "hatch": ((0, 0.16), (0, 0.50), (0.02, 0.60), (0.04, 0.66), (0.13, 1.0))
    + ((0.56, 1.0), (0.74, 0.66), (0.97, 0.57), (1, 0.45), (1, 0.16)),
    "suv": ((0, 0.20), (0, 0.50), (0.01, 0.58), (0.02, 0.64), (0.07, 1.0))
    + ((0.58, 1.0), (0.71, 0.68), (0.97, 0.61), (1, 0.48), (1, 0.20)),
    "van": ((0, 0.14), (0, 0.40), (0.00, 0.52), (0.01, 0.60), (0.03, 1.0))
    + ((0.74, 1.0), (0.89, 0.60), (0.98, 0.49), (1, 0.40), (1, 0.14)),
}
CAR_HEIGHTS = {"sedan": 1.45, "hatch": 1.50, "suv": 1.70, "van": 2.0}
PAINTS: tuple[Colour, ...] = (
    (225, 225, 225), (170, 170, 172), (95, 92, 90), (42, 40, 40), (45, 40, 165), (150, 75, 35),
    (80, 110, 60), (120, 165, 185), (40, 150, 205), (110, 50, 60),
)  # fmt: skip
CLOTHES: tuple[Colour, ...] = (
    (45, 40, 45), (120, 75, 40), (60, 50, 170), (70, 120, 60), (200, 200, 205), (60, 170, 210),
    (130, 120, 115), (150, 60, 110), (80, 95, 130),
)  # fmt: skip
SKINS: tuple[Colour, ...] = ((150, 180, 225), (115, 150, 200), (75, 105, 155), (50, 70, 100))
RUBBER: Colour = (28, 26, 26)
GLASS: Colour = (88, 76, 66)
SMALL = 9.0  # canvas pixels per metre below which the finest details are left out


@dataclass(frozen=True)
class Body:
    """An object on the ground. kind: KITTI class or prop; shape: a key of `CAR_SHAPES`, else "".

    size: (height, width, length) in metres, in KITTI's order; pose: its position and heading.
    """

    kind: str
    shape: str
    size: tuple[float, float, float]
    pose: Pose


def cast(kind: str, rng: np.random.Generator) -> Body:
    """Sample size and heading of a `kind` of road user, at the position (0, 0)."""
    # cars mostly follow the road or cross it; the others walk and ride wherever they like
    along = float(rng.choice([-np.pi / 2, np.pi / 2, 0.0, np.pi], p=[0.32, 0.32, 0.18, 0.18]))
    yaw = float(along + rng.normal(0.0, 0.22) if kind == "Car" else rng.uniform(-np.pi, np.pi))
    shape = ""
    if kind == "Car":
        shape = str(rng.choice(list(CAR_SHAPES), p=[0.36, 0.30, 0.20, 0.14]))
        size = (CAR_HEIGHTS[shape], rng.uniform(1.62, 1.86), rng.uniform(3.7, 4.7))
    elif kind == "Pedestrian":
        size = (rng.uniform(1.5, 1.88), 0.55, 0.65)
    else:
        size = (rng.uniform(1.65, 1.82), 0.55, 1.75)
    height, width, length = (float(s) for s in size)
    return Body(kind, shape, (height, width, length), Pose(0.0, 0.0, yaw))


def draw_actor(canvas: Canvas, actor: Body, owner: int, rng: np.random.Generator) -> None:
    """Draw a road user over the canvas and assign its silhouette to `owner`."""
    pen = Pen(canvas, actor.pose.z, owner)
    painter = {"Car": draw_car, "Pedestrian": draw_pedestrian, "Cyclist": draw_cyclist}
    painter[actor.kind](pen, actor, rng)


def draw_car(pen: Pen, car: Body, rng: np.random.Generator) -> None:
    """Draw a car: body, wheels, windows, and the lights and plates of the ends in view."""
    height, width, length = car.size
    profile = np.array(CAR_SHAPES[car.shape]) * (length, height) - (length / 2, 0)
    half = np.full(len(profile), width / 2)
    half[4:6] *= 0.92 if car.shape == "van" else 0.80
    paint = pick(rng, PAINTS)
    wheels = _wheels(pen, car)
    pen.areas(wheels, RUBBER)
    left, right = draw_prism(pen, car.pose, profile, half, paint)
    for wheel in wheels:  # the body covers all wheels: redraw those of the near side
        if turned_to_camera(wheel):
            pen.area(wheel, RUBBER)
            pen.area(_shrunk(wheel, 0.5), (150, 150, 150))
    for i in (3, 5):
        quad = np.array([left[i], left[i + 1], right[i + 1], right[i]])
        if turned_to_camera(quad):
            pen.area(_shrunk(quad, 0.80), GLASS, 1.2)
    for side in (left[::-1], right):
        if turned_to_camera(side):
            _draw_side_windows(pen, side[::-1] if side is not right else side)
    if pen.scale > SMALL:
        _draw_ends(pen, car)


def _draw_side_windows(pen: Pen, outline_n2: np.ndarray) -> None:
    rear, roof_rear, roof_front, front = outline_n2[3:7]
    pane = np.array([rear, roof_rear, roof_front, front])
    pane = _shrunk(pane, 0.80)
    low, high = (pane[0] + pane[3]) / 2, (pane[1] + pane[2]) / 2
    post = (high - low)[::-1] * (0.06, -0.06)  # the pillar between the windows
    pen.area(np.array([pane[0], pane[1], high - post, low - post]), GLASS, 1.0)
    pen.area(np.array([low + post, high + post, pane[2], pane[3]]), GLASS, 1.0)


def _wheels(pen: Pen, car: Body) -> np.ndarray:
    """Return the outlines of the four wheels, (4, 12, 2) pixels, clockwise from their outside."""
    height, width, length = car.size
    radius = 0.33 if height < 1.6 else 0.37
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    local = np.empty((4, 12, 3))
    local[..., 1] = radius * (1 + np.sin(angles))
    for i, (side, ahead) in enumerate(((1, -0.31), (1, 0.31), (-1, -0.31), (-1, 0.31))):
        local[i, :, 0] = ahead * length + side * radius * np.cos(angles)
        local[i, :, 2] = side * width / 2
    return pen.project(car.pose, local.reshape(48, 3)).reshape(4, 12, 2)


def _draw_ends(pen: Pen, car: Body) -> None:
    height, width, length = car.size
    lamps = pen.canvas.light.lamps
    front = (length / 2, (235, 245, 250), 0.42)
    rear = (-length / 2, (40, 30, 200 if lamps else 150), 0.46)
    boost = 6.0 if lamps else 1.0  # lamps shine through the night's tint
    for ahead, colour, level in (front, rear):
        facing = car.pose.place(np.array([[ahead, 0, 0.0]]))[0]
        outward = facing - (car.pose.x, 0, car.pose.z)
        if float(outward @ facing) > 0:  # that end looks away from the camera
            continue
        for s in (-1, 1):
            lamp = _end_quad(pen, car, ahead, (s * 0.24 * width, s * 0.46 * width), height, level)
            pen.area(lamp, colour, boost)
        plate = _end_quad(pen, car, ahead, (-0.14 * width, 0.14 * width), height * 0.8, level * 0.8)
        pen.area(plate, (215, 220, 220) if ahead < 0 else RUBBER)


def _end_quad(
    pen: Pen, car: Body, ahead: float, span: tuple[float, float], height: float, level: float
) -> np.ndarray:
    low, high = height * (level - 0.06), height * (level + 0.05)
    quad = [(ahead, y, s) for y, s in ((low, span[0]), (high, span[0]), (high, span[1]))]
    quad.append((ahead, low, span[1]))
    return pen.project(car.pose, np.array(quad))


def _shrunk(pixels_n2: np.ndarray, share: float) -> np.ndarray:
    middle = pixels_n2.mean(axis=0)
    return middle + (pixels_n2 - middle) * share


def _joints(pen: Pen, actor: Body, joints: dict[str, tuple[float, float, float]]):
    pixels = pen.project(actor.pose, np.array(list(joints.values())))
    return dict(zip(joints, pixels, strict=True))


def _limb(pen: Pen, px: dict[str, np.ndarray], names: str, width: float, colour: Colour) -> None:
    pen.path(np.array([px[name] for name in names.split()]), width, colour)


def draw_pedestrian(pen: Pen, person: Body, rng: np.random.Generator) -> None:
    """Draw a person, standing or in stride, in a coat or a shirt, perhaps with a bag."""
    h = person.size[0]
    stride, swing = rng.uniform(0.0, 0.34), rng.uniform(0.0, 0.25)
    side = abs(np.sin(person.pose.ry + np.arctan2(person.pose.x, person.pose.z)))
    girth = 0.24 + 0.18 * side  # from the front a person is wider than from the side
    coat = 0.30 if rng.random() < 0.25 else 0.46
    px = _joints(pen, person, {
        "head": (0.02, 0.92 * h, 0), "chest": (0, 0.77 * h, 0), "waist": (0, coat * h, 0),
        "hip_l": (0, 0.52 * h, 0.09), "hip_r": (0, 0.52 * h, -0.09),
        "knee_l": (stride * 0.6, 0.28 * h, 0.10), "knee_r": (-stride * 0.3, 0.28 * h, -0.10),
        "foot_l": (stride, 0.04 * h, 0.11), "foot_r": (-stride, 0.04 * h, -0.11),
        "arm_l": (0, 0.78 * h, 0.18), "arm_r": (0, 0.78 * h, -0.18),
        "hand_l": (-swing, 0.48 * h, 0.25), "hand_r": (swing, 0.48 * h, -0.25),
        "neck": (0, 0.85 * h, 0), "bag": (-0.16, 0.68 * h, 0),
    })  # fmt: skip
    shirt, trousers = pick(rng, CLOTHES), pick(rng, CLOTHES)
    skin = SKINS[int(rng.integers(len(SKINS)))]
    if rng.random() < 0.3:
        pen.disc(px["bag"], 0.17, pick(rng, CLOTHES))
    _limb(pen, px, "arm_l hand_l", 0.10, shirt)
    _limb(pen, px, "hip_l knee_l foot_l", 0.15, trousers)
    _limb(pen, px, "hip_r knee_r foot_r", 0.15, trousers)
    reach = np.array([girth / 2 * pen.scale, 0.0])
    trunk = [px["neck"], px["chest"] + reach, px["waist"] + 0.8 * reach]
    trunk += [px["waist"] - 0.8 * reach, px["chest"] - reach]
    pen.area(np.array(trunk), shirt)
    _limb(pen, px, "arm_r hand_r", 0.10, shirt)
    pen.disc(px["head"], 0.125, (35, 40, 50))
    pen.disc(px["head"] + (0, 0.035 * pen.scale), 0.095, skin)


def draw_cyclist(pen: Pen, rider: Body, rng: np.random.Generator) -> None:
    """Draw a cyclist: a bicycle and a rider who leans forward, one knee up."""
    h = rider.size[0]
    draw_bicycle(pen, rider.pose, pick(rng, PAINTS))
    crank = rng.uniform(-0.16, 0.16)
    px = _joints(pen, rider, {
        "hip": (-0.20, 0.58 * h, 0), "neck": (0.10, 0.77 * h, 0), "head": (0.24, 0.93 * h, 0),
        "knee_l": (0.18, 0.42 * h + crank, 0.12), "knee_r": (0.18, 0.42 * h - crank, -0.12),
        "foot_l": (0.02, 0.30 + crank, 0.13), "foot_r": (0.02, 0.30 - crank, -0.13),
        "arm_l": (0.13, 0.80 * h, 0.18), "arm_r": (0.13, 0.80 * h, -0.18),
        "hand_l": (0.46, 1.02, 0.24), "hand_r": (0.46, 1.02, -0.24),
    })  # fmt: skip
    shirt, trousers = pick(rng, CLOTHES), pick(rng, CLOTHES)
    for side in "lr":
        _limb(pen, px, f"hip knee_{side} foot_{side}", 0.14, trousers)
        _limb(pen, px, f"arm_{side} hand_{side}", 0.09, shirt)
    _limb(pen, px, "hip neck", 0.30, shirt)
    pen.disc(px["head"], 0.125, pick(rng, PAINTS))
    skin = SKINS[int(rng.integers(len(SKINS)))]
    pen.disc(px["head"] + (0, 0.05 * pen.scale), 0.085, skin)


def draw_bicycle(pen: Pen, pose: Pose, colour: Colour) -> None:
    """Draw a bicycle; without a rider it is a distractor that resembles a road user."""
    angles = np.linspace(0, 2 * np.pi, 17)
    for ahead in (-0.53, 0.53):
        local = np.column_stack(
            [ahead + 0.32 * np.cos(angles), 0.34 + 0.32 * np.sin(angles), 0 * angles]
        )
        pen.path(pen.project(pose, local), 0.06, RUBBER)
    frame = np.array([
        (-0.53, 0.34, 0), (-0.10, 0.30, 0), (0.36, 0.80, 0), (-0.18, 0.82, 0), (-0.10, 0.30, 0),
        (-0.18, 0.82, 0), (-0.53, 0.34, 0), (-0.18, 0.82, 0), (0.36, 0.80, 0), (0.53, 0.34, 0),
        (0.38, 1.0, 0), (0.42, 1.02, 0.25), (0.42, 1.02, -0.25),
    ])  # fmt: skip
    pen.path(pen.project(pose, frame), 0.055, colour)
