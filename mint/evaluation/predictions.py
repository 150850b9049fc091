"""Predictions in files: JSON lines, one case a line, streamed in and out, every fault named by file and line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import RecordError
from ..jsonlines import read_json_lines, refuse, write_json_lines
from ..types import Prediction


def prediction_row(prediction: Prediction) -> dict[str, Any]:
    """The JSON object of a prediction, without what it does not have."""
    row: dict[str, Any] = {"id": prediction.id, "ranking": list(prediction.ranking)}
    if prediction.text is not None:
        row["text"] = prediction.text
    if prediction.passages:
        row["passages"] = list(prediction.passages)
    return row


def write_predictions(path: str | Path, predictions: Iterable[Prediction]) -> int:
    """Write predictions as JSON lines, beside and renamed; returns how many."""
    return write_json_lines(path, map(prediction_row, predictions))


def read_predictions(path: str | Path, *, skipped: list[str] | None = None) -> Iterator[Prediction]:
    """The predictions of a JSON-lines file. With `skipped` a list, bad lines are left out and named there."""
    if Path(path).suffix.lower() == ".csv":
        raise RecordError(f"{path}: a table; JSON lines are wanted, as `predict --out FILE.jsonl` writes them")
    lines_of_ids: dict[str, int] = {}
    for number, row in read_json_lines(path, skipped=skipped):
        try:
            prediction = _prediction(row)
            if prediction.id in lines_of_ids:
                raise RecordError(
                    f"case {prediction.id!r} was answered in line {lines_of_ids[prediction.id]}; keep one"
                )
        except RecordError as fault:
            refuse(RecordError(f"{path}:{number}: {fault}"), skipped)
            continue
        lines_of_ids[prediction.id] = number
        yield prediction


def _prediction(row: Mapping[str, Any]) -> Prediction:
    name, text, passages = row.get("id"), row.get("text"), row.get("passages") or []
    ranking = row.get("ranking") or []
    if not isinstance(name, str) or not name:
        raise RecordError(f"id {str(name)[:80]!r}: the name of a case is wanted")
    if text is not None and not isinstance(text, str):
        raise RecordError(f"text is a JSON {type(text).__name__}; a string is wanted")
    if not isinstance(passages, list) or not all(isinstance(passage, str) for passage in passages):
        raise RecordError("passages must be a list of strings")
    if not isinstance(ranking, list):
        raise RecordError(f"ranking is a JSON {type(ranking).__name__}; a list is wanted")
    if text is None and row.get("ranking") is None:
        raise RecordError(f"neither 'ranking' nor 'text' (found: {', '.join(sorted(row)[:8])}); one of them is wanted")
    entries = tuple(_entry(place, entry) for place, entry in enumerate(ranking, start=1))
    return Prediction(id=name, ranking=entries, text=text, passages=tuple(passages))


def _entry(place: int, entry: Any) -> dict[str, Any]:
    label = entry.get("label") if isinstance(entry, dict) else None
    if not isinstance(label, str) or not label.strip():
        raise RecordError(f'ranking, place {place}: wanted {{"label": name, "logprob": number, "probability": number}}')
    for key, low, high in (("logprob", -math.inf, 1e-3), ("probability", 0.0, 1.001)):
        value = entry.get(key)
        if value is not None and not _is_number(value, low, high):
            raise RecordError(
                f"ranking, place {place} ({label[:80]!r}): {key} {value!r} is none; see how it was written"
            )
    return dict(entry)


def _is_number(value: Any, low: float, high: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and low <= value <= high
