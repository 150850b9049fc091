"""Hair: behind the head, on it, and where it should not be."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .canvas import Canvas, Colour, mix, opened, shade
from .face_head import MIDDLE, outline
from .face_shape import Face

_TURN = np.linspace(0, 4.6, 7)
SILVER = (232, 226, 210)


def hair_colour(face: Face) -> tuple[float, float, float]:
    return SILVER if face.has("pale_hair") else face.hair


def draw_hair_behind(canvas: Canvas, face: Face, rng: np.random.Generator) -> None:
    """What falls behind ears and neck; none on a short head of hair, little on a sparse one."""
    if face.style not in ("bob", "long") or face.has("sparse_hair"):
        return
    low = 0.74 if face.style == "bob" else 0.93
    wide = face.cheekbone + (0.075 if face.has("curly_hair") else 0.050)
    colour = shade(hair_colour(face), 0.82)
    right = [
        (0.09, face.top - 0.01),
        (max(face.forehead, 0.20) * 0.86, face.top + 0.06),
        (wide * 0.94, 0.30),
        (wide, 0.50),
        (wide * 1.02, low - 0.10),
        (wide * 0.86, low),
    ]
    points = [(MIDDLE + x, y) for x, y in right] + [(MIDDLE - x, y) for x, y in reversed(right)]
    canvas.blob(points, colour)
    if face.has("curly_hair"):
        edge = [(MIDDLE + s * wide * 0.98, y) for s in (-1, 1) for y in np.arange(0.34, low + 0.01, 0.030)]
        _draw_curls(canvas, np.asarray(edge), 0.030, colour, rng)
        return
    for side in (-1, 1):
        for a in rng.random(6):
            x = wide * (0.80 + 0.20 * a)
            canvas.hair(
                [(MIDDLE + side * x * 0.95, 0.30), (MIDDLE + side * x, 0.5), (MIDDLE + side * x * 0.98, low - 0.06)],
                0.004,
                shade(colour, 0.80 + 0.35 * a),
            )


def _hairline(face: Face) -> NDArray[np.float64]:
    """The edge between forehead and hair, right to left: (n, 2)."""
    y = face.top + face.hairline
    side_y = max(face.eye_y - 0.045, y + 0.03)
    low = face.has("low_hairline")
    row = [
        (face.temple * 1.04, side_y + 0.025),
        (face.temple * (0.86 if low else 0.93), (y * 0.45 + side_y * 0.55)),
        (face.forehead * 0.66, y + (0.012 if low else 0.026)),
        (face.forehead * 0.30, y + 0.002),
    ]
    middle = [(0.0, y)]
    if face.has("widows_peak"):
        row = [
            *row[:2],
            (face.forehead * 0.66, y - 0.005),
            (face.forehead * 0.34, y - 0.022),
            (face.forehead * 0.14, y + 0.030),
        ]
        middle = [(0.0, y + 0.105)]
    points = row + middle + [(-px, py) for px, py in reversed(row)]
    line: NDArray[np.float64] = opened([(MIDDLE + px, py) for px, py in points])
    return line


def _scalp(face: Face, thick: float) -> NDArray[np.float64]:
    """The outer edge of the hair, left to right over the crown: (n, 2)."""
    edge = outline(face)
    half = edge[edge[:, 1] < face.eye_y - 0.02]
    half = half[np.argsort(np.arctan2(half[:, 0] - MIDDLE, face.eye_y - half[:, 1]))]
    centre = np.array([MIDDLE, face.eye_y])
    away = half - centre
    length = np.hypot(away[:, 0], away[:, 1])[:, None]
    grown: NDArray[np.float64] = half + away / length * thick * np.clip((face.eye_y - half[:, 1:]) / 0.20, 0.35, 1)
    return grown


def draw_hair(canvas: Canvas, face: Face, rng: np.random.Generator) -> None:
    """The cap of hair between the outer edge and the hairline."""
    colour = hair_colour(face)
    if face.has("sparse_hair"):
        _draw_sparse(canvas, face, colour, rng)
    else:
        thick = face.hair_thick * (0.6 if face.style == "crop" else 1.0) + (0.022 if face.has("curly_hair") else 0.0)
        edge, line = _scalp(face, thick), _hairline(face)
        canvas.area(np.concatenate([edge, line]), colour)
        if face.has("curly_hair"):
            _draw_curls(canvas, edge[::2], 0.024, colour, rng)
            front = line[::-1][np.linspace(0, len(line) - 1, len(edge[::3])).astype(int)]
            for share in (0.3, 0.65, 0.95):
                _draw_curls(canvas, edge[::3] * (1 - share) + front * share, 0.019, colour, rng)
        else:
            _draw_strands(canvas, face, edge, line, colour, rng)
    if face.has("white_forelock"):
        _draw_forelock(canvas, face)
    if face.has("hairy_face"):
        _draw_face_hair(canvas, face, colour, rng)


def _draw_strands(
    canvas: Canvas,
    face: Face,
    edge: NDArray[np.float64],
    line: NDArray[np.float64],
    colour: Colour,
    rng: np.random.Generator,
) -> None:
    """Lines combed from a parting to the hairline, some lighter and some darker."""
    n = 44
    root_x = MIDDLE + 0.07 * (1 if face.light > 0 else -1)
    ends = line[::-1][np.linspace(1, len(line) - 2, n).astype(int)]
    tops = edge[np.linspace(1, len(edge) - 2, n).astype(int)]
    for (ex, ey), (tx, ty), a in zip(ends, tops, rng.random(n), strict=True):
        if abs(ex - MIDDLE) > face.temple * 0.9:
            continue
        tone = shade(colour, 0.74 + 0.2 * a) if a < 0.62 else mix(colour, (255, 246, 226), 0.07 + 0.14 * (a - 0.62))
        start = (tx + (root_x - tx) * 0.10, ty + 0.006)
        canvas.hair(
            [start, ((start[0] + ex) / 2 + (ex - MIDDLE) * 0.12, (start[1] + ey) / 2 - 0.004), (ex, ey)], 0.0036, tone
        )


def _draw_curls(
    canvas: Canvas, places: NDArray[np.float64], radius: float, colour: Colour, rng: np.random.Generator
) -> None:
    for (x, y), (a, b, c) in zip(places, rng.random((len(places), 3)), strict=True):
        r, cx, cy = radius * (0.8 + 0.4 * a), x + 0.012 * (b - 0.5), y + 0.012 * (c - 0.5)
        canvas.disc(cx, cy, r, r, shade(colour, 0.90 + 0.12 * b))
        ring = [(cx + r * 0.66 * np.cos(t), cy + r * 0.66 * np.sin(t)) for t in _TURN + 6 * a]
        canvas.hair(ring, 0.0055, mix(colour, (255, 240, 214), 0.22) if a > 0.4 else shade(colour, 0.58))


def _draw_sparse(canvas: Canvas, face: Face, colour: Colour, rng: np.random.Generator) -> None:
    """Single thin hairs over a scalp that shines through."""
    edge, line = _scalp(face, 0.010), _hairline(face)
    n = 26
    tops = edge[np.linspace(2, len(edge) - 3, n).astype(int)]
    ends = line[::-1][np.linspace(2, len(line) - 3, n).astype(int)]
    for (tx, ty), (ex, ey), (a, b) in zip(tops, ends, rng.random((n, 2)), strict=True):
        end = (tx + (ex - tx) * (0.45 + 0.4 * a) + 0.02 * (b - 0.5), ty + (ey - ty) * (0.45 + 0.4 * a))
        canvas.hair(
            [(tx, ty), ((tx + end[0]) / 2 + 0.012 * (b - 0.5), (ty + end[1]) / 2), end],
            0.003,
            mix(colour, face.skin, 0.25),
        )


def _draw_forelock(canvas: Canvas, face: Face) -> None:
    y = face.top + face.hairline
    rise = face.top - face.hair_thick * 0.45
    lock = [
        (-0.046, rise + 0.004),
        (0.0, rise),
        (0.036, rise + 0.008),
        (0.046, (face.top + y) / 2),
        (0.016, y + 0.022),
        (-0.020, y + 0.010),
        (-0.044, (face.top + y) / 2),
    ]
    white = [(MIDDLE + 0.015 + x, py) for x, py in lock]
    canvas.blob(white, (246, 244, 240))
    for dx in (-0.02, -0.004, 0.012):
        canvas.hair([(MIDDLE + 0.015 + dx, face.top - 0.01), (MIDDLE + 0.018 + dx * 0.8, y)], 0.003, (206, 202, 198))


def _draw_face_hair(canvas: Canvas, face: Face, colour: Colour, rng: np.random.Generator) -> None:
    """Fine dark hair down the temples, over the cheeks and on the forehead."""
    tone = (*mix(colour, shade(face.skin, 0.35), 0.25), 225)
    for side in (-1, 1):
        for a, b, c in rng.random((46, 3)):
            y = face.eye_y - 0.05 + 0.30 * a
            x = face.cheek * (0.96 - 0.40 * b * b) - 0.05 * max(0.0, a - 0.6)
            canvas.hair([(MIDDLE + side * x, y), (MIDDLE + side * (x - 0.006 + 0.006 * c), y + 0.022)], 0.003, tone)
    y = face.top + face.hairline
    for a, b, c in rng.random((34, 3)):
        x = (2 * a - 1) * face.forehead * 0.82
        start = y + 0.02 + (face.brow_y - 0.035 - y) * b * 0.9
        canvas.hair([(MIDDLE + x, start), (MIDDLE + x * 0.94, start + 0.014 + 0.01 * c)], 0.0028, tone)
    for side in (-1, 1):
        for a, b in rng.random((9, 2)):
            x, top = side * (0.012 + 0.058 * a), face.mouth_y - face.upper_lip - 0.024 + 0.012 * b
            canvas.hair([(MIDDLE + x, top), (MIDDLE + x + side * 0.006, top + 0.013)], 0.0028, tone)
