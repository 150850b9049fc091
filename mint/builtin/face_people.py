"""People: sex, age, colours and build, drawn from a seed, before and with their findings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .face_changes import with_findings
from .face_shape import RGB, Face

SKINS: tuple[RGB, ...] = (
    (244, 214, 194),
    (238, 200, 174),
    (230, 187, 155),
    (222, 177, 140),
    (204, 154, 116),
    (178, 126, 90),
    (146, 98, 70),
    (112, 74, 54),
)
HAIRS: tuple[RGB, ...] = (
    (34, 27, 25),
    (52, 36, 28),
    (78, 52, 36),
    (110, 74, 46),
    (150, 108, 66),
    (196, 156, 100),
    (146, 74, 40),
)
IRISES: tuple[RGB, ...] = ((74, 46, 28), (92, 60, 34), (112, 92, 52), (84, 110, 84), (84, 128, 168))
GROUNDS: tuple[RGB, ...] = (
    (196, 208, 214),
    (214, 206, 194),
    (178, 196, 186),
    (206, 198, 212),
    (168, 182, 200),
    (220, 220, 216),
)
CLOTHS: tuple[RGB, ...] = (
    (92, 112, 140),
    (150, 96, 92),
    (110, 138, 112),
    (170, 150, 110),
    (96, 92, 116),
    (210, 206, 198),
    (70, 74, 82),
)
STYLES = {"female": ("bob", "long", "long", "short"), "male": ("crop", "short", "short", "crop")}
ETHNIC_SKINS = {
    "European": (0, 3),
    "East Asian": (1, 4),
    "South Asian": (3, 6),
    "Latin American": (2, 6),
    "African": (5, 8),
}

# What a person's own build may do to a measure: the share it varies by, up or down.
_BUILD = {
    "forehead": 0.03, "temple": 0.025, "cheekbone": 0.025, "cheek": 0.04, "jaw": 0.05, "chin_width": 0.08, "neck": 0.06,
    "eye_dx": 0.035, "eye_width": 0.04, "eye_height": 0.06, "iris_radius": 0.03, "brow_gap": 0.06, "brow_thick": 0.12,
    "brow_arch": 0.25, "nose_width": 0.06, "bridge": 0.08, "tip": 0.06, "philtrum": 0.06, "mouth_width": 0.05,
    "upper_lip": 0.10, "lower_lip": 0.10, "hairline": 0.12, "hair_thick": 0.30, "ear_height": 0.05, "ear_width": 0.10,
}  # fmt: skip
_PLACE = {
    "top": 0.008,
    "chin": 0.008,
    "eye_y": 0.006,
    "nose_y": 0.005,
    "ear_y": 0.006,
    "slant": 0.035,
    "corner": 0.004,
    "ear_tilt": 0.05,
}


def person(
    findings: frozenset[str], rng: np.random.Generator, sex: str | None, age: float | None, ethnicity: str | None
) -> Face:
    """Somebody of this sex and age (drawn where not given), with these findings."""
    draws = rng.random(16)
    sex = sex if sex in STYLES else ("female", "male")[int(draws[0] * 2)]
    age = float(np.clip(2 + 30 * draws[1] ** 2 if age is None else age, 0, 80))
    low, high = ETHNIC_SKINS.get(ethnicity or "", (0, len(SKINS)))
    tone = low + int(draws[2] * (high - low))
    skin = _between(SKINS[tone], SKINS[min(tone + 1, high - 1)], draws[3])
    darkest = 2 if tone >= 5 else 4 if tone >= 3 else len(HAIRS)
    face = Face(
        findings=findings,
        sex=sex,
        age=age,
        skin=skin,
        hair=HAIRS[int(draws[4] * darkest)],
        iris=IRISES[int(draws[5] * (2 if tone >= 4 else len(IRISES)))],
        lips=_between(skin, (176, 64, 72), 0.46 + 0.1 * draws[6]),
        ground=GROUNDS[int(draws[7] * len(GROUNDS))],
        cloth=CLOTHS[int(draws[8] * len(CLOTHS))],
        light=float(2 * draws[9] - 1),
        glow=float(0.88 + 0.13 * draws[10]),
        warmth=float(0.03 * (2 * draws[11] - 1)),
        noise=float(0.008 + 0.012 * draws[12]),
        style=STYLES[sex][int(draws[13] * 4)] if age >= 2 else "crop",
    )
    return with_findings(_aged(_built(face, rng)))


def _built(face: Face, rng: np.random.Generator) -> Face:
    spread = 2 * rng.random(len(_BUILD) + len(_PLACE)) - 1
    measures: dict[str, Any] = {
        name: getattr(face, name) * (1 + share * by) for (name, share), by in zip(_BUILD.items(), spread, strict=False)
    }
    shifts = spread[len(_BUILD) :]
    measures |= {
        name: getattr(face, name) + width * by for (name, width), by in zip(_PLACE.items(), shifts, strict=True)
    }
    return replace(face, **measures)


def _aged(face: Face) -> Face:
    """A child has larger eyes, a shorter lower face and a smaller nose; a man a heavier jaw and brow."""
    c, man = face.child, (1 - face.child) * (face.sex == "male")
    return replace(
        face,
        eye_y=face.eye_y + 0.022 * c,
        eye_width=face.eye_width * (1 + 0.05 * c),
        eye_height=face.eye_height * (1 + 0.22 * c),
        iris_radius=face.iris_radius * (1 + 0.10 * c),
        nose_y=face.nose_y - 0.002 * c,
        nose_width=face.nose_width * (1 - 0.12 * c),
        tip=face.tip * (1 - 0.08 * c),
        philtrum=face.philtrum * (1 - 0.08 * c),
        mouth_width=face.mouth_width * (1 - 0.08 * c),
        chin=face.chin - 0.022 * c,
        cheek=face.cheek * (1 + 0.02 * c),
        jaw=face.jaw * (1 + 0.04 * c + 0.08 * man),
        chin_width=face.chin_width * (1 + 0.16 * man),
        brow_thick=face.brow_thick * (1 + 0.15 * man - 0.12 * c),
        neck=face.neck * (1 - 0.22 * c + 0.10 * man),
    )


def _between(one: RGB, other: RGB, share: float) -> RGB:
    red, green, blue = (float(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue
