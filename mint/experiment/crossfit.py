"""A teacher's scores of the very cases that it is trained on, none of which it has seen: cross-fitting by publication.

    training cases   in folds; each fold is scored by a teacher that was trained on the other folds
    judged cases     scored by a teacher that was trained on all training cases

All scores go to one file (`id`, `scores`), which serves as the teacher from there on. The teacher is a fusion encoder
that looks at photo and note, or naive Bayes over all findings of a case, those of the photo among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import pipeline
from ..bayes import NaiveBayes
from ..encoders import load_encoder
from ..errors import ConfigError
from ..images import open_image
from ..jsonlines import read_json_lines, write_json_lines
from ..progress import progress, say
from ..types import Record
from .splits import fold_of

SCORES = "scores.jsonl"
BAYES = "bayes"
"""What stands for naive Bayes where a teacher is named."""

Rows = Iterator[dict[str, Any]]
Trains = Callable[[Sequence[Record], Sequence[Record], Sequence[str], Path], Rows]
"""(cases to learn from, cases to score, classes, folder) -> rows of the file of scores."""


def crossfit(
    learnt: Sequence[Record], judged: Sequence[Record], classes: Sequence[str], folder: Path, folds: int, trains: Trains
) -> Path:
    """The file of scores; what is there of an earlier, stopped run is kept."""
    if folds < 2:
        raise ConfigError(f"--folds {folds}: wanted at least 2, so that no teacher scores a case that it learnt from")
    if (folder / SCORES).is_file():
        return folder / SCORES
    parts = []
    for number in range(folds):
        others = [record for record in learnt if fold_of(record, folds) != number]
        own = [record for record in learnt if fold_of(record, folds) == number]
        say(f"teacher of fold {number + 1} of {folds}: learns from {len(others):,} cases, scores {len(own):,} others")
        parts.append(_scored(others, own, classes, folder / f"fold-{number}", trains))
    say(f"teacher of all: learns from {len(learnt):,} cases, scores the {len(judged):,} that are judged")
    parts.append(_scored(learnt, judged, classes, folder / "all", trains))
    write_json_lines(folder / SCORES, (row for part in parts for _, row in read_json_lines(part)))
    return folder / SCORES


def _scored(
    learnt: Sequence[Record], others: Sequence[Record], classes: Sequence[str], folder: Path, trains: Trains
) -> Path:
    """Train one teacher, and write its scores of the other cases beside it."""
    path = folder / SCORES
    if not path.is_file():
        if not learnt or not others:
            raise ConfigError(
                f"--folds: {len(learnt)} cases to learn from and {len(others)} to score; give fewer folds"
            )
        write_json_lines(path, trains(learnt, others, classes, folder))
    return path


def fusion(device: str = "auto", **teaching: Any) -> Trains:
    """A fusion encoder; `teaching` are choices of `teaching.teach`."""

    def rows(learnt: Sequence[Record], others: Sequence[Record], classes: Sequence[str], folder: Path) -> Rows:
        labels = {record.label for record in learnt}
        known = [name for name in classes if name in labels]
        place = folder / "encoder"
        pipeline.teach(_opened(learnt), out=place, classes=known, validation=(), device=device, **teaching)
        yield from _encoded(others, classes, place, device)

    return rows


def _opened(records: Sequence[Record]) -> list[Record]:
    """The cases with their pictures open, since every epoch looks at each of them."""
    pictures = progress(records, "pictures", len(records), "case")
    return [r if r.image is None else replace(r, image=open_image(r.image)) for r in pictures]


def _encoded(records: Sequence[Record], classes: Sequence[str], folder: Path, device: str) -> Rows:
    """Log-probabilities of all classes."""
    encoder = load_encoder(folder, device=device)
    for batch, scores in encoder.score_batches(records):
        for record, row in zip(batch, torch.log_softmax(scores.double(), dim=1), strict=True):
            yield {"id": record.id, "scores": _of_all(dict(zip(encoder.classes, row.tolist(), strict=True)), classes)}


def bayes(learnt: Sequence[Record], others: Sequence[Record], classes: Sequence[str], _: Path) -> Rows:
    """Naive Bayes over all findings of a case."""
    labels = {record.label for record in learnt}
    known = [name for name in classes if name in labels]
    model = NaiveBayes(((record.terms, record.label or "") for record in learnt), known)
    for record in others:
        found = dict(zip(known, model.log_posterior(record.terms).tolist(), strict=True))
        yield {"id": record.id, "scores": _of_all(found, classes)}


def _of_all(found: Mapping[str, float], classes: Sequence[str]) -> dict[str, float]:
    """Scores of all classes. One that the teacher had no case of gets the mean of the others: it is neither listed nor
    rejected for that."""
    mean = sum(found.values()) / len(found)
    return {name: found.get(name, mean) for name in classes}
