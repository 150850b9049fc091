"""What a finding does to the measures of a face."""

from __future__ import annotations

from dataclasses import replace

from .face_shape import Face

# Factors first, then shifts.
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
    "triangular_face": {
        "forehead": 1.10, "temple": 1.08, "cheekbone": 0.97, "cheek": 0.82, "jaw": 0.66, "chin_width": 0.55,
    },
    "coarse_face": {
        "nose_width": 1.30, "tip": 1.25, "upper_lip": 1.55, "lower_lip": 1.55, "brow_thick": 1.4, "mouth_width": 1.15,
        "jaw": 1.15, "chin_width": 1.15, "bridge": 1.35,
    },
    "full_cheeks": {"cheek": 1.17, "jaw": 1.16},
    "small_head": {"forehead": 0.80, "temple": 0.88, "crown": 0.95},
    "large_head": {"forehead": 1.30, "temple": 1.15},
    "frontal_bossing": {"forehead": 1.09, "temple": 1.03},
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
    "large_head": {"top": -0.030, "hairline": 0.020},
    "tall_head": {"top": -0.060, "eye_y": 0.012, "nose_y": 0.010, "chin": 0.010},
    "low_ears": {"ear_y": 0.085},
    "rotated_ears": {"ear_tilt": 0.75},
    "face_asymmetry": {"skew": 0.042},
    "short_neck": {"shoulder": -0.085},
    "deep_set_eyes": {"eye_y": 0.004},
}


def with_findings(face: Face) -> Face:
    """The same person with the findings; eyes never meet, and the chin stays below the lip."""
    measures = {
        name: getattr(face, name) for name in Face.__dataclass_fields__ if isinstance(getattr(face, name), float)
    }
    findings = sorted(face.findings)
    for name, factor in (change for finding in findings for change in _TIMES.get(finding, {}).items()):
        measures[name] *= factor
    for name, shift in (change for finding in findings for change in _PLUS.get(finding, {}).items()):
        measures[name] += shift
    measures["eye_dx"] = max(measures["eye_dx"], measures["eye_width"] + 0.012)
    measures["chin"] = max(measures["chin"], _lowest_lip(measures) + 0.045)
    return replace(face, **measures)


def _lowest_lip(m: dict[str, float]) -> float:
    return m["nose_y"] + m["philtrum"] + m["upper_lip"] + m["lower_lip"]
