"""The nose: the light on its ridge, its wings, its openings and the shapes it may take."""

from __future__ import annotations

from .canvas import Canvas, Relief, closed, mix, shade
from .face_head import MIDDLE, mirrored, place, sag
from .face_shape import Face


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
        relief.trail(place(face, flank), 0.0125, -(0.030 + 0.062 * min(depth, 1.9)))
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
        canvas.stroke(place(face, wing), 0.0075, (*dark, 210), (0.1, 0.2))
    _draw_nostrils(canvas, face)
    if face.has("bulbous_nose"):
        _draw_ball(canvas, face, dark)
    if face.has("beaked_nose"):
        _draw_beak(canvas, face, dark)
    if face.has("drooping_columella"):
        drop = place(face, mirrored([(0.017, y - 0.004), (0.013, y + 0.018), (0.0, y + 0.029)]))
        canvas.blob(drop, mix(face.skin, (255, 226, 212), 0.25))
        canvas.stroke(drop, 0.008, dark, (0.3, 0.3))


def _draw_ball(canvas: Canvas, face: Face, dark: tuple[float, float, float]) -> None:
    """A tip like a ball, a little redder than the rest."""
    y, tip = face.nose_y, face.tip
    half = [(0.0, y - 0.068), (tip, y - 0.048), (tip * 1.02, y - 0.012), (0.0, y + 0.010)]
    ball = closed(place(face, [*half, (-tip * 1.02, y - 0.012), (-tip, y - 0.048)]))
    canvas.area(ball, mix(face.skin, (214, 108, 96), 0.26))
    canvas.line(ball[6:30], 0.006, dark)
    canvas.disc(MIDDLE - 0.010, y - 0.036, 0.011, 0.010, mix(face.skin, (255, 246, 240), 0.75))


def _draw_bridge(canvas: Canvas, face: Face) -> None:
    """Lines from the brow down both sides of a bridge that stands out."""
    strong = 0.0115 if face.has("prominent_bridge") else 0.008
    for side in (-1, 1):
        side_line = [
            (side * (face.bridge + 0.012), face.brow_y + 0.015),
            (side * face.bridge, face.eye_y - 0.008),
            (side * face.bridge * 1.02, face.eye_y + 0.05),
        ]
        canvas.stroke(place(face, side_line), strong, (*shade(face.skin, 0.52), 225), (0.2, 0.0))


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
            place(face, [(-w * 0.7, y - 0.036), (0, y - 0.045), (w * 0.7, y - 0.036)]),
            0.006,
            (*shade(face.skin, 0.7), 200),
            (0, 0),
        )
    under = place(face, [(-w * 0.30, y + 0.002), (0, y + 0.008), (w * 0.30, y + 0.002)])
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
    canvas.blob(place(face, hook), mix(face.skin, (255, 230, 216), 0.22))
    canvas.stroke(place(face, hook), 0.0085, dark, (0.0, 0.0))
    for side in (-1, 1):
        canvas.stroke(
            place(
                face, [(side * 0.012, face.eye_y - 0.02), (side * 0.024, face.eye_y + 0.04), (side * 0.020, y - 0.045)]
            ),
            0.006,
            (*dark, 170),
            (0, 0),
        )
    canvas.disc(MIDDLE, y - 0.002, 0.008, 0.014, mix(face.skin, (255, 248, 242), 0.7))
