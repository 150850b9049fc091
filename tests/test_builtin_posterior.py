"""The posterior of a simulated patient is exact: it equals counting, it is calibrated, and its ceiling is reached."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from mint.builtin.population import Findings, Population, Rates
from mint.builtin.rare_disease import ceiling, draw_cases, draw_patients, population, posterior
from mint.builtin.syndromes import Disease, diseases
from mint.errors import ConfigError


@pytest.fixture(scope="module")
def patients():
    return list(draw_patients(900, 11, "test"))


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
