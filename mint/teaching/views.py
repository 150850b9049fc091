"""What a fusion encoder is shown of a patient in training: GestaltMML's three views, in an order drawn anew each epoch.

    photo and note      photo and "*" (no note)      note and another patient's photo

The third is why a teacher can rank by the note alone. A patient without a photo is shown by the note with no picture,
and, where there are photos, with another patient's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ..errors import RecordError
from ..types import Record

WHOLE, PHOTO, SWAPPED = 0, 1, 2
"""The record as it is; its photo alone; its note with another patient's photo."""


class Views:
    """All views of all records; `epoch` gives them in the order of one epoch."""

    def __init__(self, records: Sequence[Record], seed: int) -> None:
        self.records, self.seed = records, seed
        for record in records:
            if record.image is None and not record.note.strip():
                raise RecordError(f"record {record.id}: neither a note nor an image; leave it out of the cases")
        self.photos = np.array([row for row, record in enumerate(records) if record.image is not None], dtype=np.int64)
        patients = {record.group or record.id for record in (records[row] for row in self.photos)}
        self.several = len(patients) > 1
        listed = [(row, kind) for row, record in enumerate(records) for kind in self._kinds(record)]
        self.listed = np.array(listed, dtype=np.int64).reshape(-1, 2)

    def _kinds(self, record: Record) -> Iterator[int]:
        yield WHOLE
        if record.note.strip():
            if record.image is not None:
                yield PHOTO
            if self.several:
                yield SWAPPED

    def __len__(self) -> int:
        return len(self.listed)

    def epoch(self, number: int, start: int = 0) -> Iterator[Record]:
        """The views of one epoch from place `start`; the same for the same seed."""
        rng = np.random.default_rng([self.seed, number])
        order = rng.permutation(len(self))
        partners = rng.integers(0, max(1, len(self.photos)), len(self))
        for place in range(start, len(self)):
            row, kind = self.listed[order[place]]
            yield self._view(self.records[row], int(kind), int(partners[place]))

    def _view(self, record: Record, kind: int, partner: int) -> Record:
        if kind == PHOTO:
            return replace(record, note="")
        if kind == SWAPPED:
            return replace(record, image=self._another(record, partner).image)
        return record

    def _another(self, record: Record, partner: int) -> Record:
        """The record with a photo at `partner`, or the next one that is not of the same patient."""
        own = record.group or record.id
        while True:
            other: Record = self.records[int(self.photos[partner % len(self.photos)])]
            if (other.group or other.id) != own:
                return other
            partner += 1
