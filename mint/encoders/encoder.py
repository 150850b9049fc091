"""What every encoder offers: its classes, and the scores of records on them, a batch at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import parallel
from ..devices import pick_dtype
from ..errors import RecordError
from ..progress import Progress
from ..types import Record

R = TypeVar("R")


class Encoder(ABC):
    """A teacher: scores every record on every class; a higher score means a likelier class."""

    classes: tuple[str, ...]
    batch_size: int = 32

    @abstractmethod
    def score_batch(self, records: Sequence[Record]) -> Tensor:
        """Scores (n, C) float32 of n records, on the CPU."""

    def score_batches(
        self, records: Iterable[Record], skipped: list[str] | None = None
    ) -> Iterator[tuple[list[Record], Tensor]]:
        """Each batch of records with its scores; no more than one batch is held.

        A record that cannot be scored is refused by name; with a list for `skipped` it is left out and named there.
        """
        total = len(records) if isinstance(records, Sized) else None
        with Progress("scoring", total, "record") as bar:
            for batch, scores in self._shared(records, skipped) if parallel.size() > 1 else self._all(records, skipped):
                yield batch, scores
                bar.advance(len(batch))

    def _all(self, records: Iterable[Record], skipped: list[str] | None) -> Iterator[tuple[list[Record], Tensor]]:
        for batch in in_batches(records, self.batch_size):
            try:
                yield batch, self.score_batch(batch)
            except RecordError:
                if skipped is None:
                    raise
                yield from self._one_by_one(batch, skipped)

    def _shared(self, records: Iterable[Record], skipped: list[str] | None) -> Iterator[tuple[list[Record], Tensor]]:
        """The same with the work split over the ranks, each of which gets all scores; one record at a time."""
        seen: dict[int, Record] = {}

        def noted() -> Iterator[tuple[int, Record]]:
            for number, record in enumerate(records):
                seen[number] = record
                yield number, record

        def scored(turn: list[tuple[int, Record]], left_out: list[str] | None) -> Iterator[tuple[int, list[float]]]:
            numbers = {id(record): number for number, record in turn}
            for found, scores in self._all((record for _, record in turn), left_out):
                yield from ((numbers[id(record)], row) for record, row in zip(found, scores.tolist(), strict=True))

        for number, row in parallel.shared_out(noted(), scored, skipped, self.batch_size):
            yield [seen.pop(number)], torch.tensor([row])

    def _one_by_one(self, records: Sequence[Record], skipped: list[str]) -> Iterator[tuple[list[Record], Tensor]]:
        for record in records:
            try:
                scores = self.score_batch([record])
            except RecordError as error:
                skipped.append(str(error))
            else:
                yield [record], scores

    def scores(self, records: Iterable[Record]) -> Tensor:
        """Scores of all records: (N, C) float32."""
        found = [scores for _, scores in self.score_batches(records)]
        return torch.cat(found) if found else torch.empty(0, len(self.classes))


def in_batches(items: Iterable[R], size: int) -> Iterator[list[R]]:
    """Lists of `size` items, the last maybe shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def with_pictures(records: Sequence[Record], turn: Callable[[list[Any]], R]) -> R:
    """`turn` applied to the pictures of `records`; one that cannot be used is named by its record."""
    try:
        return turn([record.image for record in records])
    except RecordError:
        for record in records:  # several threads may have been at work: one at a time shows whose it is
            try:
                turn([record.image])
            except RecordError as error:
                raise RecordError(f"record {record.id}: {error}") from error
        raise


def choose_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """`auto` is float32 on every machine: an encoder is small, and rounding would reorder classes that score alike."""
    return torch.float32 if dtype == "auto" else pick_dtype(dtype, torch.device("cpu"))
