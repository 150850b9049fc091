"""Eyes, lids, lashes and brows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .canvas import Canvas, Colour, Relief, closed, mix, opened, shade
from .face_head import MIDDLE, sag
from .face_shape import Face

_UPPER = [(-1.0, 0.22), (-0.62, -0.55), (-0.05, -1.0), (0.55, -0.72), (1.0, 0.0)]
_LOWER = [(1.0, 0.0), (0.62, 0.62), (0.05, 0.88), (-0.6, 0.66), (-1.0, 0.22)]


class Eye:
    """The place of one eye: u runs from the inner corner (-1) to the outer (1), v from the upper lid to the lower."""

    def __init__(self, face: Face, side: int) -> None:
        self.face, self.side = face, side
        self.x = MIDDLE + side * face.eye_dx
        self.y = face.eye_y + sag(face, side * face.eye_dx, face.eye_y) * 1.3
        self.turn = np.cos(face.slant), np.sin(face.slant)

    def at(self, points: list[tuple[float, float]], lift: float = 0.0) -> NDArray[np.float64]:
        p = np.asarray(points, dtype=np.float64) * (self.face.eye_width, self.face.eye_height)
        x = p[:, 0] * self.turn[0] + p[:, 1] * self.turn[1]
        y = p[:, 1] * self.turn[0] - p[:, 0] * self.turn[1]
        return np.stack([self.x + self.side * x, self.y + y - lift], axis=1)

    def upper(self, raised: float = 0.0) -> NDArray[np.float64]:
        """The edge of the upper lid; a drooping lid hangs over the pupil."""
        drop = 0.86 if self.face.has("drooping_lids") else 0.0
        return self.at([(u, v + (drop - raised) * (1 - u * u)) for u, v in _UPPER])

    def lower(self) -> NDArray[np.float64]:
        return self.at(_LOWER)


def draw_eyes(canvas: Canvas, face: Face) -> None:
    ball = Canvas(canvas.size, canvas.view, canvas.fine)
    for side in (-1, 1):
        eye = Eye(face, side)
        _draw_lid_skin(canvas, eye)
        _draw_ball(ball, eye)
        opening = np.concatenate([opened(eye.upper()), opened(eye.lower())])
        canvas.paste(ball, opening)
        _draw_lids(canvas, eye)
        if face.has("epicanthus"):
            _draw_fold(canvas, eye)
        if face.has("long_lashes"):
            _draw_long_lashes(canvas, eye)
        if face.has("eye_bags"):
            _draw_bags(canvas, eye)


def _draw_ball(ball: Canvas, eye: Eye) -> None:
    """The white, the iris and the pupil, to be cut out by the lids."""
    face, r = eye.face, eye.face.iris_radius
    white = (128, 164, 222) if face.has("blue_sclerae") else mix((246, 244, 240), face.skin, 0.06)
    w = face.eye_width * 1.2
    ball.area(
        [(eye.x - w, eye.y - 0.08), (eye.x + w, eye.y - 0.08), (eye.x + w, eye.y + 0.08), (eye.x - w, eye.y + 0.08)],
        white,
    )
    inward = 0.56 * face.eye_width if face.has("strabismus") and eye.side == 1 else 0.0
    x, y = eye.x - eye.side * inward, eye.y - face.eye_height * 0.10
    colour = face.iris
    if face.has("two_iris_colours"):
        colour = (92, 158, 214) if eye.side == 1 else (84, 52, 30)
    if face.has("iris_coloboma"):
        colour = mix(colour, (176, 150, 96), 0.5)
    ball.disc(x, y, r, r, shade(colour, 0.55))
    ball.disc(x, y, r * 0.84, r * 0.84, colour)
    if face.has("iris_coloboma"):
        ball.area([(x - r * 0.40, y), (x + r * 0.40, y), (x + r * 0.62, y + r), (x - r * 0.62, y + r)], (10, 8, 8))
    ball.disc(x, y, r * 0.43, r * 0.43, (14, 10, 10))
    ball.disc(x - r * 0.28, y - r * 0.34, r * 0.20, r * 0.20, (255, 255, 255))
    ball.stroke(
        eye.at([(-1, 0.2), (-0.6, -0.46), (0, -0.88), (0.6, -0.6), (1, 0)]),
        face.eye_height * 0.34,
        (*shade(white, 0.72),),
    )


def _draw_lid_skin(canvas: Canvas, eye: Eye) -> None:
    """The skin between the crease and the edge of the lid, darker where the lid droops or the eye lies deep."""
    face = eye.face
    if face.has("dark_eye_rings"):
        ring = closed([(u * 1.42, v * 2.3 + 0.35) for u, v in (*_UPPER[:-1], *_LOWER[:-1])])
        canvas.area(eye.at([tuple(p) for p in ring]), mix(shade(face.skin, 0.56), (70, 34, 62), 0.42))
    if face.has("bulging_eyes"):
        bulge = closed([(u * 1.16, v * 1.42) for u, v in (*_UPPER[:-1], *_LOWER[:-1])])
        canvas.area(eye.at([tuple(p) for p in bulge]), mix(face.skin, (255, 236, 226), 0.22))
    if face.has("drooping_lids"):
        skin = np.concatenate([opened(eye.upper(raised=1.5)), opened(eye.upper())[::-1]])
        canvas.area(skin, shade(face.skin, 0.90))


def _draw_lids(canvas: Canvas, eye: Eye) -> None:
    face = eye.face
    lash = mix(face.hair, (24, 16, 14), 0.7)
    canvas.stroke(eye.upper(), 0.0125, lash, (0.35, 0.6))
    canvas.stroke(eye.lower(), 0.0055, mix(shade(face.skin, 0.62), (120, 50, 45), 0.2), (0.5, 0.3))
    crease = 0.55 if not face.has("drooping_lids") else 1.62
    crease = 0.95 if face.has("bulging_eyes") else crease
    if not face.has("deep_set_eyes"):
        canvas.stroke(
            eye.upper(raised=crease)[:-1] if face.has("epicanthus") else eye.upper(raised=crease),
            0.0065,
            shade(face.skin, 0.66),
            (0.1, 0.2),
        )
    if face.has("bulging_eyes"):
        canvas.stroke(
            eye.at([(u, v + 0.48 * (1 - u * u)) for u, v in _LOWER]), 0.0065, shade(face.skin, 0.72), (0.1, 0.1)
        )
    if face.style in ("bob", "long") and not face.has("sparse_brows"):
        canvas.stroke(eye.at([(0.78, -0.5), (1.0, -0.18), (1.16, -0.22)]), 0.006, lash, (0.6, 0.0))


def _draw_fold(canvas: Canvas, eye: Eye) -> None:
    """A fold of skin from the upper lid over the inner corner."""
    face = eye.face
    fold = [(-1.38, -1.15), (-0.62, -1.12), (-0.34, -0.2), (-0.56, 0.72), (-1.02, 1.30), (-1.42, 0.7)]
    canvas.blob(eye.at(fold), mix(face.skin, shade(face.skin, 0.92), 0.5))
    edge = eye.at([(-0.30, -1.42), (-0.36, -0.75), (-0.42, 0.0), (-0.64, 0.72), (-1.10, 1.35)])
    canvas.stroke(edge, 0.0125, shade(face.skin, 0.55), (0.15, 0.2))


def _draw_long_lashes(canvas: Canvas, eye: Eye) -> None:
    lash = mix(eye.face.hair, (14, 10, 10), 0.85)
    root = opened(eye.upper())
    for place, lean in zip(np.linspace(3, len(root) - 1, 9).astype(int), np.linspace(-0.7, 1.25, 9), strict=True):
        x, y = root[place]
        tip = (x + eye.side * lean * 0.022, y - 0.034 + 0.010 * abs(lean))
        middle = (x + eye.side * lean * 0.006, y - 0.018)
        canvas.stroke([(x, y), middle, tip], 0.0062, lash, (1.0, 0.1))
    for place, lean in zip((8, 12, 16), (0.6, 0.1, -0.4), strict=True):
        x, y = opened(eye.lower())[place]
        canvas.hair([(x, y), (x + eye.side * lean * 0.012, y + 0.014)], 0.003, lash)


def _draw_bags(canvas: Canvas, eye: Eye) -> None:
    """Swollen skin below the eye, with a crease under it."""
    face = eye.face
    canvas.blob(
        eye.at([(-0.95, 0.75), (0, 1.25), (0.95, 0.55), (0.9, 1.5), (0.05, 2.45), (-0.9, 1.7)]),
        mix(face.skin, (255, 225, 215), 0.28),
    )
    canvas.stroke(
        eye.at([(-1.0, 1.25), (-0.6, 2.1), (0.05, 2.55), (0.7, 2.0), (1.05, 1.0)]),
        0.012,
        shade(face.skin, 0.60),
        (0.1, 0.1),
    )


def light_eyes(relief: Relief, face: Face) -> None:
    """The hollow around each eye."""
    for side in (-1, 1):
        eye = Eye(face, side)
        relief.spot(eye.x - side * face.eye_width * 0.8, eye.y - 0.028, 0.034, 0.026, -0.12)
        relief.spot(eye.x, eye.y - 0.030, face.eye_width, 0.020, -0.06)
        if face.has("deep_set_eyes"):
            relief.spot(eye.x, eye.y - 0.030, face.eye_width * 1.25, 0.034, -0.50)
            relief.spot(eye.x, eye.y + 0.028, face.eye_width * 1.2, 0.022, -0.24)
            relief.spot(eye.x, face.brow_y - 0.012, face.eye_width * 1.2, 0.018, 0.14)
        if face.has("bulging_eyes"):
            relief.spot(eye.x, eye.y - 0.062, face.eye_width, 0.014, -0.14)
            relief.spot(eye.x, eye.y + 0.066, face.eye_width, 0.014, -0.16)
        if face.has("drooping_lids"):
            relief.spot(eye.x, eye.y - 0.05, face.eye_width, 0.013, -0.08)


def draw_brows(canvas: Canvas, face: Face, rng: np.random.Generator) -> None:
    colour = mix(face.hair, shade(face.skin, 0.5), 0.22)
    if face.has("pale_hair"):
        colour = mix(face.hair, face.skin, 0.35)
    for side in (-1, 1):
        _draw_brow(canvas, face, side, colour, rng)
    if face.has("joined_brows"):
        _draw_join(canvas, face, colour, rng)


def _brow(face: Face, side: int) -> NDArray[np.float64]:
    """The middle line of a brow, from its inner end: (n, 2)."""
    inner, outer = face.eye_dx - 0.052, face.eye_dx + 0.068
    lean = 0.35 * np.sin(face.slant)
    y = face.brow_y + sag(face, side * face.eye_dx, face.brow_y) * 1.3
    rows = ((0.0, 0.004), (0.30, -0.55 * face.brow_arch), (0.62, -face.brow_arch), (1.0, 0.010 + 0.1 * face.brow_arch))
    return opened([(MIDDLE + side * (inner + t * (outer - inner)), y + dy - lean * (t - 0.5) * 0.1) for t, dy in rows])


def _draw_brow(canvas: Canvas, face: Face, side: int, colour: Colour, rng: np.random.Generator) -> None:
    path = _brow(face, side)
    if face.has("sparse_brows"):
        for x, y in path[2::3]:
            canvas.hair([(x, y + 0.004), (x + side * 0.010, y - 0.005)], 0.0032, mix(colour, face.skin, 0.45))
        return
    canvas.stroke(path, face.brow_thick, mix(colour, face.skin, 0.10), (0.55, 0.05))
    jitter = rng.random((len(path), 2))
    for (x, y), (a, b) in zip(path[:-3], jitter, strict=False):
        start = y + (a - 0.3) * face.brow_thick * 0.6
        canvas.hair(
            [(x, start), (x + side * 0.013, start - face.brow_thick * (0.25 + 0.35 * b))], 0.003, shade(colour, 0.85)
        )


def _draw_join(canvas: Canvas, face: Face, colour: Colour, rng: np.random.Generator) -> None:
    """Brow hair that runs on across the root of the nose."""
    half = max(face.eye_dx - 0.050, 0.018)
    y, thick = face.brow_y + 0.004, face.brow_thick * 0.80
    canvas.stroke(
        [(MIDDLE - half, y), (MIDDLE, y + 0.004), (MIDDLE + half, y)], thick, mix(colour, face.skin, 0.16), (1.0, 1.0)
    )
    for t, a in zip(np.linspace(-1, 1, 15), rng.random(15), strict=True):
        x = MIDDLE + t * half
        canvas.hair([(x, y + thick * 0.5), (x + t * 0.008, y - thick * (0.4 + 0.4 * a))], 0.0036, shade(colour, 0.85))
