"""Simulated photos for cases that have none: what is drawn leaves a composed note, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mint.builtin.portraits import is_drawn, seen, told, with_drawn_face
from mint.commands import cli
from mint.records.notes import age_in_years, compose_note
from mint.types import Record

CASE = Record(
    "case-1", label="Kabuki syndrome", terms=("Ptosis", "Seizure", "HP:0000316"), sex="female", age="P7Y6M", group="p"
)


def test_what_the_photo_shows_leaves_the_note() -> None:
    drawn = with_drawn_face(Record(**_with(note=compose_note(CASE))))
    assert drawn.note == "Sex female Age 7 years 6 months Seizure"
    assert is_drawn(drawn)
    assert drawn.image.terms == ("HP:0000316", "HP:0000508")
    assert (drawn.image.sex, drawn.image.age) == ("female", 7.5)
    assert drawn.terms == CASE.terms
    assert told(drawn) == ("Seizure",)
    assert drawn.image.draw().size == (128, 128)


def test_a_note_in_somebody_s_own_words_stays() -> None:
    drawn = with_drawn_face(Record(**_with(note="A girl with ptosis.")))
    assert drawn.note == "A girl with ptosis."
    assert told(drawn) == CASE.terms


def test_a_photo_of_the_case_stays_and_no_finding_makes_no_face() -> None:
    pictured = Record(**_with(image="photo.png", note=compose_note(CASE)))
    assert with_drawn_face(pictured) == pictured
    assert not is_drawn(with_drawn_face(Record("two", note="Seizure", terms=("Seizure",))))


def test_a_table_says_what_a_photo_shows() -> None:
    assert seen(CASE) == ("Ptosis", "HP:0000316")
    assert seen(CASE, {"seizure"}) == ("Seizure",)


def test_the_branches_of_the_ontology_do_not_say_what_a_photo_shows() -> None:
    """The first four are not below 'Abnormality of the face', the cleft palate is."""
    shown = ("Hypertelorism", "Low-set ears", "Ptosis", "Strabismus")
    assert seen(Record("one", terms=(*shown, "Cleft palate", "HP:0000175"))) == shown


def test_the_face_depends_on_the_case_alone() -> None:
    one, other = (with_drawn_face(Record(**_with(note=compose_note(CASE)))) for _ in range(2))
    assert one.image == other.image
    assert with_drawn_face(Record(**_with(id="case-2"))).image.seed != one.image.seed


@pytest.mark.parametrize(("age", "years"), [("P3Y6M", 3.5), ("4", 4.0), (None, None), ("newborn", None)])
def test_ages_in_years(age: str | None, years: float | None) -> None:
    assert age_in_years(age) == years


def test_align_draws_faces_for_its_teacher_and_says_that_they_are_simulated(tmp_path: Path) -> None:
    """The teacher here lacks the class, which it says only after the face has been drawn."""
    row = {"id": "a", "label": "no such disease", "terms": ["Ptosis", "Seizure"]}
    (tmp_path / "cases.jsonl").write_text(json.dumps(row) + "\n")
    from mint.builtin.cases import STUDENT, TEACHER

    words = ["align", str(tmp_path / "cases.jsonl"), "--draw-faces", "--teacher", str(TEACHER), "--model", str(STUDENT)]
    said = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "run")])
    assert said.exit_code == 2
    assert "simulated" in said.output
    assert "'no such disease' is none of the teacher's" in said.output
    said = CliRunner().invoke(cli, ["align", "--draw-faces", "--pairs", "pairs.jsonl", "--model", "m"])
    assert said.exit_code == 2
    assert "--draw-faces: faces are drawn for CASES" in said.output


def _with(**changes: object) -> dict[str, object]:
    return {name: getattr(CASE, name) for name in Record.__slots__} | changes
