"""The measures of a face: what differs from person to person, and how a finding changes it.

Lengths are shares of the picture's side. A person's own measures vary by a few percent; a finding moves its measure well
beyond that. Findings that are not a matter of measure (a cleft, a forelock) are drawn where their name is found in
`Face.findings`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

RGB = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Face:
    """One face. Widths are half widths; `y` grows downwards; angles in radians, positive with the outer side up."""

    findings: frozenset[str]
    sex: str
    age: float
    skin: RGB
    hair: RGB
    iris: RGB
    lips: RGB
    ground: RGB
    cloth: RGB
    light: float  # -1 from the left .. 1 from the right
    glow: float  # brightness of the whole picture
    warmth: float
    noise: float
    style: str  # crop, short, bob, long
    top: float = 0.115
    crown: float = 2.25  # how square the dome of the head is: 2 is a half ellipse
    forehead: float = 0.214
    temple: float = 0.226
    cheekbone: float = 0.227
    cheek: float = 0.208
    jaw: float = 0.160
    chin_width: float = 0.076
    chin: float = 0.815
    neck: float = 0.115
    shoulder: float = 0.905
    eye_y: float = 0.475
    eye_dx: float = 0.110
    eye_width: float = 0.059
    eye_height: float = 0.0305
    slant: float = 0.05
    iris_radius: float = 0.0295
    brow_gap: float = 0.072
    brow_thick: float = 0.0175
    brow_arch: float = 0.014
    nose_y: float = 0.612
    nose_width: float = 0.052
    bridge: float = 0.021
    bridge_depth: float = 1.0
    tip: float = 0.027
    philtrum: float = 0.052
    mouth_width: float = 0.083
    upper_lip: float = 0.021
    lower_lip: float = 0.024
    corner: float = -0.006
    hairline: float = 0.095
    hair_thick: float = 0.030
    ear_y: float = 0.515
    ear_height: float = 0.075
    ear_width: float = 0.038
    ear_tilt: float = 0.10
    skew: float = 0.0  # how far the right half of the face hangs below the left

    @property
    def mouth_y(self) -> float:
        """The line between the lips."""
        return self.nose_y + self.philtrum + self.upper_lip

    @property
    def brow_y(self) -> float:
        return self.eye_y - self.brow_gap

    @property
    def child(self) -> float:
        """1 for a small child, 0 for an adult."""
        return float(np.clip((14 - self.age) / 13, 0, 1))

    def has(self, finding: str) -> bool:
        return finding in self.findings


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

# What a finding does: factors, then shifts.
_TIMES: dict[str, dict[str, float]] = {
    "wide_set_eyes": {"eye_dx": 1.32, "bridge": 1.2},
    "close_set_eyes": {"eye_dx": 0.70, "bridge": 0.7},
    "long_fissures": {"eye_width": 1.34},
    "short_fissures": {"eye_width": 0.60, "eye_height": 0.78},
    "bulging_eyes": {"eye_height": 1.55, "eye_width": 1.10, "iris_radius": 1.05},
    "deep_set_eyes": {"brow_gap": 0.62, "eye_height": 0.82},
    "thick_brows": {"brow_thick": 1.95},
    "sparse_brows": {"brow_thick": 0.8},
    "arched_brows": {"brow_arch": 3.2, "brow_gap": 1.12},
    "wide_bridge": {"bridge": 1.95},
    "prominent_bridge": {"bridge": 1.15, "bridge_depth": 2.3},
    "depressed_bridge": {"bridge": 1.35, "bridge_depth": 0.0},
    "bulbous_nose": {"tip": 1.55, "nose_width": 1.18},
    "thin_alae": {"nose_width": 0.66, "tip": 0.85},
    "long_philtrum": {"philtrum": 1.50},
    "short_philtrum": {"philtrum": 0.50},
    "wide_mouth": {"mouth_width": 1.42},
    "narrow_mouth": {"mouth_width": 0.58},
    "thin_upper_lip": {"upper_lip": 0.22},
    "thick_lower_lip": {"lower_lip": 2.2},
    "tented_lip": {"upper_lip": 1.35},
    "small_jaw": {"jaw": 0.74, "chin_width": 0.66},
    "large_jaw": {"jaw": 1.12, "chin_width": 1.32},
    "pointed_chin": {"chin_width": 0.22, "jaw": 0.80},
    "round_face": {"temple": 1.04, "cheekbone": 1.08, "cheek": 1.20, "jaw": 1.36, "chin_width": 1.35},
    "long_face": {"temple": 0.88, "cheekbone": 0.83, "cheek": 0.83, "jaw": 0.86, "forehead": 0.90},
    "triangular_face": {"forehead": 1.10, "temple": 1.08, "cheekbone": 0.97, "cheek": 0.82, "jaw": 0.66, "chin_width": 0.55},
    "coarse_face": {
        "nose_width": 1.30, "tip": 1.25, "upper_lip": 1.55, "lower_lip": 1.55, "brow_thick": 1.4, "mouth_width": 1.15,
        "jaw": 1.15, "chin_width": 1.15, "bridge": 1.35,
    },
    "full_cheeks": {"cheek": 1.17, "jaw": 1.16},
    "small_head": {"forehead": 0.80, "temple": 0.88, "crown": 0.95},
    "large_head": {"forehead": 1.30, "temple": 1.15},
    "broad_forehead": {"forehead": 1.20, "temple": 1.16, "jaw": 0.96},
    "narrow_forehead": {"forehead": 0.74, "temple": 0.78},
    "tall_head": {"forehead": 0.90, "temple": 0.93, "crown": 0.95},
    "small_ears": {"ear_height": 0.45, "ear_width": 0.55},
    "large_ears": {"ear_height": 1.60, "ear_width": 1.55},
    "protruding_ears": {"ear_width": 1.95},
    "high_forehead": {"hairline": 0.25},
    "low_hairline": {"hairline": 1.75},
    "short_neck": {"neck": 1.15},
}  # fmt: skip
_PLUS: dict[str, dict[str, float]] = {
    "upslant": {"slant": 0.36},
    "downslant": {"slant": -0.42},
    "short_nose": {"nose_y": -0.042},
    "long_nose": {"nose_y": 0.040},
    "drooping_columella": {"nose_y": -0.006},
    "downturned_mouth": {"corner": 0.026},
    "small_jaw": {"chin": -0.062},
    "large_jaw": {"chin": 0.038},
    "pointed_chin": {"chin": 0.030},
    "long_face": {"chin": 0.030},
    "round_face": {"chin": -0.022},
    "small_head": {"top": 0.085, "hairline": -0.02},
    "large_head": {"top": -0.042, "hairline": 0.024},
    "tall_head": {"top": -0.070, "eye_y": 0.012, "nose_y": 0.010, "chin": 0.010},
    "low_ears": {"ear_y": 0.085},
    "rotated_ears": {"ear_tilt": 0.75},
    "face_asymmetry": {"skew": 0.042},
    "short_neck": {"shoulder": -0.085},
    "deep_set_eyes": {"eye_y": 0.004},
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
    return _with_findings(_aged(_built(face, rng)))


def _built(face: Face, rng: np.random.Generator) -> Face:
    spread = 2 * rng.random(len(_BUILD) + len(_PLACE)) - 1
    measures = {
        name: getattr(face, name) * (1 + share * by) for (name, share), by in zip(_BUILD.items(), spread, strict=False)
    }
    shifts = spread[len(_BUILD) :]
    measures |= {
        name: getattr(face, name) + width * by for (name, width), by in zip(_PLACE.items(), shifts, strict=True)
    }
    return replace(face, **{name: float(value) for name, value in measures.items()})


def _aged(face: Face) -> Face:
    """A child has larger eyes, a shorter lower face, a smaller nose and a rounder outline; a man a heavier jaw and brow."""
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


def _with_findings(face: Face) -> Face:
    measures = {
        name: getattr(face, name) for name in Face.__dataclass_fields__ if isinstance(getattr(face, name), float)
    }
    for finding in sorted(face.findings):
        for name, factor in _TIMES.get(finding, {}).items():
            measures[name] *= factor
        for name, shift in _PLUS.get(finding, {}).items():
            measures[name] += shift
    measures["eye_dx"] = max(measures["eye_dx"], measures["eye_width"] + 0.012)
    measures["chin"] = max(measures["chin"], _lowest_lip(measures) + 0.045)
    return replace(face, **measures)


def _lowest_lip(m: dict[str, float]) -> float:
    return m["nose_y"] + m["philtrum"] + m["upper_lip"] + m["lower_lip"]


def _between(one: RGB, other: RGB, share: float) -> RGB:
    red, green, blue = (float(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue
