"""The facts of a tissue, and of one tile of it: the same numbers draw the picture and choose the words."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from zlib import crc32

import numpy as np

from ..errors import ConfigError, RecordError
from .tables import HERE, rows

FILLINGS = ("air", "mucin", "colloid")


@dataclass(frozen=True, slots=True)
class Tissue:
    """The columns of tissues.tsv, whose header says what each means."""

    tissue: str
    size: float
    spread: float
    length: float
    density: float
    chromatin: float
    nucleolus: float
    glands: float
    lumen: float
    columnar: float
    filling: str
    fibres: float
    waves: float
    fat: float
    clear: float
    borders: float
    lymphocytes: float
    pigment: float
    keratin: float
    vessels: float
    pink: float


COLUMNS = tuple(field.name for field in fields(Tissue))
_WORDS = ("tissue", "filling")
# How much one tile differs from its tissue: shares of the value, then plain shifts of what runs from 0 to 1.
_FACTORS = {"size": 0.10, "spread": 0.25, "length": 0.08, "lumen": 0.22}
_SHIFTS = (
    "density",
    "chromatin",
    "nucleolus",
    "columnar",
    "fibres",
    "waves",
    "clear",
    "borders",
    "lymphocytes",
    "pigment",
    "keratin",
    "vessels",
    "pink",
)
_SHIFT = 0.13


@cache
def tissues() -> dict[str, Tissue]:
    """Tissue name -> facts, in the order of the table (PanNuke's names, in alphabetical order)."""
    return {row["tissue"]: _tissue(row) for row in rows("tissues.tsv", COLUMNS)}


def _tissue(row: dict[str, str]) -> Tissue:
    try:
        numbers = {name: float(row[name]) for name in COLUMNS if name not in _WORDS}
    except ValueError as error:
        raise RecordError(
            f"{HERE / 'tissues.tsv'}:{row['']}: {error}; every column but tissue and filling is a number"
        ) from error
    if row["filling"] not in FILLINGS:
        raise RecordError(
            f"{HERE / 'tissues.tsv'}:{row['']}: filling {row['filling']!r}; wanted one of {', '.join(FILLINGS)}"
        )
    return Tissue(tissue=row["tissue"], filling=row["filling"], **numbers)


def tile_facts(tissue: str, seed: int) -> Tissue:
    """One tile's own facts: the tissue's, each moved a little; counts become whole numbers."""
    known = tissues().get(tissue)
    if known is None:
        raise ConfigError(f"tissue {tissue!r} is not in the table; wanted one of {', '.join(tissues())}")
    rng = np.random.default_rng([seed, crc32(tissue.encode()), 2])
    moves = dict(zip((*_FACTORS, *_SHIFTS), 2 * rng.random(len(_FACTORS) + len(_SHIFTS)) - 1, strict=True))
    facts: dict[str, float | str] = {"tissue": tissue, "filling": known.filling}
    facts |= {name: getattr(known, name) * (1 + share * moves[name]) for name, share in _FACTORS.items()}
    facts |= {name: _shifted(getattr(known, name), moves[name]) for name in _SHIFTS}
    facts |= {name: float(_count(getattr(known, name), rng)) for name in ("glands", "fat")}
    return Tissue(**facts)  # type: ignore[arg-type]


def _shifted(value: float, move: float) -> float:
    """A share of 0..1 moved by at most `_SHIFT`; what a tissue never has stays away."""
    return float(min(1.0, max(0.0, value + _SHIFT * move))) if value else 0.0


def _count(mean: float, rng: np.random.Generator) -> int:
    """A whole number near `mean`: what is rare may be missing, what is frequent varies by about a third."""
    return max(0, int(mean * (0.7 + 0.6 * rng.random()) + rng.random()))
