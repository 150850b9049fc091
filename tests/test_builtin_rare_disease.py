"""The table of rare diseases, the patients drawn from it, and the exact posterior."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from mint.builtin import check
from mint.builtin.face_terms import photo_findings
from mint.builtin.notes import STYLES, Subject, write_note
from mint.builtin.rare_disease import (
    classes,
    draw_cases,
    draw_patients,
    population,
    recall,
)
from mint.builtin.syndromes import diseases, labels, wordings
from mint.builtin.tables import read_table
from mint.errors import RecordError

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("MINT_REAL", ROOT.parent / "shared" / "real"))


@pytest.fixture(scope="module")
def patients():
    return list(draw_patients(900, 11, "test"))


def test_the_table_has_enough_diseases_with_enough_findings_of_both_kinds():
    assert len(diseases()) >= 48
    assert (
        len({disease.id for disease in diseases()}) == len({disease.name for disease in diseases()}) == len(diseases())
    )
    for disease in diseases():
        assert not list(check._faults_of_one(disease))
        assert disease.told_apart in ("face", "note", "both")


@pytest.mark.skipif(not REAL.is_dir(), reason="no real data here")
def test_the_tables_agree_with_the_ontology():
    assert list(check.faults(REAL)) == []


@pytest.mark.skipif(not REAL.is_dir(), reason="no real data here")
def test_the_check_sees_a_wrong_label_a_wrong_disease_and_a_far_frequency(monkeypatch):
    ontology = check.read_ontology(REAL)
    first = diseases()[0]
    term = next(term for term in first.findings if ontology.annotations.get((first.id, term)) is not None)
    wrong = check.Ontology(
        ontology.labels | {term: {"Something else"}},
        ontology.diseases | {first.id: {"Another name"}},
        ontology.annotations | {(first.id, term): 0.02},
    )
    monkeypatch.setattr(check, "read_ontology", lambda _: wrong)
    lines = "\n".join(check.faults(REAL))
    assert "wanted Something else" in lines
    assert f"{first.id} {first.name!r} is not among the annotated diseases" in lines
    assert "the annotation has 0.02" in lines


def test_a_wording_belongs_to_one_finding_only():
    seen: dict[str, str] = {}
    for term, words in wordings().items():
        for word in (*words, labels()[term]):
            assert word == word.strip()
            assert seen.setdefault(word.lower(), term) == term, word


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tb\nx\n", r"table.tsv:2: 1 cells, wanted 2"),
        ("# only a comment\n", r"table.tsv: no header"),
        ("a\tc\n", r"table.tsv:1: columns a, c; wanted a, b"),
    ],
)
def test_a_broken_table_is_refused_by_file_and_line(tmp_path, text, message):
    (tmp_path / "table.tsv").write_text(text)
    with pytest.raises(RecordError, match=message):
        read_table(tmp_path / "table.tsv", ("a", "b"))


def test_a_table_that_is_missing_or_no_text_is_refused(tmp_path):
    with pytest.raises(RecordError, match="cannot be read"):
        read_table(tmp_path / "none.tsv", ("a",))
    (tmp_path / "bytes.tsv").write_bytes(b"a\n\xff\n")
    with pytest.raises(RecordError, match="not UTF-8 text"):
        read_table(tmp_path / "bytes.tsv", ("a",))


def test_patients_repeat_and_do_not_depend_on_how_many_are_drawn():
    few, more = list(draw_cases(5, 3, "train")), list(draw_cases(9, 3, "train"))
    assert few == more[:5]
    assert few[0] != next(draw_cases(1, 4, "train"))
    assert few[0].note != next(draw_cases(1, 3, "test")).note


def test_a_record_is_complete_and_its_photo_is_drawn_on_demand():
    for record in draw_cases(20, 0, "validation"):
        assert record.label in classes()
        assert record.split == "validation"
        assert record.note
        assert record.sex in ("female", "male")
        assert set(record.image.terms) <= set(record.terms)
        assert not set(record.terms) & set(record.excluded)
    picture = pickle.loads(pickle.dumps(record.image)).draw()
    assert picture.tobytes() == record.image.draw().tobytes()


def test_the_id_of_a_record_recalls_the_patient():
    for patient in draw_patients(10, 7, "test"):
        assert recall(patient.id) == patient
    with pytest.raises(RecordError, match="patient-7: not a case of the built-in task"):
        recall("patient-7")


def test_note_and_photo_depend_on_the_findings_and_the_person_never_on_the_disease(patients):
    """The same findings under another disease: not a letter of the note and not a byte of the photo changes."""
    for patient in patients[:40]:
        record, other = patient.record(), replace(patient, disease=(patient.disease + 17) % len(classes())).record()
        assert record.label != other.label
        assert replace(record, label=None) == replace(other, label=None)
    assert record.image.draw().tobytes() == other.image.draw().tobytes()


def test_person_and_style_are_independent_of_the_disease():
    """Chi-square of sex, ethnicity, age and style against the disease group stays near its degrees of freedom."""
    drawn = list(draw_patients(4000, 2, "train"))
    group = [diseases()[patient.disease].group for patient in drawn]
    style = [int(np.random.default_rng([patient.seed, 5]).random() * len(STYLES)) for patient in drawn]
    people = [patient.subject for patient in drawn]
    old = [person.months > 48 for person in people]
    for nuisance in ([p.sex for p in people], [p.ethnicity for p in people], old, style):
        table = _counts(group, nuisance)
        expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0, keepdims=True) / table.sum()
        freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
        assert ((table - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)


def _counts(one, other):
    a, b = np.unique(one, return_inverse=True)[1], np.unique(other, return_inverse=True)[1]
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    return table


def test_a_note_says_what_it_should_and_keeps_the_rest_of_the_face_to_the_photo(patients):
    for patient in patients[:150]:
        found, note = patient.findings, patient.record().note
        lower = note.lower()
        for term in found.stated | found.mentioned | found.denied:
            assert any(_plain(word) in _plain(lower) for word in (*wordings()[term], labels()[term].lower())), (
                term,
                note,
            )
        for term in found.shown - found.mentioned:
            told = found.stated | found.mentioned | found.denied
            if not any(labels()[term].lower() in word.lower() for t in told for word in (*wordings()[t], labels()[t])):
                assert labels()[term].lower() not in lower


def _plain(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", ",.()"))


def test_the_styles_differ_and_all_are_used():
    subject = Subject("female", 42, "European")
    terms = ["HP:0001250", "HP:0001252", "HP:0004322"]
    notes = {write_note(subject, terms, ["HP:0000365"], np.random.default_rng(seed)) for seed in range(60)}
    assert len(notes) > 50
    assert any(note.startswith("Sex female Age 3 years 6 months Ethnicity European") for note in notes)
    assert any("There is no" in note for note in notes)
    assert any(note.startswith("3 y 6 mo F") for note in notes)


@pytest.mark.parametrize("present", [[], ["HP:0001250"]])
def test_a_note_with_little_to_say_is_still_a_note(present):
    for seed in range(20):
        for months in (0, 1, 12, 300):
            note = write_note(Subject("male", months, "African"), present, [], np.random.default_rng(seed))
            assert "African" in note
            assert "  " not in note


def test_findings_come_as_often_as_the_table_says(patients):
    """Given the disease, a finding of the body is stated with its frequency times the share that notes state."""
    model, rng = population(), np.random.default_rng(0)
    drawn = [model.draw(4, rng) for _ in range(1500)]
    disease = diseases()[4]
    for term, frequency in disease.findings.items():
        if term in photo_findings():
            seen, wanted = np.mean([term in f.shown for f in drawn]), frequency
            assert abs(seen - wanted) < 0.07
            assert abs(np.mean([term in f.mentioned for f in drawn]) - 0.1 * seen) < 0.03
        else:
            assert abs(np.mean([term in f.stated for f in drawn]) - model.rates.stated * frequency) < 0.05
    assert 0.5 < np.mean([len(patient.findings.denied) for patient in patients]) < 4


def test_nothing_that_clashes_is_seen_together(patients):
    for patient in patients:
        for one, other in combinations(patient.findings.shown, 2):
            assert other not in photo_findings()[one].against
