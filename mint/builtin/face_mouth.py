"""Philtrum, lips, and what lies between them."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, Relief, closed, mix, opened, shade
from .face_head import MIDDLE, Path, mirrored, place
from .face_shape import Face


def light_philtrum(relief: Relief, face: Face) -> None:
    """The groove below the nose; where it is smooth, the skin bulges a little instead."""
    top, low = face.nose_y + 0.008, face.mouth_y - face.upper_lip
    middle, half = (top + low) / 2, max((low - top) / 2, 0.008)
    if face.has("smooth_philtrum"):
        relief.spot(MIDDLE, middle, 0.032, half, 0.16)
        return
    relief.spot(MIDDLE, middle, 0.0085, half, -0.16)
    for side in (-1, 1):
        relief.spot(MIDDLE + side * 0.021, middle, 0.008, half, 0.07)


def draw_philtrum(canvas: Canvas, face: Face) -> None:
    """Two ridges between nose and lip: none when smooth, a deep groove when deep."""
    top, low = face.nose_y + 0.010, face.mouth_y - face.upper_lip * 1.05
    if face.has("smooth_philtrum") or low - top < 0.006:
        return
    if face.has("deep_philtrum"):
        canvas.blob(
            place(face, [(-0.008, top - 0.004), (0.008, top - 0.004), (0.018, low), (0, low + 0.006), (-0.018, low)]),
            mix(shade(face.skin, 0.60), (150, 60, 60), 0.30),
        )
    width, tone = (0.011, 0.40) if face.has("deep_philtrum") else (0.0072, 0.68)
    for side in (-1, 1):
        ridge = [(side * 0.0115, top - 0.002), (side * 0.0135, (top + low) / 2), (side * 0.019, low)]
        canvas.stroke(place(face, ridge), width, shade(face.skin, tone), (0.4, 0.7))


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
        canvas.stroke(place(face, hook), 0.007, (*shade(face.skin, 0.55), 220), (0.9, 0.1))
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
    tented, grin = face.has("tented_lip"), face.has("gapped_teeth") and not face.has("downturned_mouth")
    c = face.corner - 0.010 * grin
    peak, dip, shoulder, arch = (-1.55, -1.62, -0.38, -0.016) if tented else (-1.12, -0.72, -0.80, 0.0)
    corner = (w, y + c)
    inner = [(0.5 * w, y + 0.25 * c), (0.2 * w, y + 0.10 * up + arch * 0.8), (0.0, y + 0.22 * up + arch)]
    outer = [(0.55 * w, y + shoulder * up + 0.2 * c), (0.19 * w, y + peak * up), (0.0, y + dip * up)]
    lower = [(0.55 * w, y + 0.25 * c + gap * 0.8), (0.0, y + 0.15 * up + gap)]
    under = [(0.60 * w, y + gap + 0.72 * low + 0.4 * c), (0.22 * w, y + gap + 1.05 * low)]
    meet_up, top, meet_low, edge = (place(face, mirrored([corner, *half])) for half in (inner, outer, lower, under))
    meet_up, meet_low = meet_up[::-1], meet_low[::-1]
    return (
        np.concatenate([opened(meet_up), opened(top)]),
        np.concatenate([opened(meet_low), opened(edge)]),
        meet_up,
        meet_low,
    )


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
    tongue = place(
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
    canvas.stroke(place(face, [(0, y + 0.012), (0, low - 0.018)]), 0.006, (168, 68, 78), (0.3, 0.1))


def _draw_cleft(canvas: Canvas, face: Face) -> None:
    """A gap in the upper lip that runs up to one nostril."""
    top, low = face.nose_y + 0.002, face.mouth_y + 0.006
    gap = place(
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
