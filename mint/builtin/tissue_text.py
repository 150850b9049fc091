"""A short description of a tile, worded from its facts: what a pathologist would see, never where it comes from."""

from __future__ import annotations

import numpy as np

from .tissue_facts import Tissue

_OPENINGS = ("H&E tile with ", "The tile shows ", "Stained section: ", "")


def describe(facts: Tissue, rng: np.random.Generator) -> str:
    """One or two sentences; about one remark in seven is left out, and the wording varies."""
    remarks = [*_nuclei(facts, rng), *_architecture(facts, rng), *_between(facts, rng)]
    kept = [
        remark for remark, chance in zip(remarks, rng.random(len(remarks)), strict=True) if chance > 0.15
    ] or remarks[:1]
    half = min(len(kept), 3)
    first, rest = ", ".join(kept[:half]), ", ".join(kept[half:])
    text = _OPENINGS[int(rng.random() * len(_OPENINGS))] + first
    return ". ".join(part[0].upper() + part[1:] for part in (text, rest) if part) + "."


def _grade(value: float, *steps: tuple[float, str]) -> str:
    """The word of the first step that lies above the value; the last word holds for all that is higher."""
    return next((word for limit, word in steps if value < limit), steps[-1][1])


def _pick(rng: np.random.Generator, *wordings: str) -> str:
    return wordings[int(rng.random() * len(wordings))]


def _nuclei(facts: Tissue, rng: np.random.Generator) -> list[str]:
    size = _grade(facts.size, (7.1, "small"), (8.6, "medium-sized"), (99, "large"))
    shape = _grade(facts.length, (1.12, "round"), (1.3, "slightly oval"), (2.1, "elongated"), (99, "spindle-shaped"))
    crowd = _grade(facts.density, (0.35, "widely spaced"), (0.7, "evenly spread"), (99, "crowded"))
    chromatin = _grade(
        facts.chromatin,
        (0.42, "pale fine chromatin"),
        (0.64, "moderately dark chromatin"),
        (99, "dark coarse chromatin"),
    )
    remarks = [
        f"{crowd} {size} {shape} nuclei",
        _pick(rng, chromatin, chromatin.replace("chromatin", "nuclear staining")),
    ]
    if facts.nucleolus > 0.6:
        remarks.append(_pick(rng, "prominent nucleoli", "a distinct nucleolus in most nuclei"))
    if facts.spread > 0.24:
        remarks.append(_pick(rng, "marked variation of nuclear size", "pleomorphic nuclei"))
    return remarks


def _architecture(facts: Tissue, rng: np.random.Generator) -> list[str]:
    if not facts.glands:
        return [_pick(rng, "no glands", "solid growth without glands")]
    number = _grade(facts.glands, (2, "a single gland"), (4, "several glands"), (99, "many glands"))
    width = _grade(
        facts.lumen, (0.04, "barely open lumens"), (0.09, "small lumens"), (0.125, "open lumens"), (99, "wide spaces")
    )
    holds = {"air": "", "mucin": " that hold mucin", "colloid": " filled with pink colloid"}[facts.filling]
    lining = _grade(
        facts.columnar, (0.12, "flat lining cells"), (0.45, "cuboidal lining cells"), (99, "tall columnar lining cells")
    )
    return [f"{number} with {width}{holds}", lining]


def _between(facts: Tissue, rng: np.random.Generator) -> list[str]:
    remarks = []
    if facts.fibres > 0.5:
        course = "wavy" if facts.waves > 0.55 else "parallel"
        remarks.append(_pick(rng, f"abundant {course} fibres", f"dense stroma of {course} fibres"))
    if facts.fat:
        remarks.append(_pick(rng, "fat cells", "adipose tissue"))
    if facts.clear > 0.45:
        remarks.append(_pick(rng, "clear cytoplasm", "pale vacuolated cell bodies"))
    remarks.append(
        _grade(facts.pink, (0.38, "bluish cytoplasm"), (0.75, "pale pink cytoplasm"), (99, "deeply pink cytoplasm"))
    )
    if facts.borders > 0.6:
        remarks.append(_pick(rng, "sharp cell borders", "polygonal cells"))
    for value, limit, words in (
        (facts.lymphocytes, 0.18, ("lymphocytes", "a lymphocytic infiltrate")),
        (facts.pigment, 0.1, ("brown pigment", "melanin-like brown grains")),
        (facts.keratin, 0.3, ("keratin pearls", "whorls of keratin")),
        (facts.vessels, 0.4, ("many thin-walled vessels", "a network of sinusoids")),
    ):
        if value > limit:
            remarks.append(_pick(rng, *words))
    return remarks
