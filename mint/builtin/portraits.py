"""Simulated photos for cases that have none: a face drawn from the photo-visible findings of each (`--draw-faces`).

What the photo shows leaves the note, so that the note tells what is known beside the face. A drawn face is no photo of
the patient, and whatever is made from it has to say that it is simulated.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from zlib import crc32

from ..records.notes import age_in_years, compose_note, composed
from ..types import Record
from .face_terms import drawable_labels, nearest
from .faces import SIZE, Photo

SIMULATED = "Photos are simulated: each face is drawn from the photo-visible findings of its case, and is nobody's."
"""What has to be said wherever drawn faces were used."""


def is_drawn(record: Record) -> bool:
    """Whether the photo of this case is a drawing of its findings."""
    return isinstance(record.image, Photo)


def seen(record: Record, photo_terms: Collection[str] = frozenset()) -> tuple[str, ...]:
    """The findings of a case that a photo shows: those that can be drawn, or those among `photo_terms` (in small
    letters) where that is given."""
    return tuple(term for term in record.terms if (term.lower() in photo_terms if photo_terms else _drawing(term)))


def with_drawn_face(record: Record, photo_terms: Collection[str] = frozenset(), size: int = SIZE) -> Record:
    """The case with a face drawn from its photo-visible findings, which leave a note that was composed from the findings.

    A case with a photo of its own stays as it is. One without any finding to draw gets no photo.
    """
    shown = seen(record, photo_terms)
    drawn = tuple(sorted({_drawing(term) or "" for term in shown} - {""}))
    if record.image is not None or not shown:
        return record
    note = _without(record, shown) if record.note == compose_note(record) else record.note
    sex = record.sex if record.sex in ("female", "male") else None
    photo = Photo(drawn, sex, age_in_years(record.age), None, crc32(record.id.encode()), size)
    return replace(record, note=note, image=photo if drawn else None)


def told(record: Record, photo_terms: Collection[str] = frozenset()) -> tuple[str, ...]:
    """The findings that the note of a case tells: all, but where the note was composed without those of the photo."""
    shown = seen(record, photo_terms)
    apart = record.note == _without(record, shown)
    return tuple(term for term in record.terms if term not in shown) if apart else record.terms


def _without(record: Record, shown: Collection[str]) -> str:
    """The composed note of a case without some of its findings."""
    return composed(record, (term for term in record.terms if term not in shown))


def _drawing(term: str) -> str | None:
    """The HPO id of the drawing that shows a finding, given by id or by name."""
    return nearest(drawable_labels().get(term.lower(), term))
