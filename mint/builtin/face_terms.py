"""Which HPO terms a drawn face shows, and as which drawing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from .tables import rows


@dataclass(frozen=True, slots=True)
class PhotoFinding:
    """A finding with a drawing of its own. `against` are the HPO ids that cannot be seen together with it."""

    label: str
    drawing: str
    against: frozenset[str]


@cache
def photo_findings() -> dict[str, PhotoFinding]:
    """HPO id -> finding, for all that have a drawing of their own, in the order of the table."""
    table = rows("face_terms.tsv", ("term_id", "label", "finding", "against"))
    ids = {row["finding"]: row["term_id"] for row in table}
    return {
        row["term_id"]: PhotoFinding(
            row["label"], row["finding"], frozenset(ids[name] for name in row["against"].split(",") if name)
        )
        for row in table
    }


@cache
def _drawn_as() -> dict[str, str]:
    """HPO id -> HPO id of the finding that it is drawn as, for the terms of both tables."""
    ids = {finding.drawing: term for term, finding in photo_findings().items()}
    related = {row["term_id"]: ids[row["finding"]] for row in rows("face_related.tsv", ("term_id", "label", "finding"))}
    return related | {term: term for term in photo_findings()}


@cache
def drawable_labels() -> dict[str, str]:
    """Label, in small letters -> HPO id, for the terms of both tables: how cases that name findings are drawn."""
    related = rows("face_related.tsv", ("term_id", "label", "finding"))
    named = [*rows("face_terms.tsv", ("term_id", "label", "finding", "against")), *related]
    return {row["label"].lower(): row["term_id"] for row in named}


def nearest(term: str) -> str | None:
    """The HPO id of the drawing that shows this term, if one does."""
    return _drawn_as().get(term)


def drawn_findings(terms: Iterable[str]) -> frozenset[str]:
    """The drawings for any HPO terms. Of two that cannot be seen together, the earlier in the table is drawn."""
    wanted = {shown for term in terms if (shown := nearest(term))}
    kept: set[str] = set()
    for term, finding in photo_findings().items():
        if term in wanted and not finding.against & kept:
            kept.add(term)
    return frozenset(photo_findings()[term].drawing for term in kept)
