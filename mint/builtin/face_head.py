"""Shoulders, neck, ears and the outline of the head, with the light that falls on them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .canvas import Canvas, Colour, Relief, closed, mix, shade
from .face_shape import Face

MIDDLE = 0.5
Path = list[tuple[float, float]]


def outline(face: Face) -> NDArray[np.float64]:
    """The head without hair and ears, clockwise from the crown: (n, 2)."""
    brow = face.eye_y - 0.10
    rise = brow - 0.02 - face.top
    dome = [(t, brow - 0.02 - rise * (1 - t**face.crown) ** (1 / face.crown)) for t in (0.28, 0.52, 0.73, 0.89, 0.975)]
    right = [
        *((face.forehead * t, y) for t, y in dome),
        (face.temple, brow + 0.03),
        (face.cheekbone, face.eye_y + 0.05),
        (face.cheek, face.nose_y + 0.015),
        (face.jaw, face.chin - 0.085),
        (face.chin_width, face.chin - 0.014),
    ]
    points = [(0.0, face.top), *right, (0.0, face.chin), *((-x, y) for x, y in reversed(right))]
    return closed([(MIDDLE + x, y + sag(face, x, y)) for x, y in points])


def sag(face: Face, x: float, y: float) -> float:
    """How far a point of the face hangs because one half is lower than the other; nothing above the forehead."""
    return face.skew * min(1.0, max(-1.0, x / 0.11)) * min(1.0, max(0.0, (y - 0.30) / 0.30)) * 0.5


def place(face: Face, points: Path) -> Path:
    """Points given from the middle line of the face, set on it."""
    return [(MIDDLE + x, y + sag(face, x * 1.6, y)) for x, y in points]


def mirrored(half: Path) -> Path:
    """A symmetric line: one half, outside to middle, and its mirror image from the middle on."""
    return [*half, *((-x, y) for x, y in reversed(half) if x)]


def draw_body(canvas: Canvas, face: Face) -> None:
    """Shoulders and neck, behind the head."""
    neck, low = face.neck, face.shoulder
    if face.has("webbed_neck"):
        _draw_webs(canvas, face)
    _draw_across(canvas.area, [(neck * 1.12, low + 0.06), (neck * 0.95, face.chin - 0.12)], face.skin)
    _draw_across(canvas.blob, [(0.48, 1.1), (0.44, low + 0.055), (neck * 1.25, low), (0.0, low + 0.03)], face.cloth)
    throat = [(neck * 1.12, low - 0.012), (0.0, low - 0.03)]
    _draw_across(canvas.blob, [(0.0, low + 0.052), *throat], face.skin)
    collar = mirrored([(neck * 1.15, low - 0.005), (0.0, low + 0.055)])
    canvas.stroke([(MIDDLE + x, y) for x, y in collar], 0.014, shade(face.cloth, 0.8))


def _draw_across(draw: Callable[[Path, Colour], None], half: Path, colour: Colour) -> None:
    draw([(MIDDLE + x, y) for x, y in mirrored(half)], colour)


def _draw_webs(canvas: Canvas, face: Face) -> None:
    """Skin that runs from behind the ears straight down to the shoulders."""
    low = face.shoulder
    _draw_across(canvas.area, [(0.42, low + 0.07), (0.32, low), (0.245, 0.76), (0.215, 0.64)], face.skin)
    for side in (-1, 1):
        crease = [(MIDDLE + side * x, y) for x, y in ((0.185, 0.74), (0.20, 0.84), (0.26, low + 0.01))]
        canvas.stroke(crease, 0.018, shade(face.skin, 0.80))


def draw_ears(canvas: Canvas, face: Face) -> None:
    for side in (-1, 1):
        _draw_ear(canvas, face, side)


# One ear, from its root (u = 0) outwards and from top (v = -1) to lobe (v = 1): shell, rim, hollow.
_EAR: tuple[Path, Path, Path] = (
    [(-0.5, -0.75), (0.1, -1.0), (0.95, -0.78), (1.12, -0.25), (0.80, 0.25), (0.52, 0.75), (0.10, 1.0), (-0.4, 0.8)],
    [(-0.1, -0.62), (0.35, -0.74), (0.78, -0.45), (0.72, -0.02), (0.45, 0.32)],
    [(0.0, -0.35), (0.38, -0.40), (0.42, 0.05), (0.12, 0.42), (-0.1, 0.2)],
)
_SMALL_EAR: tuple[Path, Path, Path] = (
    [(-0.5, -0.9), (0.5, -0.9), (0.9, 0.0), (0.6, 0.8), (-0.4, 0.9)],
    [(0.1, -0.3), (0.4, 0.0), (0.2, 0.4)],
    [],
)


def _draw_ear(canvas: Canvas, face: Face, side: int) -> None:
    high, wide = face.ear_height, face.ear_width
    edge = face.cheekbone if face.ear_y < face.eye_y + 0.09 else (face.cheekbone + face.cheek) / 2
    turn = np.cos(face.ear_tilt), np.sin(face.ear_tilt)
    shell, rim, hollow = _SMALL_EAR if face.has("small_ears") else _EAR

    def on_ear(points: Path) -> Path:
        local = [(u * wide + 0.006, v * high) for u, v in points]
        turned = [(x * turn[0] - y * turn[1] * 0.75, x * turn[1] * 0.9 + y * turn[0]) for x, y in local]
        return [(MIDDLE + side * (edge - 0.004 + x), face.ear_y + y + sag(face, side * 0.2, 0.5)) for x, y in turned]

    canvas.blob(on_ear(shell), shade(face.skin, 0.93))
    if hollow:
        canvas.blob(on_ear(hollow), mix(shade(face.skin, 0.66), (150, 70, 60), 0.15))
    canvas.stroke(on_ear(rim), 0.010, shade(face.skin, 0.72))


def draw_ear_tags(canvas: Canvas, face: Face) -> None:
    """Knobs of skin in front of the ear, on one side."""
    if not face.has("ear_tags"):
        return
    x, y = MIDDLE + face.cheekbone - 0.026, face.ear_y + 0.02 + sag(face, 0.2, 0.5)
    for dx, dy, r in ((0.0, 0.0, 0.024), (-0.034, 0.048, 0.019)):
        canvas.disc(x + dx + 0.004, y + dy + 0.006, r * 1.08, r * 1.08, shade(face.skin, 0.46))
        canvas.disc(x + dx, y + dy, r, r, mix(face.skin, (236, 140, 128), 0.50))
        canvas.disc(x + dx - 0.004, y + dy - 0.005, r * 0.45, r * 0.4, mix(face.skin, (255, 240, 232), 0.65))


def draw_head(canvas: Canvas, face: Face) -> None:
    canvas.area(outline(face), face.skin)


def light_head(relief: Relief, face: Face) -> None:
    """Roundness of head and neck, and the marks of bone: brow, cheek, jaw, forehead."""
    lit = MIDDLE + 0.07 * face.light
    relief.spot(lit, 0.36, 0.24, 0.28, 0.05)
    for side in (-1, 1):
        away = 0.12 + 0.07 * side * -face.light
        relief.spot(MIDDLE + side * (face.cheekbone + 0.015), 0.56, 0.075, 0.24, -away)
        relief.spot(MIDDLE + side * face.cheek * 0.62, face.nose_y - 0.045, 0.07, 0.05, 0.045)
        relief.spot(MIDDLE + side * (face.jaw + 0.02), face.chin - 0.03, 0.04, 0.07, -0.10)
    relief.spot(MIDDLE, face.chin + 0.030, 0.16, 0.055, -0.24)
    _light_chin(relief, face)
    _light_forehead(relief, face)
    _light_cheeks(relief, face)


def _light_chin(relief: Relief, face: Face) -> None:
    lip = face.mouth_y + face.lower_lip
    relief.spot(MIDDLE, lip + 0.013, 0.06, 0.013, -0.13 - 0.12 * face.has("small_jaw"))
    relief.spot(MIDDLE, face.chin - 0.035, 0.05, 0.025, 0.06 + 0.13 * face.has("large_jaw"))


def _light_forehead(relief: Relief, face: Face) -> None:
    if face.has("frontal_bossing"):
        y = max((face.top + face.brow_y) / 2, face.top + face.hairline + 0.055)
        for side in (-1, 1):
            relief.spot(MIDDLE + side * 0.105, y, 0.062, 0.055, 0.34)
            relief.spot(MIDDLE + side * 0.215, y + 0.02, 0.035, 0.08, -0.20)
        relief.spot(MIDDLE, y, 0.026, 0.075, -0.18)
        relief.spot(MIDDLE, face.brow_y - 0.016, 0.17, 0.019, -0.32)


def _light_cheeks(relief: Relief, face: Face) -> None:
    for side in (-1, 1):
        if face.has("full_cheeks"):
            relief.spot(MIDDLE + side * 0.155, face.mouth_y - 0.02, 0.052, 0.060, 0.15)
            relief.trail(
                [(MIDDLE + side * x, y) for x, y in ((0.115, 0.655), (0.105, 0.70), (0.125, 0.755), (0.165, 0.775))],
                0.020,
                -0.12,
            )
        if face.has("flat_midface"):
            relief.spot(MIDDLE + side * 0.135, face.eye_y + 0.095, 0.075, 0.040, -0.34)
            relief.trail(
                [(MIDDLE + side * x, face.eye_y + y) for x, y in ((0.05, 0.055), (0.11, 0.07), (0.17, 0.055))],
                0.016,
                -0.10,
            )
        if face.has("coarse_face"):
            relief.trail(
                [(MIDDLE + side * x, face.nose_y + y) for x, y in ((0.066, -0.02), (0.096, 0.03), (0.12, 0.085))],
                0.017,
                -0.20,
            )
            relief.spot(MIDDLE + side * 0.10, face.brow_y - 0.012, 0.075, 0.022, 0.17)
