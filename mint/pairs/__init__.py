"""Ranking -> PreferencePair: the teacher's first classes are the chosen answer, its last ones the rejected answer."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

from ..answers import answer_text, heading
from ..errors import ConfigError, RecordError
from ..prompts import prompt_messages
from ..types import PreferencePair, Ranking, Record

PAPER_SIZES = {"disease": (10, 15), "tissue": (5, 5)}
"""k and q of the paper: how many classes the chosen and the rejected answer list."""

NEGATIVES = ("bottom", "near", "random")
"""Where rejected classes come from: the end of the ranking (the paper), just below the chosen, or anywhere below."""


def prefer_pairs(
    rankings: Iterable[Ranking],
    records: Iterable[Record],
    *,
    modality: str = "note",
    kind: str = "disease",
    chosen_k: int | None = None,
    rejected_q: int | None = None,
    rejected: str = "bottom",
    label_first: bool = False,
    label_within: int | None = None,
    template: str | None = None,
    seed: int = 0,
) -> Iterator[PreferencePair]:
    """One pair per case, from its ranking and its record, which come in the same order.

    chosen = the teacher's first k classes in order; rejected = q of the others, by default its last q, in its order.
    `label_first` puts the known label before them. `label_within=n` leaves out the cases whose known label is not among
    the teacher's first n (1: those that the teacher gets wrong). `modality` is what the student will see.
    """
    k, q = _sizes(kind, chosen_k, rejected_q)
    if rejected not in NEGATIVES:
        raise ConfigError(f"rejected {rejected!r}: one of {', '.join(NEGATIVES)} is wanted")
    if label_within is not None and label_within < 1:
        raise ConfigError(f"label_within {label_within}: a number from 1 is wanted")
    for ranking, record in _side_by_side(rankings, records):
        known = _known(record)
        if label_within is not None and not known & set(ranking.labels[:label_within]):
            continue
        labels = _label_first(ranking, record) if label_first else ranking.labels
        if k + q > len(labels):
            raise ConfigError(
                f"case {record.id!r}: {k} chosen and {q} rejected of {len(labels)} classes would overlap; "
                f"give --chosen-k and --rejected-q that add up to at most {len(labels)}"
            )
        yield PreferencePair(
            id=record.id,
            prompt=prompt_messages(record, modality, kind=kind, k=k, template=template, labels=ranking.labels),
            chosen=[{"role": "assistant", "content": answer_text(labels[:k], kind)}],
            rejected=[
                {"role": "assistant", "content": answer_text(_rejected(labels, k, q, rejected, record.id, seed), kind)}
            ],
            image=None if modality == "note" else record.image,
        )


def _sizes(kind: str, chosen_k: int | None, rejected_q: int | None) -> tuple[int, int]:
    heading(kind)  # refuses a kind that is unknown
    k, q = (
        given if given is not None else paper
        for given, paper in zip((chosen_k, rejected_q), PAPER_SIZES[kind], strict=True)
    )
    if k < 1 or q < 1:
        raise ConfigError(f"chosen_k {k}, rejected_q {q}: each must be at least 1")
    return k, q


def _side_by_side(rankings: Iterable[Ranking], records: Iterable[Record]) -> Iterator[tuple[Ranking, Record]]:
    for ranking, record in zip_longest(rankings, records):
        if ranking is None or record is None or ranking.id != record.id:
            found = [repr(side.id) if side is not None else "none" for side in (ranking, record)]
            raise RecordError(
                f"the ranking of case {found[0]} meets the record {found[1]}; both must come in the same order"
            )
        yield ranking, record


def _known(record: Record) -> set[str]:
    return {*record.labels, *([record.label] if record.label is not None else [])}


def _label_first(ranking: Ranking, record: Record) -> tuple[str, ...]:
    """The ranking with the known label moved to its head; as it is where no label is known."""
    label = record.label if record.label is not None else next(iter(record.labels), None)
    if label is None:
        return ranking.labels
    if label not in ranking.labels:
        raise RecordError(
            f"case {record.id!r}: its label {label!r} is none of the teacher's {len(ranking.labels)} classes; "
            "correct the label, or teach with a teacher that has it"
        )
    return (label, *(other for other in ranking.labels if other != label))


def _rejected(labels: Sequence[str], k: int, q: int, where: str, case: str, seed: int) -> Sequence[str]:
    """q classes below the chosen k. A random choice depends on the seed and the case alone, not on the other cases."""
    if where == "bottom":
        return labels[-q:]
    if where == "near":
        return labels[k : k + q]
    return random.Random(f"{seed}:{case}").sample(labels[k:], q)


def check_label(record: Record, classes: Sequence[str]) -> None:
    """Refuse a case whose label the teacher cannot name: what it would teach of that case is wrong."""
    if record.label is not None and record.label not in classes:
        raise RecordError(
            f"case {record.id!r}: its label {record.label!r} is none of the teacher's {len(classes)} classes; "
            f"correct the label, teach with a teacher that has it, or leave such cases out with --skip-bad"
        )
