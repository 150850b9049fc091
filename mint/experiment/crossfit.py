"""A teacher's scores of the very cases that it is trained on, none of which it has seen: cross-fitting by publication.

    training cases   in folds; each fold is scored by a teacher that was trained on the other folds
    judged cases     scored by a teacher that was trained on all training cases

All scores go to one file (`id`, `scores`), which serves as the teacher from there on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import pipeline
from ..encoders import load_encoder
from ..errors import ConfigError
from ..images import open_image
from ..jsonlines import read_json_lines, write_json_lines
from ..progress import progress, say
from ..types import Record
from .splits import fold_of

SCORES = "scores.jsonl"


def crossfit(
    learnt: Sequence[Record],
    judged: Sequence[Record],
    classes: Sequence[str],
    folder: Path,
    folds: int,
    device: str = "auto",
    **teaching: Any,
) -> Path:
    """The file of scores; what is there of an earlier, stopped run is kept. `teaching` are choices of `teaching.teach`."""
    if folds < 2:
        raise ConfigError(
            f"--folds {folds}: wanted at least 2, so that no teacher scores a case that it was trained on"
        )
    if (folder / SCORES).is_file():
        return folder / SCORES
    learnt, judged = _drawn(learnt), _drawn(judged)
    parts = []
    for number in range(folds):
        others = [record for record in learnt if fold_of(record, folds) != number]
        own = [record for record in learnt if fold_of(record, folds) == number]
        say(f"teacher of fold {number + 1} of {folds}: learns from {len(others):,} cases, scores {len(own):,} others")
        parts.append(_scored(others, own, classes, folder / f"fold-{number}", device, teaching))
    say(f"teacher of all: learns from {len(learnt):,} cases, scores the {len(judged):,} that are judged")
    parts.append(_scored(learnt, judged, classes, folder / "all", device, teaching))
    write_json_lines(folder / SCORES, (row for part in parts for _, row in read_json_lines(part)))
    return folder / SCORES


def _drawn(records: Sequence[Record]) -> list[Record]:
    """The cases with their pictures open, since every epoch looks at each of them."""
    pictures = progress(records, "pictures", len(records), "case")
    return [r if r.image is None else replace(r, image=open_image(r.image)) for r in pictures]


def _scored(
    learnt: Sequence[Record],
    others: Sequence[Record],
    classes: Sequence[str],
    folder: Path,
    device: str,
    teaching: Mapping[str, Any],
) -> Path:
    """Train one teacher, and write its scores of the other cases beside it."""
    path = folder / SCORES
    if not path.is_file():
        labels = {record.label for record in learnt}
        known = [name for name in classes if name in labels]
        pipeline.teach(learnt, out=folder, classes=known, validation=(), device=device, **teaching)
        write_json_lines(path, _rows(others, classes, folder, device))
    return path


def _rows(records: Sequence[Record], classes: Sequence[str], folder: Path, device: str) -> Iterator[dict[str, Any]]:
    """Log-probabilities of all classes. One that the teacher had no case of gets the mean of the others: it is neither
    listed nor rejected for that."""
    encoder = load_encoder(folder, device=device)
    for batch, scores in encoder.score_batches(records):
        for record, row in zip(batch, torch.log_softmax(scores.double(), dim=1), strict=True):
            found = dict(zip(encoder.classes, row.tolist(), strict=True))
            yield {"id": record.id, "scores": {name: found.get(name, float(row.mean())) for name in classes}}
