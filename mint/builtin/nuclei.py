"""Simulated tissue: tiles like those of slides stained with haematoxylin and eosin, for the 19 tissues of PanNuke.

`python -m mint.builtin.nuclei --sheet tiles.png` draws tiles of every tissue. A tile's description is worded from the
facts that the tile is drawn from, and never names the tissue.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image

from ..errors import ConfigError
from ..files import replacing
from ..types import Record
from .canvas import Array, Canvas, over, picture
from .sheet import contact_sheet
from .tissue_drawing import Stain, draw_stain, ground, paint_tile
from .tissue_facts import tile_facts, tissues
from .tissue_text import describe

SIZE = 128
SPLITS = ("train", "validation", "test")


def draw_tile(tissue: str, seed: int, size: int = SIZE) -> Image.Image:
    """A tile of this tissue, `size` pixels square; the same arguments give the same tile, bit for bit."""
    facts = tile_facts(tissue, seed)
    rng = np.random.default_rng([seed, crc32(tissue.encode()), 3])
    stain = draw_stain(rng)
    canvas = Canvas(size, fine=2, ground=ground(facts, stain))
    paint_tile(canvas, facts, stain, rng)
    glass = np.zeros((size, size, 3), np.float32)
    return picture(_exposed(over(glass, canvas.layer()), stain, rng))


def _exposed(pixels: Array, stain: Stain, rng: np.random.Generator) -> Array:
    """The microscope's lamp, a little off centre, and the camera's grain."""
    size = len(pixels)
    slope = stain.glow * (1 + stain.lean * np.linspace(-1, 1, size, dtype=np.float32))
    exposed: Array = pixels * slope[None, :, None] + rng.standard_normal(pixels.shape, dtype=np.float32) * stain.noise
    return exposed


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile that is drawn when it is asked for."""

    tissue: str
    seed: int
    size: int = SIZE

    def draw(self) -> Image.Image:
        return draw_tile(self.tissue, self.seed, self.size)


def draw_tissue_cases(n: int, seed: int = 0, split: str = "train", size: int = SIZE) -> Iterator[Record]:
    """n tiles with descriptions, all tissues about equally often; splits are drawn independently of one another."""
    if split not in SPLITS:
        raise ConfigError(f"split {split!r}; wanted one of {', '.join(SPLITS)}")
    names = tuple(tissues())
    for index in range(n):
        first, second = np.random.SeedSequence([seed, crc32(split.encode()), index]).generate_state(2)
        tissue, tile_seed = names[int(first) % len(names)], int(second)
        yield Record(
            id=f"tissue-{split}-{seed}-{index}",
            note=describe(tile_facts(tissue, tile_seed), np.random.default_rng([tile_seed, 4])),
            image=Tile(tissue, tile_seed, size),
            label=tissue,
            split=split,
        )


def _sheet(path: Path, size: int, across: int) -> None:
    cells = [(name, [draw_tile(name, seed, size) for seed in range(across)]) for name in tissues()]
    with replacing(path) as file:
        contact_sheet(cells, across=2).save(file, format="PNG")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mint.builtin.nuclei", description="Draw tiles of every tissue.")
    parser.add_argument("--sheet", type=Path, required=True, help="where the PNG goes, for instance tiles.png")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels of one tile")
    parser.add_argument("--tiles", type=int, default=5, help="tiles of each tissue")
    options = parser.parse_args()
    _sheet(options.sheet, options.size, options.tiles)


if __name__ == "__main__":
    main()
