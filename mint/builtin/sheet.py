"""A contact sheet: rows of small pictures, each row with its name above."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_TEXT, _GAP = 18, 8


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], across: int = 1) -> Image.Image:
    """All rows under their names, `across` rows side by side; every picture has the size of the first."""
    side = rows[0][1][0].width
    wide = max(len(pictures) for _, pictures in rows) * (side + 2) + _GAP
    high = side + _TEXT + _GAP
    sheet = Image.new("RGB", (across * wide + _GAP, -(-len(rows) // across) * high + _GAP), (250, 250, 248))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for place, (name, pictures) in enumerate(rows):
        left, top = _GAP + place % across * wide, _GAP + place // across * high
        pen.text((left, top), name, fill=(30, 30, 34), font=font)
        for k, shown in enumerate(pictures):
            sheet.paste(shown, (left + k * (side + 2), top + _TEXT))
    return sheet
