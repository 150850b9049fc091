"""The three views of each patient, and their order."""

from __future__ import annotations

from collections import Counter

import pytest

from mint.errors import RecordError
from mint.teaching.views import Views
from mint.types import Record


def test_every_patient_is_shown_in_three_views() -> None:
    cases = [Record(f"p{n}", note=f"note {n}", image=f"{n}.png", label="a") for n in range(24)]
    views = Views(cases, seed=0)
    assert len(views) == 3 * len(cases)
    shown = list(views.epoch(0))
    kinds: Counter[str] = Counter()
    by_id = {record.id: record for record in cases}
    for view in shown:
        own = by_id[view.id]
        if view.note == own.note:
            kinds["whole" if view.image == own.image else "swapped"] += 1
        else:
            assert (view.note, view.image) == ("", own.image)
            kinds["photo"] += 1
        assert view.label == own.label
    assert kinds == {"whole": 24, "photo": 24, "swapped": 24}
    assert shown == list(Views(cases, seed=0).epoch(0))
    assert shown[10:] == list(views.epoch(0, start=10))
    assert shown != list(views.epoch(1))
    assert shown != list(Views(cases, seed=1).epoch(0))


def test_the_other_photo_is_of_another_patient() -> None:
    siblings = [Record(f"s{n}", note="x", image=f"{n}.png", label="a", group="one") for n in range(5)]
    stranger = Record("t", note="y", image="t.png", label="a")
    for view in Views([*siblings, stranger], seed=0).epoch(0):
        if view.group and view.note and view.image != f"{view.id[1:]}.png":
            assert view.image == "t.png"
    assert len(Views(siblings, seed=0)) == 10  # nobody to swap with


def test_a_patient_without_a_photo_is_shown_by_the_note() -> None:
    alone = [Record("a", note="x", label="l"), Record("b", note="y", label="l")]
    assert sorted(view.id for view in Views(alone, seed=0).epoch(0)) == ["a", "b"]
    mixed = [*alone, Record("c", image="c.png", label="l"), Record("d", image="d.png", label="l")]
    shown = [(view.id, view.image) for view in Views(mixed, seed=0).epoch(0)]
    assert len(shown) == 6
    assert sum(name in "ab" and image is None for name, image in shown) == 2
    with pytest.raises(RecordError, match="record e: neither a note nor an image"):
        Views([Record("e", label="l")], seed=0)
