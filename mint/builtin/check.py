"""Checks the tables of facts against the Human Phenotype Ontology: `python -m mint.builtin.check FOLDER`.

FOLDER holds `hpo_terms.tsv` (the terms) and `disease_terms.tsv` (the annotations of diseases). Every fault is one line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from ..errors import MintError
from .face_terms import nearest, photo_findings
from .syndromes import FINDING_COLUMNS, Disease, diseases
from .tables import read_table, rows

TERM_COLUMNS = ("id", "label", "is_face", "is_head", "is_photo", "in_release")
ANNOTATION_COLUMNS = ("disease_id", "disease_label", "term_id", "term_label", "frequency", "freq")
TOLERANCE = 0.3
LEAST_DISEASES, LEAST_FINDINGS = 48, 5


@dataclass(frozen=True, slots=True)
class Ontology:
    """What the folder says: labels of terms and diseases, and the annotated frequency (None where it gives none)."""

    labels: dict[str, set[str]]
    diseases: dict[str, set[str]]
    annotations: dict[tuple[str, str], float | None]


def read_ontology(folder: Path) -> Ontology:
    labels: dict[str, set[str]] = {}
    names: dict[str, set[str]] = {}
    annotations: dict[tuple[str, str], float | None] = {}
    for row in read_table(folder / "hpo_terms.tsv", TERM_COLUMNS):
        labels.setdefault(row["id"], set()).add(row["label"])
    for row in read_table(folder / "disease_terms.tsv", ANNOTATION_COLUMNS):
        labels.setdefault(row["term_id"], set()).add(row["term_label"])
        names.setdefault(row["disease_id"], set()).add(row["disease_label"])
        pair = row["disease_id"], row["term_id"]
        given = float(row["freq"]) if row["freq"] else None
        known = annotations.get(pair)
        annotations[pair] = given if known is None else known if given is None else max(known, given)
    return Ontology(labels, names, annotations)


def faults(folder: Path) -> Iterator[str]:
    """What is wrong with our tables, one line each."""
    ontology = read_ontology(folder)
    yield from _faults_of_terms(ontology)
    yield from _faults_of_diseases(ontology)
    yield from _faults_of_frequencies(ontology)


def _faults_of_terms(ontology: Ontology) -> Iterator[str]:
    tables = {
        "findings.tsv": FINDING_COLUMNS,
        "wordings.tsv": ("term_id", "label", "wordings"),
        "face_terms.tsv": ("term_id", "label", "finding", "against"),
        "face_related.tsv": ("term_id", "label", "finding"),
    }
    for name, columns in tables.items():
        for row in rows(name, columns):
            known = ontology.labels.get(row["term_id"])
            if known is None:
                yield f"{name}:{row['']}: {row['term_id']} is no term of the ontology"
            elif row["label"] not in known:
                wanted = " or ".join(sorted(known))
                yield f"{name}:{row['']}: {row['term_id']} is called {row['label']!r}; wanted {wanted}"


def _faults_of_diseases(ontology: Ontology) -> Iterator[str]:
    if len(diseases()) < LEAST_DISEASES:
        yield f"syndromes.tsv: {len(diseases())} diseases, wanted at least {LEAST_DISEASES}"
    for disease in diseases():
        if disease.name not in ontology.diseases.get(disease.id, ()):
            yield f"syndromes.tsv: {disease.id} {disease.name!r} is not among the annotated diseases"
        yield from _faults_of_one(disease)


def _faults_of_one(disease: Disease) -> Iterator[str]:
    face = [term for term in disease.findings if term in photo_findings()]
    for number, where in ((len(face), "a photo shows"), (len(disease.findings) - len(face), "a photo does not show")):
        if number < LEAST_FINDINGS:
            yield f"findings.tsv: {disease.name} has {number} findings that {where}, wanted at least {LEAST_FINDINGS}"
    for one, other in combinations(face, 2):
        if other in photo_findings()[one].against:
            yield f"findings.tsv: {disease.name} has {one} and {other}, which cannot be seen together"


def _faults_of_frequencies(ontology: Ontology) -> Iterator[str]:
    alike = {(disease, nearest(term)) for disease, term in ontology.annotations}
    for row in rows("findings.tsv", FINDING_COLUMNS):
        pair = row["disease_id"], row["term_id"]
        source = "annotated" if pair in ontology.annotations else "related" if pair in alike else "estimate"
        if row["source"] != source:
            yield f"findings.tsv:{row['']}: the source of {row['label']} is {row['source']}, wanted {source}"
        given = ontology.annotations.get(pair)
        if given is not None and abs(float(row["frequency"]) - min(0.95, max(0.05, given))) > TOLERANCE + 1e-9:
            yield f"findings.tsv:{row['']}: {row['label']} has {row['frequency']}, the annotation has {given:.2f}"


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m mint.builtin.check FOLDER", file=sys.stderr)
        return 2
    try:
        found = list(faults(Path(sys.argv[1])))
    except MintError as error:
        print(error, file=sys.stderr)
        return 2
    for fault in found:
        print(fault)
    print(f"{len(diseases())} diseases, {len(rows('findings.tsv', FINDING_COLUMNS))} findings, {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
