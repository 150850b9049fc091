"""Where things lie in a tile: glands, fat and vessels do not overlap, nuclei keep their distance.

Lengths are shares of the tile's side; a tile shows `FIELD` micrometres.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .tissue_facts import Tissue

FIELD = 92.0
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Space:
    """A round space in the tissue: its middle, its radius, the thickness of its wall, and how its outline wobbles."""

    kind: str  # gland, fat, keratin
    x: float
    y: float
    radius: float
    wall: float
    wobble: tuple[float, ...]

    def outline(self, grow: float = 0.0, n: int = 36) -> Floats:
        """The edge of the space, `grow` further out: (n, 2)."""
        turn = np.linspace(0, 2 * np.pi, n, endpoint=False)
        a, b, p, q = self.wobble
        r = self.radius * (1 + a * np.cos(2 * turn + p) + b * np.cos(3 * turn + q)) + grow
        return np.stack([self.x + r * np.cos(turn), self.y + r * np.sin(turn)], axis=1)


def place_spaces(facts: Tissue, rng: np.random.Generator) -> list[Space]:
    """Glands, fat cells and keratin pearls, each at a free place; one that finds none is left out."""
    wall = facts.size / FIELD * (1.05 + 1.15 * facts.columnar)
    wanted = [("gland", facts.lumen, wall)] * int(facts.glands) + [("fat", 0.135, 0.004)] * int(facts.fat)
    wanted += [("keratin", 0.10, 0.02)] * (int(facts.keratin > 0.3) + int(facts.keratin > 0.6))
    placed: list[Space] = []
    for kind, radius, thick in wanted:
        for _ in range(12):
            x, y, grow, a, b, p, q = rng.random(7)
            r = radius * (0.75 + 0.5 * grow)
            space = Space(kind, 1.1 * x - 0.05, 1.1 * y - 0.05, r, thick, (0.16 * a, 0.08 * b, 6.3 * p, 6.3 * q))
            if all(np.hypot(space.x - o.x, space.y - o.y) > 0.96 * (r + thick + o.radius + o.wall) for o in placed):
                placed.append(space)
                break
    return placed


def inside_any(points: Floats, spaces: list[Space], margin: float) -> NDArray[np.bool_]:
    """Which of the points (n, 2) lie in a space or its wall."""
    hit = np.zeros(len(points), bool)
    for space in spaces:
        hit |= np.hypot(points[:, 0] - space.x, points[:, 1] - space.y) < space.radius * 1.06 + space.wall + margin
    return hit


def place_cells(facts: Tissue, spaces: list[Space], rng: np.random.Generator) -> tuple[Floats, float]:
    """Middles of the nuclei of the solid tissue, on a jittered lattice, and the lattice's step."""
    step = facts.size / FIELD * (1.28 + 1.75 * (1 - facts.density) + 0.55 * facts.clear)
    n = int(1.2 / step) + 1
    column, row = np.meshgrid(np.arange(n), np.arange(n))
    lattice = np.stack([(column + 0.5 * (row % 2)).ravel(), row.ravel() * 0.88], axis=1) * step - 0.06
    points = lattice + (rng.random(lattice.shape) - 0.5) * step * 0.55
    return points[~inside_any(points, spaces, 0.25 * facts.size / FIELD)], step


def ring(facts: Tissue, space: Space, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Nuclei in the wall of a gland: middles (n, 2) and the directions away from its middle (n,)."""
    gap = facts.size / FIELD * (1.12 if facts.length < 1.4 else 0.82)
    radius = space.radius + space.wall * (0.50 + 0.12 * facts.columnar)
    n = max(4, int(2 * np.pi * radius / gap))
    edge = space.outline(radius - space.radius, n)
    jitter = (rng.random((n, 2)) - 0.5) * facts.size / FIELD * (0.2 + 0.25 * facts.columnar)
    return edge + jitter, np.arctan2(edge[:, 1] - space.y, edge[:, 0] - space.x)


def place_fibres(facts: Tissue, rng: np.random.Generator) -> list[Floats]:
    """Wavy lines across the tile, roughly in one direction."""
    angle, phase = np.pi * rng.random(), 6.3 * rng.random()
    c, s = np.cos(angle), np.sin(angle)
    along = np.linspace(-0.75, 0.75, 14)
    lines = []
    for across, lean, sway in (rng.random((int(95 * facts.fibres), 3)) - 0.5) * (1.5, 0.25, 1.0):
        wave = (
            across
            + 0.035 * facts.waves * np.sin((9 + 4 * facts.waves) * along + phase + 1.2 * sway)
            + lean * along * facts.waves
        )
        lines.append(np.stack([0.5 + along * c - wave * s, 0.5 + along * s + wave * c], axis=1))
    return lines
