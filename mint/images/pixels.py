"""Pictures to the pixels of each network: ViLT's padded batch, CLIP's square, the tiles of Llama 3.2 Vision.

A picture is anything that `open_image` takes; it is made small as soon as it is open, so a batch of large ones fits.
Shapes: B batch, n pictures of a row, H and W pixels, S side of a square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import RecordError
from . import MAX_PIXELS, open_image
from .rules import ClipSettings, MllamaSettings, ViltSettings

VILT_LONGEST = 1333 / 800
"""The longer side may be this many times the shorter; longer pictures are shrunk."""


def vilt_pixels(images: Iterable[Any], settings: ViltSettings) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, H, W) float32 and mask (B, H, W) int64, padded right and below with 0 to the batch's largest."""
    pictures = _each(lambda image: _vilt_bytes(image, settings), images)
    if not pictures:
        raise RecordError("no pictures; ViLT's batch needs at least one")
    heights = torch.tensor([picture.shape[0] for picture in pictures])
    widths = torch.tensor([picture.shape[1] for picture in pictures])
    height, width = int(heights.amax()), int(widths.amax())
    pixels = np.zeros((len(pictures), 3, height, width), np.float32)
    for out, picture in zip(pixels, pictures, strict=True):
        _fill(out, picture, settings.colours.table())
    return torch.from_numpy(pixels), _corner_mask(heights, widths, height, width)


def _corner_mask(heights: Tensor, widths: Tensor, height: int, width: int) -> Tensor:
    """1 in the upper left heights[b] x widths[b], else 0: (B, height, width) int64."""
    if bool((heights == height).all()) and bool((widths == width).all()):
        return torch.ones(1, 1, 1, dtype=torch.int64).expand(len(heights), height, width)  # nothing to store
    rows = torch.arange(height) < heights[:, None]
    columns = torch.arange(width) < widths[:, None]
    return (rows[:, :, None] & columns[:, None, :]).to(torch.int64)


def _vilt_bytes(image: Any, settings: ViltSettings) -> np.ndarray:
    picture = open_image(image)
    width, height = picture.size
    new_height, new_width = vilt_size(height, width, settings)
    if not (new_height and new_width):
        raise _too_narrow(image, width, height)
    return np.asarray(picture.resize((new_width, new_height), settings.resample))


def vilt_size(height: int, width: int, settings: ViltSettings) -> tuple[int, int]:
    """The (height, width) that ViLT sees; 0 where a picture is so narrow that nothing is left of a side."""
    scale = settings.shortest / min(height, width)
    sides = [settings.shortest if side == min(height, width) else scale * side for side in (height, width)]
    longest = int(VILT_LONGEST * settings.shortest)
    if max(sides) > longest:
        scale = longest / max(sides)
        sides = [scale * side for side in sides]
    new_height, new_width = (int(side + 0.5) // settings.divisor * settings.divisor for side in sides)
    return new_height, new_width


def clip_pixels(images: Iterable[Any], settings: ClipSettings) -> Tensor:
    """Pixels (B, 3, S, S) float32: the shorter side resized, the middle cut out."""
    pictures = _each(lambda image: _clip_bytes(image, settings), images)
    pixels = np.zeros((len(pictures), 3, *settings.crop), np.float32)
    for out, picture in zip(pixels, pictures, strict=True):
        _fill(out, picture, settings.colours.table())
    return torch.from_numpy(pixels)


def _clip_bytes(image: Any, settings: ClipSettings) -> np.ndarray:
    picture = open_image(image)
    short, long = sorted(picture.size)
    longer = int(settings.shortest * long / short)
    if settings.shortest * longer > MAX_PIXELS:
        raise _too_narrow(image, *picture.size)
    width, height = (settings.shortest if side == short else longer for side in picture.size)
    picture = picture.resize((width, height), settings.resample)
    crop_height, crop_width = settings.crop
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return np.asarray(picture.crop((left, top, left + crop_width, top + crop_height)))  # black beyond its edges


def _too_narrow(image: Any, width: int, height: int) -> RecordError:
    name = image if isinstance(image, (str, Path)) else "picture"
    return RecordError(f"{name}: {width} x {height} pixels, too narrow for this network; crop it nearer to a square")


@dataclass(frozen=True, slots=True)
class MllamaPixels:
    """The pictures of a batch as tiles; a row with fewer than the longest ends in empty ones, id 0 and mask 1000."""

    pixels: Tensor  # (B, n, max_tiles, 3, S, S) float32; an absent tile is 0
    aspect_ratio_ids: Tensor  # (B, n) int64: 1 + the place of (tiles high, tiles wide) in the list of arrangements
    aspect_ratio_mask: Tensor  # (B, n, max_tiles) int64: 1 for a tile that is there
    tiles: list[list[int]]  # the number of tiles of each picture


def mllama_pixels(images: Sequence[Sequence[Any]], settings: MllamaSettings) -> MllamaPixels:
    """For each row its pictures, each laid out on the tiles that fit it best; tiles run row by row."""
    shape = len(images), max((len(row) for row in images), default=0)
    pixels = np.zeros((*shape, settings.max_tiles, 3, settings.size, settings.size), np.float32)  # untouched is free
    ids = torch.zeros(*shape, dtype=torch.int64)
    mask = torch.zeros(*shape, settings.max_tiles, dtype=torch.int64)
    mask[..., 0] = 1
    tiles: list[list[int]] = []
    for i, row in enumerate(images):
        tiles.append([])
        for j, image in enumerate(row):
            high, wide = _lay_out(image, pixels[i, j], settings)
            ids[i, j] = 1 + arrangements(settings.max_tiles).index((high, wide))
            mask[i, j, : high * wide] = 1
            tiles[i].append(high * wide)
    return MllamaPixels(torch.from_numpy(pixels), ids, mask, tiles)


def _lay_out(image: Any, tiles: np.ndarray, settings: MllamaSettings) -> tuple[int, int]:
    """Fill `tiles` (max_tiles, 3, S, S) from the picture; returns how many tiles high and wide it is."""
    picture, size = open_image(image), settings.size
    high, wide = best_arrangement(picture.height, picture.width, size, settings.max_tiles)
    height, width = fitted_size(picture.height, picture.width, high * size, wide * size, size)
    pixels = np.asarray(picture.resize((width, height), settings.resample))
    table = settings.colours.table()
    tiles[: high * wide] = table[:, :1, None]  # beyond the picture: black, before the colours
    for tile in range(high * wide):
        top, left = tile // wide * size, tile % wide * size
        _fill(tiles[tile], pixels[top : top + size, left : left + size], table)
    return high, wide


@lru_cache(maxsize=16)
def arrangements(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (tiles high, tiles wide) of at most `max_tiles` tiles, in the order that the aspect ratio ids count."""
    sides = range(1, max_tiles + 1)
    return tuple((high, wide) for high in sides for wide in sides if high * wide <= max_tiles)


def best_arrangement(height: int, width: int, size: int, max_tiles: int) -> tuple[int, int]:
    """The arrangement that enlarges a picture least; if none holds it, shrinks it least; then the smallest."""

    def rank(tiles: tuple[int, int]) -> tuple[bool, float, int]:
        scale = min(tiles[0] * size / height, tiles[1] * size / width)
        return scale < 1, scale if scale >= 1 else -scale, tiles[0] * tiles[1]

    return min(arrangements(max_tiles), key=rank)


def fitted_size(height: int, width: int, canvas_height: int, canvas_width: int, size: int) -> tuple[int, int]:
    """(height, width) of the picture on its canvas: ratio kept, shrunk to the canvas, enlarged to one tile at most."""
    target_height = min(max(height, size), canvas_height)
    target_width = min(max(width, size), canvas_width)
    by_height, by_width = target_height / height, target_width / width
    if by_width < by_height:
        return min(math.floor(height * by_width) or 1, target_height), target_width
    return target_height, min(math.floor(width * by_height) or 1, target_width)


def _each(small_bytes: Callable[[Any], np.ndarray], images: Iterable[Any]) -> list[np.ndarray]:
    """`small_bytes` of each picture, on as many threads as torch uses: PIL works outside Python's lock."""
    threads = torch.get_num_threads()
    if threads == 1:
        return [small_bytes(image) for image in images]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(small_bytes, images))


def _fill(out: np.ndarray, picture: np.ndarray, table: np.ndarray) -> None:
    """Write the bytes (h, w, 3) into the upper left of `out` (3, H, W), each as its channel's `table` has it."""
    height, width = picture.shape[:2]
    for channel in range(3):
        np.take(table[channel], picture[..., channel], out=out[channel, :height, :width], mode="clip")
