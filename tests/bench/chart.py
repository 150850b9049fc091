"""The fractions of the floor, or on a processor the times relative to ours, as one picture.

    python tests/bench/chart.py bench.json chart.png

`bench.json` is what `python -m mint.kernels.bench --out bench.json` or `tests/bench/gpu.py` writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mint.files import replacing

WIDTH, ROW, NAMES, VALUES, MARGIN = 1200, 26, 330, 230, 24
OURS, THEIRS, FAINT, INK = "#2f6fb2", "#a9b4c0", "#d9dee4", "#1d2329"

Line = dict[str, Any]


def value(line: Line) -> float | None:
    """What a bar shows: the fraction of the floor where it is known, else how many times as fast as ours."""
    if "failed" in line:
        return None
    found = line["fraction"] if line["fraction"] is not None else (1 / line["to_ours"] if line["to_ours"] else None)
    return None if found is None else float(found)


def words(line: Line) -> str:
    if "failed" in line:
        return "failed"
    time = f"{line['ms']:,.2f} ms"
    return (
        f"{time}, {line['fraction']:.0%}" if line["fraction"] is not None else f"{time}, {line['to_ours'] or 0:.2f} x"
    )


def draw(report: dict[str, Any]) -> Image.Image:
    """One bar a side, those of a case together, ours first and coloured."""
    cases = [
        (name, list(lines)) for name, lines in groupby(report["lines"], lambda one: f"{one['bench']}: {one['case']}")
    ]
    floors = any(line.get("fraction") is not None for line in report["lines"])
    height = 4 * MARGIN + sum(ROW * (len(lines) + 2) for _, lines in cases)
    picture = Image.new("RGB", (WIDTH, height), "white")
    pen, plain, large = ImageDraw.Draw(picture), ImageFont.load_default(15), ImageFont.load_default(21)
    pen.text((MARGIN, MARGIN), f"Measured on: {report['device']}, torch {report['torch']}", INK, large)
    other = "bar: speed; number: time, ours = 1 (a shared machine, where only the ratios mean anything)"
    meaning = "bar: share of the floor that is reached" if floors else other
    pen.text((MARGIN, MARGIN + 30), meaning, INK, plain)
    top = 4 * MARGIN
    for name, lines in cases:
        pen.text((MARGIN, top), name, INK, plain)
        bars(pen, plain, lines, top + ROW, floors)
        top += ROW * (len(lines) + 2)
    return picture


def bars(pen: ImageDraw.ImageDraw, font: Any, lines: list[Line], top: int, floors: bool) -> None:
    room = WIDTH - NAMES - VALUES - MARGIN
    longest = max([1.0, *(found for line in lines if (found := value(line)) is not None)])
    for at, line in enumerate(lines):
        y, found = top + at * ROW, value(line)
        pen.text((MARGIN + 16, y + 2), line["side"], INK, font)
        if floors:
            pen.rectangle((NAMES, y + 3, NAMES + room / longest, y + ROW - 6), outline=FAINT)
        if found is not None:
            colour = OURS if line["side"].startswith("ours") else THEIRS
            pen.rectangle((NAMES, y + 3, NAMES + max(room * found / longest, 1), y + ROW - 6), fill=colour)
        pen.text((WIDTH - VALUES, y + 2), words(line), INK, font)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    given = parser.parse_args()
    picture = draw(json.loads(given.report.read_text()))
    with replacing(given.picture) as file:
        picture.save(file, "PNG")


if __name__ == "__main__":
    main()
