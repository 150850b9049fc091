"""The table of rare diseases: which findings belong to which disease, how often, and how a note may word them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from ..errors import RecordError
from .face_terms import photo_findings
from .tables import HERE, rows

FINDING_COLUMNS = ("disease_id", "term_id", "label", "frequency", "source")
DISEASE_COLUMNS = ("disease_id", "disease", "group", "told_apart")
SOURCES = ("annotated", "related", "estimate")


@dataclass(frozen=True, slots=True)
class Disease:
    """A disease of the table. `findings` maps HPO ids to frequencies of 0..1, both ends excluded.

    `told_apart` says what tells it from the others of its `group`: `face`, `note` or `both`.
    """

    id: str
    name: str
    group: str
    told_apart: str
    findings: Mapping[str, float]


@cache
def diseases() -> tuple[Disease, ...]:
    """All diseases, in the order of the table."""
    found: dict[str, dict[str, float]] = {}
    for row in rows("findings.tsv", FINDING_COLUMNS):
        of_disease = found.setdefault(row["disease_id"], {})
        if row["term_id"] in of_disease:
            raise RecordError(
                f"{_place('findings', row)}: {row['label']} is given twice for {row['disease_id']}; keep one row"
            )
        of_disease[row["term_id"]] = _frequency(row)
    known = tuple(
        Disease(row["disease_id"], row["disease"], row["group"], row["told_apart"], found.pop(row["disease_id"], {}))
        for row in rows("syndromes.tsv", DISEASE_COLUMNS)
    )
    if found:
        raise RecordError(f"{HERE / 'findings.tsv'}: findings of {', '.join(found)}, which syndromes.tsv does not have")
    return known


@cache
def labels() -> dict[str, str]:
    """HPO id -> HPO label, for every finding of the table and every finding that a face can show."""
    return {term: finding.label for term, finding in photo_findings().items()} | {
        row["term_id"]: row["label"] for row in rows("findings.tsv", FINDING_COLUMNS)
    }


@cache
def wordings() -> dict[str, tuple[str, ...]]:
    """HPO id -> ways to word the finding in running text; the label is always the first."""
    other = {
        row["term_id"]: tuple(row["wordings"].split("|"))
        for row in rows("wordings.tsv", ("term_id", "label", "wordings"))
    }
    return {term: (_running(label), *other.get(term, ())) for term, label in labels().items()}


def _running(label: str) -> str:
    """A label inside a sentence: its first letter small, unless a name or an abbreviation begins it."""
    first = label.split(" ", 1)[0]
    keeps = first in ("Chiari", "Wormian", "Sprengel") or any(letter.isupper() for letter in first[1:])
    return label if keeps else label[0].lower() + label[1:]


def _frequency(row: dict[str, str]) -> float:
    try:
        value = float(row["frequency"])
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise RecordError(
            f"{_place('findings', row)}: frequency {row['frequency']!r}; wanted a number above 0 and below 1"
        )
    if row["source"] not in SOURCES:
        raise RecordError(f"{_place('findings', row)}: source {row['source']!r}; wanted one of {', '.join(SOURCES)}")
    return value


def _place(table: str, row: dict[str, str]) -> str:
    return f"{HERE / table}.tsv:{row['']}"
