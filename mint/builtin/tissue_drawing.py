"""What a tile is made of, drawn: ground, fibres, glands, fat, cells and their nuclei."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .canvas import Canvas, Colour, ellipse, mix, shade
from .tissue_facts import Tissue
from .tissue_layout import FIELD, Floats, Space, inside_any, place_cells, place_fibres, place_spaces, ring


@dataclass(frozen=True, slots=True)
class Stain:
    """The two dyes of one slide, its bare glass, and the light: nothing here depends on the tissue."""

    blue: Colour
    pink: Colour
    glass: Colour
    glow: float
    lean: float
    noise: float


def draw_stain(rng: np.random.Generator) -> Stain:
    a, b, c, d, e, f, g = rng.random(7)
    blue = mix((66, 46, 128), (112, 58, 142), a)
    pink = mix(mix((232, 150, 192), (226, 132, 160), b), (238, 186, 206), 0.6 * c)
    return Stain(
        blue, pink, mix((244, 240, 243), (236, 228, 238), d), 0.93 + 0.12 * e, 0.10 * (2 * f - 1), 0.012 + 0.014 * g
    )


def paint_tile(canvas: Canvas, facts: Tissue, stain: Stain, rng: np.random.Generator) -> None:
    body = mix(mix(stain.blue, stain.pink, 0.45 + 0.1 * facts.pink), stain.pink, facts.pink)
    spaces = place_spaces(facts, rng)
    fibres = place_fibres(facts, rng)
    _draw_fibres(canvas, facts, stain, fibres, rng)
    points, step = place_cells(facts, spaces, rng)
    _draw_cells(canvas, facts, stain, body, points, step, rng)
    for space in spaces:
        {"gland": _draw_gland, "fat": _draw_fat, "keratin": _draw_keratin}[space.kind](
            canvas, facts, stain, body, space, rng
        )
    _draw_lymphocytes(canvas, facts, stain, spaces, rng)
    _draw_pigment(canvas, facts, rng)


def ground(facts: Tissue, stain: Stain) -> Colour:
    """The colour between the cells: paler where there are few fibres."""
    return mix(mix(stain.pink, stain.glass, 0.50), stain.pink, 0.25 + 0.6 * facts.fibres)


def _draw_fibres(canvas: Canvas, facts: Tissue, stain: Stain, lines: list[Floats], rng: np.random.Generator) -> None:
    for line, a in zip(lines, rng.random(len(lines)), strict=True):
        tone = mix(stain.pink, stain.glass, 0.55 * a) if a > 0.45 else mix(stain.pink, stain.blue, 0.10 + 0.25 * a)
        canvas.hair(line, 0.006 + 0.018 * facts.fibres * a, tone)
        if a < 0.16 + 0.20 * facts.fibres:
            k = 2 + int(9 * a / 0.36)
            away = line[k + 1] - line[k]
            _draw_spindle(canvas, facts, stain, line[k], float(np.arctan2(away[1], away[0])))


def _draw_spindle(canvas: Canvas, facts: Tissue, stain: Stain, at: Floats, angle: float) -> None:
    half = 0.5 * facts.size / FIELD
    canvas.disc(at[0], at[1], half * 1.55, half * 0.42, shade(stain.blue, 0.92), angle)


def _draw_cells(
    canvas: Canvas, facts: Tissue, stain: Stain, body: Colour, points: Floats, step: float, rng: np.random.Generator
) -> None:
    """Cell bodies with their borders, the vessels between them, then the nuclei."""
    if facts.fibres < 0.9:
        rim = mix(body, shade(stain.pink, 0.62), 0.65 * facts.borders)
        inside = mix(body, stain.glass, 0.85 * facts.clear)
        keep = rng.random((len(points), 3))
        for (x, y), (a, b, c) in zip(points, keep, strict=True):
            if a < 1.1 - 0.75 * facts.fibres:
                outline = ellipse(x, y, step * (0.50 + 0.07 * b), step * (0.46 + 0.07 * c), 3 * a, 9)
                canvas.area(outline, rim)
                thin = 0.80 + 0.14 * (1 - facts.borders)
                canvas.area((outline - (x, y)) * thin + (x, y), mix(inside, stain.glass, 0.15 * b))
    _draw_vessels(canvas, facts, stain, step, rng)
    angles = rng.random(len(points)) * np.pi
    if facts.length > 1.3:
        angles = rng.random() * np.pi + (angles - np.pi / 2) * 0.25
    draw_nuclei(canvas, facts, stain, points, angles, rng)


def _draw_vessels(canvas: Canvas, facts: Tissue, stain: Stain, step: float, rng: np.random.Generator) -> None:
    """Pale clefts between the plates of cells, with a few red cells."""
    for a, b, c in rng.random((int(11 * facts.vessels), 3)):
        angle = np.pi * (0.25 + 0.5 * a)
        along = np.linspace(0, 0.45, 5)
        path = np.stack(
            [
                b * 1.1 - 0.2 + along * np.cos(angle),
                c * 1.1 - 0.2 + along * np.sin(angle) + 0.02 * np.sin(20 * along + 6 * a),
            ],
            axis=1,
        )
        canvas.stroke(path, 0.30 * step, mix(stain.glass, stain.pink, 0.12), (0.2, 0.2))
        canvas.disc(path[2, 0], path[2, 1], 0.020, 0.017, mix((214, 70, 84), stain.pink, 0.25))


def draw_nuclei(
    canvas: Canvas, facts: Tissue, stain: Stain, points: Floats, angles: Floats, rng: np.random.Generator
) -> None:
    """One nucleus at each point: membrane, inside, clumps of chromatin, perhaps a nucleolus."""
    coarse, n = facts.chromatin, len(points)
    draws, turn = rng.random((n, 8)), np.linspace(0, 2 * np.pi, 16, endpoint=False)
    waves = np.cos(np.array([2, 3, 5]) * turn[:, None] + 6.3 * rng.random((n, 1, 3)))  # (n, 16, 3)
    edges = 1 + waves @ ((0.02 + 0.22 * facts.spread) * np.array([1.0, 0.8, 0.5]))
    membrane = shade(stain.blue, 0.96 - 0.30 * coarse)
    inside = mix(mix(stain.blue, stain.glass, 0.56), stain.blue, 0.15 + 0.75 * coarse)
    for (x, y), angle, d, edge in zip(points, angles, draws, edges, strict=True):
        half = 0.5 * facts.size / FIELD * float(np.exp(facts.spread * 1.5 * (2 * d[0] - 1)))
        long, short = half * facts.length**0.5, half / facts.length**0.5
        c, s = np.cos(angle), np.sin(angle)
        u, v = long * np.cos(turn) * edge, short * np.sin(turn) * edge
        shape = np.stack([u * c - v * s, u * s + v * c], axis=1)
        middle = np.array([x, y])
        canvas.area(shape + middle, membrane)
        canvas.area(shape * 0.84 + middle, mix(inside, stain.blue, 0.25 * d[1]))
        for k in range(1 + int(3 * coarse)):
            r, t = short * 0.62 * d[2 + k % 3], 6.3 * d[3 + k]
            canvas.disc(x + r * np.cos(t), y + r * np.sin(t), short * 0.24, short * 0.20, shade(stain.blue, 0.84))
        if d[7] < facts.nucleolus:
            canvas.disc(
                x + short * 0.25 * (d[4] - 0.5),
                y + short * 0.25 * (d[5] - 0.5),
                half * 0.30,
                half * 0.30,
                shade(mix(stain.blue, (150, 20, 90), 0.35), 0.62),
            )


def _draw_gland(
    canvas: Canvas, facts: Tissue, stain: Stain, body: Colour, space: Space, rng: np.random.Generator
) -> None:
    """A ring of cells around a space that is empty, or holds mucin or colloid."""
    filling = {
        "air": stain.glass,
        "mucin": mix(stain.glass, (176, 188, 216), 0.6),
        "colloid": mix(stain.pink, (232, 110, 152), 0.5),
    }[facts.filling]
    canvas.area(space.outline(space.wall * 1.05), mix(body, shade(stain.pink, 0.6), 0.35))
    canvas.area(space.outline(space.wall * 0.98), mix(body, stain.glass, 0.6 * facts.clear))
    canvas.area(space.outline(), filling)
    if facts.filling == "mucin":
        for x, y in space.outline(space.wall * 0.22, max(5, int(space.radius * 90))):
            canvas.disc(x, y, space.wall * 0.22, space.wall * 0.22, mix(stain.glass, (196, 204, 226), 0.5))
    points, away = ring(facts, space, rng)
    angles = away if facts.columnar > 0.4 else away + np.pi / 2 * (facts.length > 1.05)
    draw_nuclei(canvas, facts, stain, points, angles, rng)


def _draw_fat(
    canvas: Canvas, facts: Tissue, stain: Stain, _body: Colour, space: Space, rng: np.random.Generator
) -> None:
    canvas.area(space.outline(0.007), mix(stain.pink, stain.blue, 0.18))
    canvas.area(space.outline(), mix(stain.glass, (255, 255, 255), 0.5))
    turn = 6.3 * rng.random()
    at = np.array([space.x + space.radius * np.cos(turn), space.y + space.radius * np.sin(turn)])
    _draw_spindle(canvas, facts, stain, at, turn + np.pi / 2)


def _draw_keratin(
    canvas: Canvas, facts: Tissue, stain: Stain, _body: Colour, space: Space, _rng: np.random.Generator
) -> None:
    """A pearl: layers of strongly pink keratin around each other."""
    strong = mix(stain.pink, (226, 74, 122), 0.35 + 0.35 * facts.keratin)
    for k in range(5):
        canvas.area(space.outline(-space.radius * 0.19 * k), mix(strong, stain.glass, 0.42 if k % 2 else 0.0))


def _draw_lymphocytes(
    canvas: Canvas, facts: Tissue, stain: Stain, spaces: list[Space], rng: np.random.Generator
) -> None:
    """Small round dark cells, scattered around one place."""
    n, (cx, cy) = int(85 * facts.lymphocytes), rng.random(2)
    points = np.array([cx, cy]) + (rng.random((n, 2)) + rng.random((n, 2)) - 1) * 0.42
    for x, y in points[~inside_any(points, spaces, 0.01)] if n else points:
        canvas.disc(x, y, 0.0235, 0.0225, shade(stain.blue, 0.66))
        canvas.disc(x - 0.005, y - 0.004, 0.0085, 0.008, shade(stain.blue, 0.90))


def _draw_pigment(canvas: Canvas, facts: Tissue, rng: np.random.Generator) -> None:
    """Brown grains in small heaps."""
    for cx, cy, a in rng.random((int(22 * facts.pigment), 3)):
        for dx, dy in (rng.random((7, 2)) - 0.5) * 0.07:
            canvas.disc(cx + dx, cy + dy, 0.008 + 0.004 * a, 0.008, mix((92, 50, 22), (140, 84, 40), a))
