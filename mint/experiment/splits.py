"""Which cases are learnt from and which are judged: by publication, since patients of one paper resemble one another."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from ..errors import RecordError
from ..records import split_records
from ..types import Record

RULE = "mint-real-v1|pub|"
LOW, HIGH = 30, 47
"""Of the 100 places that the rule knows, those of the validation part."""


def publication(record: Record) -> str:
    """The publication of a case, or whatever else its group is; a case without one stands for itself."""
    return record.group or record.id


def place_of(group: str, rule: str = RULE, places: int = 100) -> int:
    """The first 8 hex digits of sha256(rule + group), as a number, modulo `places`."""
    return int(hashlib.sha256((rule + group).encode()).hexdigest()[:8], 16) % places


def in_validation(group: str) -> bool:
    """Whether a publication belongs to the validation part."""
    return LOW <= place_of(group) <= HIGH


def sides(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """(to learn from, to be judged by). Splits that the cases name themselves hold; else the publication decides."""
    if any(record.split for record in records):
        named = split_records(records)
        return named["train"], named["test"] or named["validation"]
    judged = [record for record in records if in_validation(publication(record))]
    return [record for record in records if not in_validation(publication(record))], judged


def closed_set(records: Sequence[Record], least: int) -> tuple[str, ...]:
    """The diseases with at least `least` cases to learn from, by alphabet."""
    counts = Counter(record.label for record in records if record.label is not None)
    found = tuple(sorted(label for label, count in counts.items() if count >= least))
    if len(found) < 2:
        raise RecordError(
            f"cases: {len(found)} diseases have {least} cases to learn from, 2 are wanted; add cases or lower --min-cases"
        )
    return found


def fold_of(record: Record, folds: int) -> int:
    """The fold of a case: that of its publication."""
    return place_of(publication(record), "mint-fold|", folds)
