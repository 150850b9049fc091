"""Marks on the skin: spots, stains, papules, wrinkles."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, mix, shade
from .face_head import MIDDLE, Path, mirrored, place
from .face_shape import Face


def draw_skin(canvas: Canvas, face: Face, rng: np.random.Generator) -> None:
    """Everything that lies on the skin and below brows, eyes and lips."""
    if face.has("facial_hemangioma"):
        _draw_stain(canvas, face)
    if face.has("wrinkled_skin"):
        _draw_wrinkles(canvas, face)
    if face.has("lentigines"):
        _draw_spots(canvas, face, rng)
    if face.has("angiofibromas"):
        _draw_papules(canvas, face, rng)
    if face.has("telangiectasia"):
        _draw_vessels(canvas, face, rng)


def _draw_stain(canvas: Canvas, face: Face) -> None:
    """A wine-red patch on the middle of the forehead that runs down to the nose."""
    y = face.brow_y
    patch = [
        (-0.010, y - 0.13),
        (0.05, y - 0.14),
        (0.085, y - 0.075),
        (0.050, y - 0.01),
        (0.030, y + 0.05),
        (0.012, y + 0.11),
        (-0.010, y + 0.06),
        (-0.045, y - 0.01),
        (-0.062, y - 0.08),
    ]
    canvas.blob([(MIDDLE + x, py) for x, py in patch], mix(face.skin, (176, 30, 62), 0.62))
    canvas.blob(
        [(MIDDLE + 0.012 + x * 0.5, y - 0.07 + (py - y + 0.07) * 0.5) for x, py in patch],
        mix(face.skin, (160, 20, 56), 0.74),
    )


def _draw_wrinkles(canvas: Canvas, face: Face) -> None:
    """Furrows of the forehead, folds beside nose and mouth, lines around the eyes."""
    dark = shade(face.skin, 0.62)
    top = max(face.top + face.hairline + 0.035, face.brow_y - 0.12)
    for k, y in enumerate(np.linspace(top, face.brow_y - 0.030, 4)):
        half = 0.12 + 0.012 * k
        furrow = mirrored([(half, y + 0.010), (half / 2, y), (0.0, y + 0.006)])
        canvas.stroke(place(face, furrow), 0.0075, dark, (0, 0))
    for line, width in _side_lines(face):
        for side in (-1, 1):
            canvas.stroke([(MIDDLE + side * x, y) for x, y in line], width, dark, (0.1, 0.1))


def _side_lines(face: Face) -> list[tuple[Path, float]]:
    """The wrinkles of one half of the face, each with its width."""
    nose, mouth, eye_y = face.nose_width, face.mouth_width, face.eye_y
    x = face.eye_dx + face.eye_width + 0.014
    lines: list[tuple[Path, float]] = [
        (
            [
                (nose + 0.006, face.nose_y - 0.022),
                (nose + 0.036, face.nose_y + 0.035),
                (mouth + 0.026, face.mouth_y + 0.035),
            ],
            0.011,
        ),
        ([(mouth + 0.012, face.mouth_y + 0.02), (mouth + 0.002, face.mouth_y + 0.075)], 0.008),
        ([(0.013, face.brow_y - 0.02), (0.010, face.brow_y + 0.012)], 0.006),
    ]
    for lean in (-0.5, 0.1, 0.7):
        lines.append(([(x + dx, eye_y + dy * lean) for dx, dy in ((0, 0.014), (0.020, 0.024), (0.034, 0.040))], 0.006))
    for drop in (0.050, 0.072):
        bag = ((-0.05, -0.006), (0.0, 0.008), (0.052, -0.008))
        lines.append(([(face.eye_dx + dx, eye_y + drop + dy) for dx, dy in bag], 0.006))
    return lines


def _scatter(face: Face, rng: np.random.Generator, n: int, top: float, low: float) -> list[tuple[float, float, float]]:
    """Places on the bare skin of the face, each with a number of 0..1 for its size."""
    draws = rng.random((n, 3))
    y = top + (low - top) * draws[:, 0]
    half = np.where(y < face.nose_y, face.temple * 0.88, face.temple * 0.88 - (y - face.nose_y) * 0.55)
    return list(zip(MIDDLE + half * (2 * draws[:, 1] - 1), y, draws[:, 2], strict=True))


def _draw_spots(canvas: Canvas, face: Face, rng: np.random.Generator) -> None:
    brown = mix(shade(face.skin, 0.34), (64, 34, 22), 0.45)
    for x, y, a in _scatter(face, rng, 70, face.top + face.hairline + 0.01, face.chin - 0.03):
        r = 0.0055 + 0.0065 * a
        canvas.disc(x, y, r, r * 0.9, brown)
    for a, b in rng.random((14, 2)):
        canvas.disc(MIDDLE + face.neck * (2 * a - 1) * 0.8, face.chin + 0.035 + 0.08 * b, 0.007, 0.006, brown)


def _draw_papules(canvas: Canvas, face: Face, rng: np.random.Generator) -> None:
    """Red knobs over nose, cheeks and chin, like wings of a butterfly."""
    for a, b, c in rng.random((48, 3)):
        side = 1 if a > 0.5 else -1
        x = MIDDLE + side * (0.010 + 0.150 * b)
        y = face.nose_y - 0.105 + 0.090 * c + 0.05 * b
        r = 0.0080 + 0.0055 * c
        canvas.disc(x + 0.002, y + 0.003, r, r, mix(shade(face.skin, 0.6), (130, 30, 30), 0.4))
        canvas.disc(x, y, r * 0.85, r * 0.85, mix(face.skin, (206, 62, 58), 0.68))
        canvas.disc(x - r * 0.25, y - r * 0.3, r * 0.28, r * 0.28, mix(face.skin, (255, 206, 196), 0.7))


def _draw_vessels(canvas: Canvas, face: Face, rng: np.random.Generator) -> None:
    """Widened small vessels on reddened cheeks and nose."""
    for side in (-1, 1):
        cx, cy = MIDDLE + side * 0.135, face.nose_y - 0.020
        canvas.disc(cx, cy, 0.062, 0.046, mix(face.skin, (214, 70, 70), 0.34))
        for a, b, c in rng.random((9, 3)):
            x, y = cx + 0.10 * (a - 0.5), cy + 0.066 * (b - 0.5)
            turn = 6.28 * c
            path = [
                (x + t * np.cos(turn) + 0.006 * np.sin(400 * t), y + t * np.sin(turn))
                for t in (0.0, 0.010, 0.020, 0.030)
            ]
            canvas.line(path, 0.0042, mix(face.skin, (168, 14, 34), 0.85))
