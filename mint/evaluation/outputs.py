"""Predictions on their way to a file: one line a case as it comes, taken up where a killed run left off, as CSV if asked."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, WorkError
from ..files import held, read_json, replacing, write_json
from ..types import Prediction
from .predictions import prediction_row, read_predictions

COLUMNS = ("id", "place", "label", "logprob", "probability", "outside", "text", "passages")
_WIDTH = 100  # characters of a passage in a table


class Output:
    """The file `path`, written as `path.part` line by line and renamed at the end.

    `settings` are what the answers depend on: a part that was written with others is refused, not mixed in. The part is
    held from here until `write` ends: a second run into it is refused.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], form: str = "auto") -> None:
        self.path, self.form = Path(path), form
        if form == "table":
            raise ConfigError("--format table: is for people; with --out give jsonl or csv")
        if form == "auto":
            self.form = "csv" if self.path.suffix.lower() == ".csv" else "jsonl"
        self.part = self.path.with_name(self.path.name + ".part")
        self.note = self.path.with_name(self.path.name + ".part.json")
        try:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            self.file = os.fdopen(held(self.part), "r+b")
        except OSError as fault:
            raise WorkError(f"{self.part}: cannot be written ({fault.strerror}); give another --out") from fault
        try:
            self.done = self._taken_up(json.loads(json.dumps(settings)))
        except BaseException:
            self.file.close()
            raise

    def _taken_up(self, wanted: Any) -> frozenset[str]:
        """The cases that are answered; a line that the kill broke off is cut away."""
        data = self.file.read()
        if data and self.note.exists():
            if read_json(self.note) != wanted:
                raise ConfigError(f"{self.part}: was begun with other settings; delete it, or give another --out")
            self.file.truncate(data.rfind(b"\n") + 1)
            done = frozenset(prediction.id for prediction in read_predictions(self.part))
            if done:
                return done
        self.file.truncate(0)
        write_json(self.note, wanted)
        return frozenset()

    def write(self, predictions: Iterable[Prediction]) -> int:
        """Add predictions as they come, then give the file its name; returns how many it holds."""
        count = len(self.done)
        try:
            with self.file as file:
                file.seek(0, os.SEEK_END)
                for prediction in predictions:
                    file.write(_line(prediction))
                    file.flush()
                    count += 1
                os.fsync(file.fileno())
                self._finish()
        except OSError as fault:
            raise WorkError(f"{self.part}: cannot be written ({fault.strerror}); free some space") from fault
        return count

    def _finish(self) -> None:
        if self.form == "csv":
            with replacing(self.path) as file:
                for text in csv_lines(read_predictions(self.part)):
                    file.write(text.encode())
            self.part.unlink()
        else:
            os.replace(self.part, self.path)
        self.note.unlink(missing_ok=True)


def _line(prediction: Prediction) -> bytes:
    return json.dumps(prediction_row(prediction), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def csv_lines(predictions: Iterable[Prediction]) -> Iterator[str]:
    """A header, then a line for each class of each case; a case without classes has one line with its text."""
    yield _csv(COLUMNS)
    for prediction in predictions:
        passages = " | ".join(prediction.passages)
        shown: list[Mapping[str, Any]] = list(prediction.ranking) or [{}]
        for place, entry in enumerate(shown, start=1):
            numbers = (entry.get(key, "") for key in ("label", "logprob", "probability", "outside"))
            yield _csv((prediction.id, place, *numbers, prediction.text or "", passages))


def _csv(cells: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def table(prediction: Prediction) -> str:
    """One prediction for a person, with the passages that stood before the case."""
    entries = prediction.ranking
    if any("probability" in entry for entry in entries):
        lines = [f"{place:3}  {entry['probability']:7.4f}  {entry['label']}" for place, entry in enumerate(entries, 1)]
    else:
        lines = [prediction.text or "", *outside(entries)]
    return "\n".join([*lines, *(f"after {_shortened(passage)}" for passage in prediction.passages)])


def _shortened(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def outside(ranking: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each name of a free text that is no label of the closed set."""
    return [f"outside the set: {entry['label']}" for entry in ranking if entry.get("outside")]


def printed(predictions: Iterable[Prediction], form: str) -> Iterator[Any]:
    """Predictions as they are printed, one by one: "jsonl" rows, "csv" lines, or a "table" of each."""
    if form == "csv":
        yield from (line.rstrip("\n") for line in csv_lines(predictions))
    elif form == "table":
        for number, prediction in enumerate(predictions):
            yield (
                table(prediction) if prediction.id == "case" and not number else f"{prediction.id}\n{table(prediction)}"
            )
    else:
        yield from map(prediction_row, predictions)
