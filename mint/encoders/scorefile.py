"""A file of scores as a teacher, so that any model, whatever it runs on, can teach.

JSON lines `{"id": ..., "scores": {class: number}}`; or an `.npy` (N, C) beside `classes.txt`, with `ids.txt` where its
rows are not in the order of the records.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, RecordError
from ..images.arrays import map_array
from ..types import Record
from .classes import distinct, named, select
from .encoder import Encoder, in_batches

_LINE = 16 << 20
_BLOCK = 4096  # rows gathered before they become an array


class ScoreFile(Encoder):
    """Scores that were computed elsewhere: a table (N, C) and, for each id, its row."""

    def __init__(self, path: str | Path, classes: Iterable[str] | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ConfigError(f"{self.path}: no such file of scores; correct the path")
        stated, self.table, self.rows = _read_array(self.path) if _is_array(self.path) else _read_lines(self.path)
        self.classes, self.columns = select(stated, len(stated), classes, str(self.path))

    def score_batches(
        self, records: Iterable[Record], skipped: list[str] | None = None
    ) -> Iterator[tuple[list[Record], Tensor]]:
        if self.rows is not None:
            yield from super().score_batches(records, skipped)
            return
        start = 0
        for batch in in_batches(records, self.batch_size):
            rows = range(start, start + len(batch))
            start = rows.stop
            if start > len(self.table):
                raise self._miscount()
            yield batch, self._at(list(rows))
        if start < len(self.table):
            raise self._miscount()

    def _miscount(self) -> RecordError:
        count = f"{len(self.table):,} rows"
        return RecordError(f"{self.path}: {count}, and another number of records; say which is which in ids.txt")

    def score_batch(self, records: Sequence[Record]) -> Tensor:
        if self.rows is None:
            return self.scores(records)
        lacking = [record.id for record in records if record.id not in self.rows]
        if lacking:
            raise RecordError(f"{self.path}: no scores of record {named(lacking)}; add them, or leave the records out")
        return self._at([self.rows[record.id] for record in records])

    def _at(self, rows: list[int]) -> Tensor:
        found = torch.from_numpy(np.asarray(self.table[rows], dtype=np.float32))
        bad = (~found.isfinite()).any(1).nonzero()
        if len(bad):
            raise RecordError(f"{self.path}: row {rows[int(bad[0])]} has a score that is no finite number; mend it")
        return found if self.columns is None else found[:, self.columns]


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6) == b"\x93NUMPY"


def _read_array(path: Path) -> tuple[tuple[str, ...], Any, dict[str, int] | None]:
    try:
        table = map_array(path)
    except RecordError as error:
        raise ConfigError(f"{path}: not an array of numbers ({error}); save it with numpy.save") from error
    classes = distinct(_names(path.with_name("classes.txt")))
    if table.ndim != 2 or table.dtype.kind not in "fiu" or table.shape[1] != len(classes):
        found = f"{table.dtype} {list(table.shape)}"
        raise ConfigError(
            f"{path}: {found}, numbers (N, {len(classes)}) were wanted: classes.txt has {len(classes)} names"
        )
    ids_file = path.with_name("ids.txt")
    if not ids_file.is_file():
        return classes, table, None
    ids = _names(ids_file)
    rows = {name: row for row, name in enumerate(ids)}
    if len(rows) != len(ids) or len(ids) != len(table):
        raise ConfigError(
            f"{ids_file}: {len(ids):,} ids, {len(rows):,} different, for {len(table):,} rows; give each its own"
        )
    return classes, table, rows


def _names(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").rstrip("\n").splitlines()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); write one name a line beside the scores"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from error


def _read_lines(path: Path) -> tuple[tuple[str, ...], Any, dict[str, int]]:
    rows: dict[str, int] = {}
    classes: tuple[str, ...] = ()
    blocks: list[np.ndarray] = []
    with path.open("rb") as file:
        lines = enumerate(iter(lambda: file.readline(_LINE), b""), 1)
        parsed = ((number, *_parse(line, f"{path}:{number}")) for number, line in lines if line.strip())
        while block := list(islice(parsed, _BLOCK)):
            classes = classes or tuple(block[0][2])
            blocks.append(
                np.array([_row(scores, classes, f"{path}:{number}") for number, _, scores in block], np.float32)
            )
            for number, name, _ in block:
                if name in rows:
                    raise RecordError(f"{path}:{number}: id {name!r} stands there twice; give each record one line")
                rows[name] = len(rows)
    if not blocks:
        raise RecordError(f'{path}: no line of scores; wanted lines {{"id": ..., "scores": {{class: number}}}}')
    return distinct(classes), np.concatenate(blocks), rows


def _parse(line: bytes, where: str) -> tuple[str, dict[str, Any]]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where}: not JSON ({error}); each line is one object") from error
    scores = entry.get("scores") if isinstance(entry, dict) else None
    if not isinstance(scores, dict) or not scores or not isinstance(entry.get("id"), (str, int)):
        raise RecordError(f'{where}: wanted {{"id": ..., "scores": {{class: number}}}}; correct the line')
    return str(entry["id"]), scores


_LARGEST = 3e38  # what a float32 holds


def _row(scores: dict[str, Any], classes: tuple[str, ...], where: str) -> list[float]:
    if scores.keys() != set(classes):
        lacking, extra = (
            [name for name in classes if name not in scores],
            [name for name in scores if name not in classes],
        )
        fault = f"no score of {named(lacking)}" if lacking else f"a score of {named(extra)}, which the first line lacks"
        raise RecordError(f"{where}: {fault}; score the same classes on every line")
    values = [scores[name] for name in classes]
    for name, value in zip(classes, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
            raise RecordError(f"{where}: the score of {name!r} is {value!r}, a finite number was wanted")
    return values
