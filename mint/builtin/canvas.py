"""A drawing surface in unit coordinates: shapes are drawn a few times larger and reduced, so that edges are smooth.

(0, 0) is the upper left corner and (1, 1) the lower right. Colours are (red, green, blue) of 0..255, or with a fourth
number for opacity. What is drawn later covers what was drawn before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[np.float32]
Colour = tuple[float, ...]
View = tuple[float, float, float]
"""The point that stays where it is, and by how much everything is enlarged around it."""
WHOLE: View = (0.5, 0.5, 1.0)
Points = Sequence[tuple[float, float]] | NDArray[np.floating]


class Canvas:
    """A transparent surface of `size` pixels square that is drawn on `fine` times larger, seen through `view`."""

    def __init__(self, size: int, view: View = WHOLE, fine: int = 3, ground: Colour | None = None) -> None:
        self.size, self.view, self.fine, self.scale = size, view, fine, size * fine
        self.zoom = view[2] * self.scale
        self.shift = np.array([(1 - view[2]) * view[0], (1 - view[2]) * view[1]]) * self.scale
        self.image = Image.new("RGBA", (self.scale, self.scale), (0, 0, 0, 0) if ground is None else ink(ground))
        self.pen = ImageDraw.Draw(self.image)

    def area(self, points: Points, colour: Colour) -> None:
        """A filled polygon with straight sides."""
        self.pen.polygon(self._flat(points), fill=ink(colour))

    def blob(self, points: Points, colour: Colour) -> None:
        """A filled smooth closed curve through the points."""
        self.area(closed(points), colour)

    def line(self, points: Points, width: float, colour: Colour) -> None:
        """A smooth open curve of even width."""
        self.pen.line(self._flat(opened(points)), fill=ink(colour), width=max(1, round(width * self.zoom)))

    def hair(self, points: Points, width: float, colour: Colour) -> None:
        """A line of straight pieces: cheap, for strands and fibres that come in hundreds."""
        self.pen.line(self._flat(points), fill=ink(colour), width=max(1, round(width * self.zoom)))

    def stroke(self, points: Points, width: float, colour: Colour, ends: tuple[float, float] = (0.15, 0.15)) -> None:
        """A smooth curve, thickest in the middle, whose ends have these shares of `width`."""
        self.area(ribbon(opened(points), width, ends), colour)

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Colour, angle: float = 0.0) -> None:
        """An ellipse, turned by `angle` radians."""
        if angle:
            self.area(ellipse(x, y, rx, ry, angle), colour)
        else:
            self.pen.ellipse(self._flat([(x - rx, y - ry), (x + rx, y + ry)]), fill=ink(colour))

    def paste(self, other: Canvas, outline: Points) -> None:
        """Copy the part of another canvas that lies inside the closed polygon `outline`."""
        flat = np.asarray(outline) * self.zoom + self.shift
        left, top = (int(v) for v in np.clip(np.floor(flat.min(axis=0)) - 1, 0, self.scale - 1))
        right, low = (int(v) for v in np.clip(np.ceil(flat.max(axis=0)) + 2, 1, self.scale))
        if right <= left or low <= top:
            return
        mask = Image.new("L", (right - left, low - top))
        ImageDraw.Draw(mask).polygon([tuple(p) for p in (flat - (left, top)).tolist()], fill=255)
        self.image.paste(other.image.crop((left, top, right, low)), (left, top), mask)

    def layer(self) -> Array:
        """The drawing at its final size, (size, size, 4) in 0..1, colours already multiplied by opacity."""
        small = self.image.convert("RGBa").reduce(self.fine)
        return np.frombuffer(small.tobytes(), np.uint8).reshape(self.size, self.size, 4).astype(
            np.float32
        ) / np.float32(255)

    def _flat(self, points: Points) -> list[float]:
        flat: list[float] = (np.asarray(points) * self.zoom + self.shift).ravel().tolist()
        return flat


def over(below: Array, layer: Array) -> Array:
    """A layer laid on a picture: (H, W, 3) and (H, W, 4) -> (H, W, 3)."""
    return layer[..., :3] + below * (1 - layer[..., 3:])


def picture(pixels: Array) -> Image.Image:
    """(H, W, 3) in 0..1 -> an RGB image."""
    return Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8), "RGB")


def ink(colour: Colour) -> tuple[int, ...]:
    return tuple(min(255, max(0, int(channel))) for channel in colour)


def mix(one: Colour, other: Colour, share: float) -> tuple[float, float, float]:
    """The colour that lies `share` of the way from one to the other."""
    red, green, blue = (a + (b - a) * share for a, b in zip(one[:3], other[:3], strict=True))
    return red, green, blue


def shade(colour: Colour, factor: float) -> tuple[float, float, float]:
    return mix((0.0, 0.0, 0.0), colour, factor)


_SPLITS = 6


@cache
def _weights() -> NDArray[np.float64]:
    """Catmull-Rom weights of the four points around a piece at `_SPLITS` places in it: (_SPLITS, 4)."""
    t = np.arange(_SPLITS)[:, None] / _SPLITS
    cubic = np.array([[-1, 3, -3, 1], [2, -5, 4, -1], [-1, 0, 1, 0], [0, 2, 0, 0]]) / 2
    weights: NDArray[np.float64] = np.concatenate([t**3, t**2, t, t**0], axis=1) @ cubic
    return weights


def closed(points: Points) -> NDArray[np.float64]:
    """A smooth closed curve through n points: (n, 2) -> (6 n, 2)."""
    p = np.asarray(points, dtype=np.float64)
    around = np.stack([np.roll(p, 1, 0), p, np.roll(p, -1, 0), np.roll(p, -2, 0)], axis=1)  # (n, 4, 2)
    return (_weights() @ around).reshape(-1, 2)


def opened(points: Points) -> NDArray[np.float64]:
    """A smooth open curve through n points: (n, 2) -> (6 (n - 1) + 1, 2)."""
    p = np.asarray(points, dtype=np.float64)
    if len(p) < 3:
        return p
    q = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    around = np.stack([q[:-3], q[1:-2], q[2:-1], q[3:]], axis=1)
    return np.concatenate([(_weights() @ around).reshape(-1, 2), p[-1:]])


def ribbon(path: NDArray[np.float64], width: float, ends: tuple[float, float]) -> NDArray[np.float64]:
    """The outline of a curve drawn with a pen that swells towards the middle: (n, 2) -> (2 n, 2)."""
    along = np.concatenate([path[1:2] - path[:1], path[2:] - path[:-2], path[-1:] - path[-2:-1]])
    normal = along[:, ::-1] * (1, -1) / np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-9)[:, None]
    t = np.arange(len(path)) * (3 / (len(path) - 1))
    ease = np.minimum(1, np.minimum(ends[0] + t, ends[1] + 3 - t))[:, None]
    side = normal * ease * (width / 2)
    return np.concatenate([path + side, (path - side)[::-1]])


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0, n: int = 24) -> NDArray[np.float64]:
    """Points on a turned ellipse: (n, 2)."""
    turn = np.linspace(0, 2 * np.pi, n, endpoint=False)
    u, v = rx * np.cos(turn), ry * np.sin(turn)
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([x + u * c - v * s, y + u * s + v * c], axis=1)


class Relief:
    """Light and shadow as a sum of soft spots, worked out at the final size."""

    def __init__(self, size: int, view: View = WHOLE) -> None:
        grid = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.across, self.down = ((grid - view[axis]) / view[2] + view[axis] for axis in (0, 1))
        self.spots: list[tuple[float, float, float, float, float]] = []

    def spot(self, x: float, y: float, rx: float, ry: float, strength: float) -> None:
        """Lighter (strength > 0) or darker (< 0) around a point, falling off like a Gaussian."""
        self.spots.append((x, y, rx, ry, strength))

    def sum(self) -> Array:
        """How much lighter or darker every point is: (size, size), 0 where nothing changes."""
        x, y, rx, ry, strength = np.asarray(self.spots, np.float32).T[..., None]  # each (N, 1)
        across = np.exp(-(((self.across - x) / rx) ** 2))
        down = np.exp(-(((self.down - y) / ry) ** 2)) * strength
        lit: Array = down.T @ across
        return lit

    def trail(self, points: Points, radius: float, strength: float) -> None:
        """A soft line: spots along a curve."""
        for x, y in opened(points)[::3]:
            self.spot(x, y, radius, radius, strength)
