"""The camera, the light and the canvas on which the synthetic road scenes are drawn.

World frame, as KITTI's camera frame but with heights counted from the ground: X right, Y up,
Z ahead, in metres. Pixels here are those of the supersampled canvas. Shapes: N points.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, exp, sin

import cv2
import numpy as np

Colour = tuple[float, float, float]  # blue, green, red; 0..255 in full daylight
NEAR = 0.8  # metres; what is nearer is projected as if it stood here
UP_IS_NEGATIVE = np.array([1.0, -1.0])  # image rows count downwards


@dataclass(frozen=True)
class Camera:
    """A level pinhole camera; pitch is expressed by moving the `horizon` row.

    focal, column, horizon: canvas pixels; height: metres above the ground.
    """

    focal: float
    column: float
    horizon: float
    height: float

    def project(self, world_n3: np.ndarray) -> np.ndarray:
        """Project (N, 3) metres to (N, 2) pixels; depths below `NEAR` count as `NEAR`."""
        scale = self.focal / np.maximum(world_n3[:, 2:], NEAR)
        flat = (world_n3[:, :2] - (0.0, self.height)) * UP_IS_NEGATIVE
        return flat * scale + (self.column, self.horizon)


@dataclass(frozen=True)
class Light:
    """Lighting and atmosphere: `tint` multiplies colours, `haze` replaces them with distance.

    visibility: metres at which 63 % of a colour is lost to the haze.
    """

    tint: Colour
    haze: Colour
    visibility: float
    lamps: bool  # headlights, tail lights and some windows are lit


@dataclass(frozen=True)
class Pose:
    """Pose of an object: ground point (x, z) in metres, KITTI yaw `ry` (0 = heading right)."""

    x: float
    z: float
    ry: float

    def place(self, local_n3: np.ndarray) -> np.ndarray:
        """Turn (N, 3) local points (ahead, up, to the left) into world points."""
        c, s = cos(self.ry), sin(self.ry)
        turn = np.array([(c, 0.0, -s), (0.0, 1.0, 0.0), (s, 0.0, c)])
        return local_n3 @ turn + (self.x, 0.0, self.z)


@dataclass(frozen=True)
class Canvas:
    """The supersampled picture, (H, W, 4) uint8: blue, green, red and the owner of each pixel.

    With the owner as a fourth channel one call of cv2 paints a shape and claims its pixels, so
    silhouettes and pictures cannot disagree. Owner 0 is nobody.
    """

    pixels: np.ndarray
    camera: Camera
    light: Light

    @property
    def height(self) -> int:
        """Rows."""
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        """Columns."""
        return self.pixels.shape[1]


class Pen:
    """Draw one object at one depth (metres) over the canvas and assign its pixels to the owner.

    Objects that are not road users have owner 0 and so occlude the road users behind them.
    """

    def __init__(self, canvas: Canvas, depth: float, owner: int = 0) -> None:
        self.canvas, self.owner = canvas, owner
        self.scale = canvas.camera.focal / max(depth, NEAR)  # pixels per metre
        self.clear = exp(-depth / canvas.light.visibility)

    def tone(self, colour: Colour, gain: float = 1.0) -> tuple[float, float, float, float]:
        """Return the canvas value of `colour` in this light and haze, `gain` times as bright."""
        (tb, tg, tr), (hb, hg, hr) = self.canvas.light.tint, self.canvas.light.haze
        keep, lose = self.clear, 1.0 - self.clear
        return (
            min(255.0, colour[0] * gain * tb) * keep + hb * lose,
            min(255.0, colour[1] * gain * tg) * keep + hg * lose,
            min(255.0, colour[2] * gain * tr) * keep + hr * lose,
            self.owner,
        )

    def project(self, pose: Pose, local_n3: np.ndarray) -> np.ndarray:
        """Return the pixels, (N, 2), of local points of a thing at `pose`."""
        return self.canvas.camera.project(pose.place(local_n3))

    def area(self, pixels_n2: np.ndarray, colour: Colour, gain: float = 1.0) -> None:
        """Fill a polygon given in pixels."""
        cv2.fillPoly(self.canvas.pixels, [_whole(pixels_n2)], self.tone(colour, gain))

    def areas(self, pixels_kn2: np.ndarray, colour: Colour) -> None:
        """Fill many polygons of one colour: (K, N, 2) pixels."""
        cv2.fillPoly(self.canvas.pixels, list(_whole(pixels_kn2)), self.tone(colour))

    def path(self, pixels_n2: np.ndarray, width: float, colour: Colour) -> None:
        """Draw an open line through pixels, `width` metres thick, with round ends."""
        thick = max(1, round(width * self.scale))
        cv2.polylines(self.canvas.pixels, [_whole(pixels_n2)], False, self.tone(colour), thick)

    def disc(self, pixel_2: np.ndarray, radius: float, colour: Colour) -> None:
        """Draw a disc around a pixel, `radius` in metres."""
        x, y = pixel_2.tolist()
        reach = max(1, round(radius * self.scale))
        cv2.circle(self.canvas.pixels, (round(x), round(y)), reach, self.tone(colour), -1)


def _whole(pixels: np.ndarray) -> np.ndarray:
    return np.rint(pixels).astype(np.int32)


def pick(rng: np.random.Generator, palette: tuple[Colour, ...], spread: float = 14.0) -> Colour:
    """Return a colour of the palette, moved by up to `spread` per channel."""
    which, b, g, r = rng.random(4).tolist()
    colour = palette[int(which * len(palette))]
    return (
        min(max(colour[0] + spread * (2 * b - 1), 8.0), 250.0),
        min(max(colour[1] + spread * (2 * g - 1), 8.0), 250.0),
        min(max(colour[2] + spread * (2 * r - 1), 8.0), 250.0),
    )


def draw_prism(
    pen: Pen, pose: Pose, profile_n2: np.ndarray, half_n: np.ndarray, colour: Colour
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a side view `profile_n2` (metres ahead, up) pulled to both sides by `half_n` metres.

    The profile runs over the top from the rear's foot to the front's foot. Returns the pixels of
    the left and the right outline, (N, 2) each. Faces turned away are left out; the others are
    painted from far to near, which is exact for convex bodies and nearly so for cars.
    """
    count = len(profile_n2)
    local = np.empty((2 * count, 3))
    local[:count, :2] = local[count:, :2] = profile_n2
    local[:count, 2], local[count:, 2] = half_n, -half_n
    world = pose.place(local)
    pixels = pen.canvas.camera.project(world)
    left, right = pixels[:count], pixels[count:]
    depth = world[:, 2].tolist()
    faces = [
        (sum(depth[:count]) / count, left[::-1], 0.92),
        (sum(depth[count:]) / count, right, 0.92),
    ]
    outline = profile_n2.tolist()
    for i in range(count - 1):
        corners = [i, i + 1, count + i + 1, count + i]
        along = abs(outline[i + 1][0] - outline[i][0])
        rise = abs(outline[i + 1][1] - outline[i][1])
        gain = 0.72 + 0.38 * along / (along + rise + 1e-6)  # upward faces are brighter
        faces.append((sum(depth[c] for c in corners) / 4, pixels[corners], gain))
    for _, face, gain in sorted(faces, key=lambda item: -item[0]):
        if turned_to_camera(face):
            pen.area(face, colour, gain)
    return left, right


def turned_to_camera(face_n2: np.ndarray) -> bool:
    """Return whether a projected face is seen from outside (clockwise on the screen)."""
    corners = face_n2.tolist()
    area, (x0, y0) = 0.0, corners[-1]
    for x, y in corners:
        area += x0 * y - x * y0
        x0, y0 = x, y
    return area > 0
