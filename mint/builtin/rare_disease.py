"""The built-in rare-disease task: simulated patients with a note and a photo, and the best that any model could do.

`draw_cases` yields records; `posterior` and `ceiling` are exact, because the patients come from a known model
(population.py). A record's id names its draw, so the posterior of any record of this task follows from its id.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal
from zlib import crc32

import numpy as np

from ..errors import ConfigError, RecordError
from ..types import Record
from .face_people import ETHNIC_SKINS
from .face_terms import photo_findings
from .faces import SIZE, Photo
from .notes import Subject, write_note
from .population import Findings, Floats, Population, Rates
from .syndromes import diseases

Modality = Literal["note", "image", "both"]
SPLITS = ("train", "validation", "test")
_ID = re.compile(r"rare-(train|validation|test)-(\d{1,18})-(\d{1,18})")


@cache
def population() -> Population:
    """The patients of the whole table."""
    clashes = frozenset(
        frozenset((term, other)) for term, finding in photo_findings().items() for other in finding.against
    )
    return Population(diseases(), tuple(photo_findings()), clashes, Rates())


def classes() -> tuple[str, ...]:
    """The names of the diseases, in the order of every posterior."""
    return population().names


@dataclass(frozen=True, slots=True)
class Patient:
    """One draw of the model: the disease (its place among the classes), the findings, and the person."""

    id: str
    split: str
    disease: int
    findings: Findings
    subject: Subject
    seed: int

    def record(self, size: int = SIZE) -> Record:
        """The patient as a case: `terms` are all findings that note or photo show, `excluded` what the note denies."""
        shown, found = self.findings.shown, self.findings
        told, absent = sorted(found.stated | found.mentioned), sorted(found.denied)
        return Record(
            id=self.id,
            note=write_note(self.subject, told, absent, np.random.default_rng([self.seed, 5])),
            image=Photo(
                tuple(sorted(shown)),
                self.subject.sex,
                self.subject.months / 12,
                self.subject.ethnicity,
                self.seed,
                size,
            ),
            label=classes()[self.disease],
            terms=tuple(sorted(found.stated | shown)),
            excluded=tuple(absent),
            sex=self.subject.sex,
            age=self.subject.age,
            ethnicity=self.subject.ethnicity,
            split=self.split,
        )


def draw_patient(index: int, seed: int = 0, split: str = "train") -> Patient:
    """The patient of this number; no patient depends on another."""
    if split not in SPLITS:
        raise ConfigError(f"split {split!r}; wanted one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, crc32(split.encode()), index])
    a, b, c, d, e = rng.random(5)
    ethnicities = tuple(ETHNIC_SKINS)
    subject = Subject(("female", "male")[int(2 * a)], int(12 * 0.5 * 70**b), ethnicities[int(c * len(ethnicities))])
    disease = int(d * len(population().names))
    return Patient(
        f"rare-{split}-{seed}-{index}", split, disease, population().draw(disease, rng), subject, int(e * 2**32)
    )


def draw_patients(n: int, seed: int = 0, split: str = "train") -> Iterator[Patient]:
    """The first n patients of a seed and split; splits are drawn independently of one another."""
    return (draw_patient(index, seed, split) for index in range(n))


def draw_cases(n: int, seed: int = 0, split: str = "train", size: int = SIZE) -> Iterator[Record]:
    """The same patients as records, whose image is a `Photo` that is drawn on demand, `size` pixels square."""
    return (patient.record(size) for patient in draw_patients(n, seed, split))


def recall(id: str) -> Patient:  # noqa: A002 - the word that Record uses
    """The patient behind the id of a record of this task."""
    match = _ID.fullmatch(id)
    if not match:
        raise RecordError(
            f"{id}: not a case of the built-in task, so its posterior is not known; ids look like rare-test-0-17"
        )
    return draw_patient(int(match[3]), int(match[2]), match[1])


def posterior(case: Patient | Record, modality: Modality = "both") -> Floats:
    """log p(disease | the findings that the modality shows), natural logarithm, (C,) in the order of `classes()`."""
    if modality not in ("note", "image", "both"):
        raise ConfigError(f"modality {modality!r}; wanted note, image or both")
    patient = recall(case.id) if isinstance(case, Record) else case
    return population().log_posterior(patient.findings, note=modality != "image", image=modality != "note")


def ceiling(
    cases: Iterable[Patient | Record], modality: Modality = "both", ks: tuple[int, ...] = (1, 10)
) -> dict[int, float]:
    """k -> the best top-k accuracy to be expected on these cases: the mean sum of the k largest probabilities."""
    sums, n = dict.fromkeys(ks, 0.0), 0
    for case in cases:
        best = np.sort(np.exp(posterior(case, modality)))[::-1]
        sums = {k: sums[k] + float(best[:k].sum()) for k in ks}
        n += 1
    if not n:
        raise ConfigError("no cases to work out a ceiling from; give at least one")
    return {k: min(1.0, total / n) for k, total in sums.items()}
