"""Nose, philtrum and mouth."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, Relief, closed, mix, opened, shade
from .face_head import MIDDLE, sag
from .face_shape import Face

Path = list[tuple[float, float]]


def _place(face: Face, points: Path) -> Path:
    """Points given from the middle of the face, set on it."""
    return [(MIDDLE + x, y + sag(face, x * 1.6, y)) for x, y in points]


def light_nose(relief: Relief, face: Face) -> None:
    """The bridge with its two flanks, and the ball of the tip."""
    top, low, depth = face.eye_y - 0.035, face.nose_y - 0.035, face.bridge_depth
    ridge = 0.013 if face.has("beaked_nose") else 0.011
    relief.trail(
        [(MIDDLE, top + 0.03), (MIDDLE, (top + low) / 2), (MIDDLE, low)],
        max(face.bridge * 0.62, ridge),
        0.040 * depth + 0.012,
    )
    for side in (-1, 1):
        flank = [
            (side * (face.bridge + 0.008), top),
            (side * (face.bridge + 0.004), face.eye_y + 0.03),
            (side * (face.tip + 0.008), low),
        ]
        relief.trail(_place(face, flank), 0.0125, -(0.030 + 0.062 * min(depth, 1.9)))
        relief.spot(MIDDLE + side * face.nose_width, face.nose_y - 0.012, 0.015, 0.02, -0.07)
    relief.spot(MIDDLE, face.nose_y - 0.022, face.tip * 0.62, face.tip * 0.62, 0.15)
    relief.spot(MIDDLE, face.nose_y + 0.014, face.nose_width, 0.012, -0.13)
    if face.has("depressed_bridge"):
        relief.spot(MIDDLE, face.eye_y + 0.008, 0.050, 0.017, -0.42)
        relief.spot(MIDDLE, face.eye_y + 0.050, 0.030, 0.016, 0.10)
    if face.has("wide_bridge"):
        relief.spot(MIDDLE, face.eye_y, face.bridge * 0.9, 0.034, 0.12)
    if face.has("prominent_bridge"):
        relief.spot(MIDDLE, face.brow_y + 0.025, 0.014, 0.03, 0.18)
    if face.has("beaked_nose"):
        relief.spot(MIDDLE, face.eye_y + 0.055, 0.020, 0.030, 0.24)


def draw_nose(canvas: Canvas, face: Face) -> None:
    w, y, tip = face.nose_width, face.nose_y, face.tip
    dark = mix(shade(face.skin, 0.52), (110, 50, 40), 0.2)
    if face.has("prominent_bridge") or face.has("wide_bridge"):
        _draw_bridge(canvas, face)
    for side in (-1, 1):
        wing = [
            (side * tip * 0.95, y - 0.040),
            (side * w, y - 0.026),
            (side * w * 1.03, y - 0.004),
            (side * w * 0.72, y + 0.005),
        ]
        canvas.stroke(_place(face, wing), 0.0075, (*dark, 210), (0.1, 0.2))
    _draw_nostrils(canvas, face)
    if face.has("bulbous_nose"):
        ball = closed(
            _place(
                face,
                [
                    (0, y - 0.068),
                    (tip, y - 0.048),
                    (tip * 1.02, y - 0.012),
                    (0, y + 0.010),
                    (-tip * 1.02, y - 0.012),
                    (-tip, y - 0.048),
                ],
            )
        )
        canvas.area(ball, mix(face.skin, (214, 108, 96), 0.26))
        canvas.line([*ball[6:30].tolist()], 0.006, dark)
        canvas.disc(MIDDLE - 0.010, y - 0.036, 0.011, 0.010, mix(face.skin, (255, 246, 240), 0.75))
    if face.has("beaked_nose"):
        _draw_beak(canvas, face, dark)
    if face.has("drooping_columella"):
        drop = _place(
            face, [(-0.017, y - 0.004), (-0.013, y + 0.018), (0, y + 0.029), (0.013, y + 0.018), (0.017, y - 0.004)]
        )
        canvas.blob(drop, mix(face.skin, (255, 226, 212), 0.25))
        canvas.stroke(drop, 0.008, dark, (0.3, 0.3))


def _draw_bridge(canvas: Canvas, face: Face) -> None:
    """Lines from the brow down both sides of a bridge that stands out."""
    strong = 0.0115 if face.has("prominent_bridge") else 0.008
    for side in (-1, 1):
        side_line = [
            (side * (face.bridge + 0.012), face.brow_y + 0.015),
            (side * face.bridge, face.eye_y - 0.008),
            (side * face.bridge * 1.02, face.eye_y + 0.05),
        ]
        canvas.stroke(_place(face, side_line), strong, (*shade(face.skin, 0.52), 225), (0.2, 0.0))


def _draw_nostrils(canvas: Canvas, face: Face) -> None:
    w, y = face.nose_width, face.nose_y
    black = mix(shade(face.skin, 0.22), (60, 16, 14), 0.3)
    for side in (-1, 1):
        x, sunk = side * w * 0.50, sag(face, side * w, y)
        if face.has("upturned_nose"):
            canvas.disc(MIDDLE + x, y - 0.012 + sunk, 0.0185, 0.0165, black, side * 0.35)
        elif face.has("thin_alae"):
            canvas.disc(MIDDLE + x, y - 0.004 + sunk, 0.0055, 0.010, black, side * 0.3)
        else:
            canvas.disc(MIDDLE + x, y - 0.001 + sunk, w * 0.25, 0.0068, black, side * 0.15)
    if face.has("upturned_nose"):
        canvas.stroke(
            _place(face, [(-w * 0.7, y - 0.036), (0, y - 0.045), (w * 0.7, y - 0.036)]),
            0.006,
            (*shade(face.skin, 0.7), 200),
            (0, 0),
        )
    under = _place(face, [(-w * 0.30, y + 0.002), (0, y + 0.008), (w * 0.30, y + 0.002)])
    canvas.stroke(under, 0.0055, (*shade(face.skin, 0.60), 200), (0, 0))


def _draw_beak(canvas: Canvas, face: Face, dark: tuple[float, float, float]) -> None:
    """A high ridge seen from the front: a tip that hangs below the wings like a hook."""
    y = face.nose_y
    hook = [
        (-0.022, y - 0.045),
        (-0.025, y - 0.008),
        (-0.012, y + 0.024),
        (0, y + 0.032),
        (0.012, y + 0.024),
        (0.025, y - 0.008),
        (0.022, y - 0.045),
    ]
    canvas.blob(_place(face, hook), mix(face.skin, (255, 230, 216), 0.22))
    canvas.stroke(_place(face, hook), 0.0085, dark, (0.0, 0.0))
    for side in (-1, 1):
        canvas.stroke(
            _place(
                face, [(side * 0.012, face.eye_y - 0.02), (side * 0.024, face.eye_y + 0.04), (side * 0.020, y - 0.045)]
            ),
            0.006,
            (*dark, 170),
            (0, 0),
        )
    canvas.disc(MIDDLE, y - 0.002, 0.008, 0.014, mix(face.skin, (255, 248, 242), 0.7))


def draw_philtrum(canvas: Canvas, face: Face) -> None:
    """Two ridges between nose and lip: none when smooth, a deep groove when deep."""
    top, low = face.nose_y + 0.010, face.mouth_y - face.upper_lip * 1.05
    if face.has("smooth_philtrum") or low - top < 0.006:
        return
    if face.has("deep_philtrum"):
        canvas.blob(
            _place(face, [(-0.008, top), (0.008, top), (0.017, low), (0, low + 0.004), (-0.017, low)]),
            mix(shade(face.skin, 0.62), (120, 50, 50), 0.15),
        )
    strong, alpha = (0.0085, 255) if face.has("deep_philtrum") else (0.006, 190)
    for side in (-1, 1):
        ridge = [(side * 0.010, top), (side * 0.0125, (top + low) / 2), (side * 0.018, low)]
        canvas.stroke(_place(face, ridge), strong, (*shade(face.skin, 0.66), alpha), (0.3, 0.6))


def draw_mouth(canvas: Canvas, face: Face) -> None:
    """Lips, and what lies between them when the mouth is open."""
    gap = _gap(face)
    upper, lower, meet_up, meet_low = _lips(face, gap)
    if gap:
        _draw_inside(canvas, face, [*meet_up, *reversed(meet_low)], gap)
    canvas.area(lower, mix(face.lips, (255, 214, 206), 0.10))
    canvas.area(upper, shade(face.lips, 0.88))
    line = mix(shade(face.lips, 0.42), (70, 16, 20), 0.3)
    canvas.stroke(meet_up, 0.0075, line, (0.35, 0.35))
    canvas.disc(
        MIDDLE,
        face.mouth_y + gap + face.lower_lip * 0.62,
        face.mouth_width * 0.30,
        face.lower_lip * 0.20,
        mix(face.lips, (255, 238, 232), 0.35),
    )
    for side in (-1, 1):
        x, y = side * face.mouth_width, face.mouth_y + face.corner
        hook = [(x * 0.97, y - 0.003), (x * 1.06, y + (0.016 if face.has("downturned_mouth") else 0.004))]
        canvas.stroke(_place(face, hook), 0.007, (*shade(face.skin, 0.55), 220), (0.9, 0.1))
    if face.has("large_tongue"):
        _draw_tongue(canvas, face)
    if face.has("cleft_lip"):
        _draw_cleft(canvas, face)


def _gap(face: Face) -> float:
    if face.has("open_mouth"):
        return 0.046
    if face.has("large_tongue"):
        return 0.026
    return 0.030 if face.has("gapped_teeth") else 0.0


def _lips(face: Face, gap: float) -> tuple[np.ndarray, np.ndarray, Path, Path]:
    """Upper lip, lower lip, and the two lines where they meet, left to right."""
    w, y, up, low = face.mouth_width, face.mouth_y, face.upper_lip, face.lower_lip
    c = face.corner - (0.010 if face.has("gapped_teeth") and not face.has("downturned_mouth") else 0.0)
    peak, dip, shoulder = -1.12, -0.72, -0.80
    if face.has("tented_lip"):
        peak, dip, shoulder = -1.55, -1.62, -0.38
    corner_l, corner_r = (-w, y + c), (w, y + c)
    arch = -0.016 if face.has("tented_lip") else 0.0
    meet_up = _place(
        face,
        [
            corner_l,
            (-0.5 * w, y + 0.25 * c),
            (-0.2 * w, y + 0.10 * up + arch * 0.8),
            (0, y + 0.22 * up + arch),
            (0.2 * w, y + 0.10 * up + arch * 0.8),
            (0.5 * w, y + 0.25 * c),
            corner_r,
        ],
    )
    meet_low = _place(
        face,
        [
            corner_l,
            (-0.55 * w, y + 0.25 * c + gap * 0.8),
            (0, y + 0.15 * up + gap),
            (0.55 * w, y + 0.25 * c + gap * 0.8),
            corner_r,
        ],
    )
    top = _place(
        face,
        [
            corner_r,
            (0.55 * w, y + shoulder * up + 0.2 * c),
            (0.19 * w, y + peak * up),
            (0, y + dip * up),
            (-0.19 * w, y + peak * up),
            (-0.55 * w, y + shoulder * up + 0.2 * c),
            corner_l,
        ],
    )
    under = _place(
        face,
        [
            corner_r,
            (0.60 * w, y + gap + 0.72 * low + 0.4 * c),
            (0.22 * w, y + gap + 1.05 * low),
            (-0.22 * w, y + gap + 1.05 * low),
            (-0.60 * w, y + gap + 0.72 * low + 0.4 * c),
            corner_l,
        ],
    )
    upper = np.concatenate([opened(meet_up), opened(top)])
    lower = np.concatenate([opened(meet_low), opened(under)])
    return upper, lower, meet_up, meet_low


def _draw_inside(canvas: Canvas, face: Face, edge: Path, gap: float) -> None:
    inside = Canvas(canvas.size, canvas.view, canvas.fine, (66, 18, 22))
    w, y = face.mouth_width, face.mouth_y
    inside.disc(MIDDLE, y + gap * 1.12, w * 0.62, gap * 0.42, (176, 78, 82))
    tooth, deep = (248, 244, 232), gap * (0.80 if face.has("gapped_teeth") else 0.34)
    if face.has("gapped_teeth"):
        for k in range(-3, 3):
            left = MIDDLE + (k + 0.22) * 0.030
            inside.area(
                [(left, y - 0.03), (left + 0.0165, y - 0.03), (left + 0.0165, y + deep), (left, y + deep)], tooth
            )
    else:
        inside.area(
            [
                (MIDDLE - w * 0.62, y - 0.03),
                (MIDDLE + w * 0.62, y - 0.03),
                (MIDDLE + w * 0.55, y + deep),
                (MIDDLE - w * 0.55, y + deep),
            ],
            tooth,
        )
    canvas.paste(inside, closed(edge) if len(edge) < 4 else np.asarray(edge))


def _draw_tongue(canvas: Canvas, face: Face) -> None:
    w, y = face.mouth_width * 0.60, face.mouth_y + 0.012
    low = y + face.lower_lip + 0.062
    tongue = _place(
        face,
        [
            (-w, y),
            (-w * 1.05, y + 0.03),
            (-w * 0.8, low - 0.012),
            (0, low),
            (w * 0.8, low - 0.012),
            (w * 1.05, y + 0.03),
            (w, y),
            (0, y - 0.008),
        ],
    )
    canvas.blob(tongue, (150, 56, 64))
    canvas.blob([(MIDDLE + (px - MIDDLE) * 0.92, py - 0.003) for px, py in tongue], (216, 104, 112))
    canvas.stroke(_place(face, [(0, y + 0.012), (0, low - 0.018)]), 0.006, (168, 68, 78), (0.3, 0.1))


def _draw_cleft(canvas: Canvas, face: Face) -> None:
    """A gap in the upper lip that runs up to one nostril."""
    top, low = face.nose_y + 0.002, face.mouth_y + 0.006
    gap = _place(
        face,
        [
            (0.020, low),
            (0.022, (top + low) / 2),
            (0.024, top),
            (0.034, top),
            (0.044, (top + low) / 2),
            (0.052, low),
            (0.036, low + 0.004),
        ],
    )
    canvas.blob(gap, (112, 26, 34))
    canvas.stroke(gap[:3], 0.012, mix(face.lips, (220, 100, 104), 0.5), (0.9, 0.4))
    canvas.stroke(gap[3:6], 0.012, mix(face.lips, (220, 100, 104), 0.5), (0.4, 0.9))


def mark_points(face: Face) -> tuple[float, float, float, float]:
    """Half width and lower edge of the nose, half width and height of the mouth: where skin marks must not lie."""
    return face.nose_width, face.nose_y, face.mouth_width, face.mouth_y
