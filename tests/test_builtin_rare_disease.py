"""The table of rare diseases, the patients drawn from it, and the exact posterior."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from mint.builtin import check
from mint.builtin.face_terms import photo_findings
from mint.builtin.notes import STYLES, Subject, write_note
from mint.builtin.population import Findings, Population, Rates
from mint.builtin.rare_disease import (
    ceiling,
    classes,
    draw_cases,
    draw_patients,
    population,
    posterior,
    recall,
)
from mint.builtin.syndromes import Disease, diseases, labels, wordings
from mint.builtin.tables import read_table
from mint.errors import ConfigError, RecordError

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("MINT_REAL", ROOT.parent / "shared" / "real"))


@pytest.fixture(scope="module")
def patients():
    return list(draw_patients(900, 11, "test"))


# --- the table ---------------------------------------------------------------------------------------------------


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


# --- the patients ------------------------------------------------------------------------------------------------


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


# --- the posterior -----------------------------------------------------------------------------------------------

FACE, BODY = ("f1", "f2", "f3"), ("b1", "b2")
CLASH = frozenset([frozenset(("f1", "f2"))])
RATES = Rates(stated=0.7, denied=0.2, mentioned=0.3, body_background=0.05, face_background=0.08)
TOY = tuple(
    Disease(name, name, "", "both", findings)
    for name, findings in (
        ("A", {"f1": 0.8, "b1": 0.6, "f3": 0.3}),
        ("B", {"f2": 0.7, "b1": 0.5, "b2": 0.9}),
        ("C", {"f1": 0.4, "f2": 0.5, "b2": 0.2}),
    )
)


def _subsets(items):
    return [frozenset(s) for n in range(len(items) + 1) for s in combinations(items, n)]


def _every_patient(rates: Rates):
    """All that can happen to a patient of the toy, with its probability, by the words of the model alone.

    Findings of the face: draw each alone, throw the patient away when two clash, and count what is left.
    """
    for disease in TOY:
        weights = {}
        for shown in _subsets(FACE):
            if {"f1", "f2"} <= shown:
                continue
            chances = [disease.findings.get(t, rates.face_background) for t in FACE]
            weights[shown] = np.prod([p if t in shown else 1 - p for t, p in zip(FACE, chances, strict=True)])
        for shown, weight in weights.items():
            for mentioned in _subsets(sorted(shown)):
                said = rates.mentioned ** len(mentioned) * (1 - rates.mentioned) ** len(shown - mentioned)
                for outcome in product(("stated", "denied", "silent"), repeat=len(BODY)):
                    chance = weight / sum(weights.values()) * said / len(TOY)
                    for term, what in zip(BODY, outcome, strict=True):
                        p = disease.findings.get(term, rates.body_background)
                        one = {"stated": p * rates.stated, "denied": (1 - p) * rates.denied}
                        one["silent"] = p * (1 - rates.stated) + (1 - p) * (1 - rates.denied)
                        chance *= one[what]
                    body = {
                        w: frozenset(t for t, o in zip(BODY, outcome, strict=True) if o == w)
                        for w in ("stated", "denied")
                    }
                    yield disease.name, Findings(shown, mentioned, body["stated"], body["denied"]), chance


def _seen(findings: Findings, note: bool, image: bool):
    """What a modality shows of a patient."""
    return ((findings.stated, findings.denied, findings.mentioned) if note else (), findings.shown if image else ())


def _worst(rates: Rates, note: bool, image: bool) -> float:
    """The largest difference between our posterior and counting, over every observation."""
    model = Population(TOY, FACE, CLASH, RATES)
    joint: dict[object, np.ndarray] = {}
    example = {}
    for name, findings, chance in _every_patient(rates):
        key = _seen(findings, note, image)
        joint.setdefault(key, np.zeros(len(TOY)))["ABC".index(name)] += chance
        example[key] = findings
    assert abs(sum(counts.sum() for counts in joint.values()) - 1) < 1e-12
    return max(
        np.abs(np.exp(model.log_posterior(example[key], note, image)) - counts / counts.sum()).max()
        for key, counts in joint.items()
    )


@pytest.mark.parametrize(("note", "image"), [(True, False), (False, True), (True, True), (False, False)])
def test_the_posterior_is_what_counting_every_possible_patient_gives(note, image):
    assert _worst(RATES, note, image) < 1e-12


@pytest.mark.parametrize(
    ("name", "note", "image"),
    [
        ("stated", True, False),
        ("denied", True, False),
        ("mentioned", True, False),
        ("body_background", True, True),
        ("face_background", False, True),
    ],
)
def test_the_count_notices_every_rate_that_is_wrong(name, note, image):
    assert _worst(replace(RATES, **{name: getattr(RATES, name) * 1.2}), note, image) > 1e-4


@pytest.mark.parametrize("modality", ["note", "image", "both"])
def test_the_posterior_is_calibrated_on_drawn_patients(patients, modality):
    """Of all classes given probability p, a share p is right: in every bin within four standard errors."""
    given = np.exp([posterior(patient, modality) for patient in patients])
    truth = np.zeros_like(given)
    truth[np.arange(len(patients)), [patient.disease for patient in patients]] = 1
    assert np.allclose(given.sum(axis=1), 1)
    for low, high in ((0, 0.02), (0.02, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 0.9), (0.9, 1.01)):
        inside = (given >= low) & (given < high)
        spread = np.sqrt((given[inside] * (1 - given[inside])).sum())
        assert abs(truth[inside].sum() - given[inside].sum()) < 4 * spread + 1


@pytest.mark.parametrize("modality", ["note", "image", "both"])
def test_the_ceiling_is_the_accuracy_of_the_posterior_itself(patients, modality):
    best = ceiling(patients, modality)
    scores = np.array([posterior(patient, modality) for patient in patients])
    places = (scores > scores[np.arange(len(patients)), [p.disease for p in patients]][:, None]).sum(axis=1)
    for k in (1, 10):
        error = np.sqrt(best[k] * (1 - best[k]) / len(patients)) + 1e-3
        assert abs((places < k).mean() - best[k]) < 4 * error
    assert best[1] <= best[10] <= 1


def test_photo_and_note_together_know_more_than_either(patients):
    note, image, both = (ceiling(patients, modality)[1] for modality in ("note", "image", "both"))
    assert note + 0.1 < both
    assert image + 0.05 < both
    assert 0.6 < note < 0.9


def test_groups_said_to_be_told_apart_by_face_or_note_are():
    """Within its group, the better modality names the disease more often by at least 15 of 100."""
    model, rng = population(), np.random.default_rng(1)
    for way, sign in (("face", 1), ("note", -1)):
        groups = {disease.group for disease in diseases() if disease.told_apart == way}
        assert len(groups) >= 2
        for group in groups:
            members = [number for number, disease in enumerate(diseases()) if disease.group == group]
            assert {diseases()[number].told_apart for number in members} == {way}
            sums = np.zeros(2)
            for number in members * (240 // len(members)):
                found = model.draw(number, rng)
                for place, image in enumerate((False, True)):
                    among = np.exp(model.log_posterior(found, not image, image)[members])
                    sums[place] += among.max() / among.sum() / (len(members) * (240 // len(members)))
            assert sign * (sums[1] - sums[0]) > 0.15, (group, sums)


def test_a_record_and_its_patient_have_the_same_posterior():
    for patient in draw_patients(5, 1, "validation"):
        for modality in ("note", "image", "both"):
            assert (posterior(patient.record(), modality) == posterior(patient, modality)).all()


def test_wrong_arguments_are_refused_in_one_line():
    patient = next(draw_patients(1))
    with pytest.raises(ConfigError, match="modality 'photo'; wanted note, image or both"):
        posterior(patient, "photo")
    with pytest.raises(ConfigError, match="split 'dev'"):
        list(draw_cases(1, 0, "dev"))
    with pytest.raises(ConfigError, match="no cases"):
        ceiling([])
