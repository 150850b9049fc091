"""A few cases for a person to look at: photo, note, truth, and what each system answered."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Mapping
from typing import Any

from ..images import open_image
from ..types import Prediction, Record

_SIDE = 320


def shown_cases(
    truth: Iterable[Record],
    answers: Mapping[str, Iterable[Prediction]],
    *,
    count: int = 10,
    top: int = 5,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """`count` cases drawn at random (not picked), each as the report shows it: the value of `Report.cases`.

    `answers` has the predictions of each system under its name, in the order in which they are to be read.
    """
    records = list(truth)
    drawn = random.Random(seed).sample(records, min(count, len(records)))
    wanted = {record.id for record in drawn}
    given = {name: {p.id: p for p in predictions if p.id in wanted} for name, predictions in answers.items()}
    return [
        {
            "id": record.id,
            "note": record.note,
            "photo": None if record.image is None else photo_bytes(record.image),
            "truth": list(dict.fromkeys(([record.label] if record.label else []) + list(record.labels))),
            "answers": {name: _answer(found.get(record.id), top) for name, found in given.items()},
        }
        for record in drawn
    ]


def _answer(prediction: Prediction | None, top: int) -> dict[str, Any]:
    """The first names of an answer, or its text where it has no ranking."""
    if prediction is None:
        return {"names": [], "text": None}
    names = [(str(entry["label"]), entry.get("probability")) for entry in prediction.ranking[:top]]
    return {"names": names, "text": None if names else prediction.text}


def photo_bytes(image: Any) -> bytes:
    """A small JPEG of a picture without anything but its pixels: no name, place, date or comment goes along."""
    picture = open_image(image).copy()
    picture.thumbnail((_SIDE, _SIDE))
    picture.info.clear()
    out = io.BytesIO()
    picture.save(out, format="JPEG", quality=82)
    return out.getvalue()
