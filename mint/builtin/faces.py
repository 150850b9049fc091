"""Simulated portraits: a face drawn from findings, and from nothing else that tells the disease.

`python -m mint.builtin.faces --sheet faces.png` draws every finding beside the same face without it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import replacing
from .canvas import Array, Canvas, Relief, over, picture, shade
from .face_eyes import draw_brows, draw_eyes, light_eyes
from .face_hair import draw_hair, draw_hair_behind
from .face_head import draw_body, draw_ear_tags, draw_ears, draw_head, light_head
from .face_mouth import draw_mouth, draw_philtrum, light_philtrum
from .face_nose import draw_nose, light_nose
from .face_people import person
from .face_shape import Face
from .face_skin import draw_skin
from .face_terms import drawn_findings, photo_findings
from .sheet import contact_sheet

SIZE = 128
VIEW = (0.5, 0.47, 1.14)


def draw_face(
    terms: Iterable[str],
    *,
    sex: str | None = None,
    age: float | None = None,
    seed: int = 0,
    size: int = SIZE,
    ethnicity: str | None = None,
) -> Image.Image:
    """A portrait, `size` pixels square, that shows those of the HPO terms that a photo can show.

    Terms that cannot be drawn are passed over. Sex (`female`, `male`), age in years and ethnicity are drawn from the
    seed where they are not given. The same arguments give the same picture, bit for bit.
    """
    rng = np.random.default_rng([seed, 1])
    face = person(drawn_findings(terms), rng, sex, age, ethnicity)
    return picture(_exposed(_painted(face, size, rng), face, rng))


@dataclass(frozen=True, slots=True)
class Photo:
    """A simulated portrait that is drawn when it is asked for; it holds all that its picture depends on."""

    terms: tuple[str, ...]
    sex: str | None
    age: float | None
    ethnicity: str | None
    seed: int
    size: int = SIZE

    def draw(self) -> Image.Image:
        return draw_face(
            self.terms, sex=self.sex, age=self.age, ethnicity=self.ethnicity, seed=self.seed, size=self.size
        )


def _painted(face: Face, size: int, rng: np.random.Generator) -> Array:
    """The picture before light and noise of the camera: (size, size, 3)."""
    marks = rng.spawn(4)
    skin, features, relief = Canvas(size, VIEW), Canvas(size, VIEW), Relief(size, VIEW)
    draw_hair_behind(skin, face, marks[0])
    draw_body(skin, face)
    draw_ears(skin, face)
    draw_head(skin, face)
    draw_skin(skin, face, marks[1])
    for light in (light_head, light_eyes, light_nose, light_philtrum):
        light(relief, face)
    draw_eyes(features, face)
    draw_nose(features, face)
    draw_philtrum(features, face)
    draw_mouth(features, face)
    draw_ear_tags(features, face)
    draw_hair(features, face, marks[2])
    draw_brows(features, face, marks[3])
    body = skin.layer()
    body[..., :3] *= (1 + relief.sum())[..., None]
    return over(over(_ground(face, size), body), features.layer())


def _ground(face: Face, size: int) -> Array:
    grid = np.linspace(0, 1, size, dtype=np.float32)
    slope = 1.04 - 0.16 * grid[:, None] + 0.10 * face.light * (grid[None, :] - 0.5)
    return slope[..., None] * np.asarray(shade(face.ground, 1 / 255), np.float32)


def _exposed(pixels: Array, face: Face, rng: np.random.Generator) -> Array:
    """Side light, brightness, warmth and grain."""
    size = len(pixels)
    side = 1 + 0.14 * face.light * np.linspace(-1, 1, size, dtype=np.float32)
    tint = np.array([1 + face.warmth, 1, 1 - face.warmth], np.float32) * face.glow
    grain = rng.standard_normal((size, size, 1), dtype=np.float32) * face.noise
    return pixels * (side[None, :, None] * tint) + grain


def photo_terms() -> frozenset[str]:
    """The HPO ids that a drawn face can show, each in its own way."""
    return frozenset(photo_findings())


def _sheet(path: Path, size: int) -> None:
    """Every finding on two people, each beside the same person without it."""
    cells = []
    for number, (term, finding) in enumerate(photo_findings().items()):
        people = [("female", 7.0, 2 * number), ("male", 24.0, 2 * number + 1)]
        row = [
            draw_face(found, sex=sex, age=age, seed=seed, size=size)
            for sex, age, seed in people
            for found in ((), (term,))
        ]
        cells.append((f"{finding.label} ({term})", row))
    with replacing(path) as file:
        contact_sheet(cells, across=3).save(file, format="PNG")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mint.builtin.faces", description="Draw every finding that a face can show."
    )
    parser.add_argument("--sheet", type=Path, required=True, help="where the PNG goes, for instance faces.png")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels of one face")
    options = parser.parse_args()
    _sheet(options.sheet, options.size)


if __name__ == "__main__":
    main()
