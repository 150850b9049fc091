"""Tiles drawn once, for the two tissue models to be made from: pixels as both networks take them, and what is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..images import open_image
from ..images.rules import CLIP_MEAN, CLIP_STD
from ..progress import progress
from ..types import Record
from .nuclei import draw_tissue_cases
from .tissue_facts import COLUMNS, tile_facts

SIDE = 64
"""Pixels of a side of the tiles that both models were made on, and see."""
NUMBERS = tuple(name for name in COLUMNS if name not in ("tissue", "filling"))
"""The facts that are numbers. While they are trained, both networks also tell these, so that they learn to look."""
_LIGHT = 0.1  # how much a colour is changed at random


class TilePool:
    """N tiles: their records, bytes (N, 3, S, S), and their facts (N, F), of mean 0 and deviation 1 over the pool."""

    def __init__(self, count: int, seed: int) -> None:
        self.records = list(draw_tissue_cases(count, seed, "train", SIDE))
        drawn = [np.asarray(open_image(record.image)) for record in progress(self.records, "tiles", count, "tile")]
        self.bytes = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()
        facts = torch.tensor([_numbers(record) for record in self.records])
        self.facts = (facts - facts.mean(0)) / facts.std(0).clamp(min=1e-3)
        self.random = np.random.default_rng(seed)

    def draw(self, count: int) -> Tensor:
        """The rows of `count` tiles."""
        return torch.from_numpy(self.random.integers(0, len(self.records), count))

    def seen(self, rows: Tensor) -> Tensor:
        """Pixels (n, 3, S, S): each tile turned and mirrored at random, since tissue has no upper side, and relit."""
        turned = torch.stack([_turned(tile, int(self.random.integers(8))) for tile in self.bytes[rows]])
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        light = torch.from_numpy(self.random.standard_normal((2, len(rows), 3, 1, 1)).astype(np.float32)) * _LIGHT
        return (turned / 255 - mean) / std * (1 + light[0]) + light[1]


def _turned(tile: Tensor, way: int) -> Tensor:
    """One of the eight ways to lay a square tile (3, S, S) on the table."""
    turned = torch.rot90(tile, way % 4, (1, 2))
    return turned.flip(2) if way >= 4 else turned


def _numbers(record: Record) -> list[float]:
    drawn: Any = record.image
    facts = tile_facts(drawn.tissue, drawn.seed)
    return [float(getattr(facts, name)) for name in NUMBERS]
