"""What an experiment is about: the cases of each seed, those that all systems are judged by, the teacher, what is possible."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..builtin.cases import TEACHER
from ..builtin.portraits import SIMULATED, is_drawn, seen, told, with_drawn_face
from ..builtin.rare_disease import Modality, ceiling, classes, draw_cases, recall
from ..builtin.student import reading_learnt_whole
from ..encoders import Encoder, load_encoder
from ..errors import ConfigError, RecordError
from ..labels import read_labels
from ..progress import progress, say
from ..records import read_records
from ..showcase import SIDE, TEST
from ..types import Record
from .crossfit import BAYES, bayes, crossfit, fusion
from .facts import digest, note_facts
from .splits import closed_set, fold_of, publication, sides

_MODALITIES: Mapping[str, Modality] = {"note alone": "note", "photo and note": "both"}
ANY_BASE = "the shipped base's reading, at any size"
"""What a base decoder would be at that had learnt all that the shipped one has read, however large it is."""
TRAIN = 800
"""Simulated patients that a seed learns from: fewer than in `align`, so that five seeds take minutes."""
TUNING_PARTS = 5
"""Where the cases come from a file, every fifth publication of the training part is what --tune judges by."""

Findings = Callable[[Record], Collection[str]]


@dataclass(frozen=True)
class Task:
    """`learnt(seed, size)` are the cases to learn from; `redrawn` says whether each seed has cases of its own.

    `told` are the findings that the note of a case tells, `all_findings` those of note and photo together.
    """

    name: str
    classes: tuple[str, ...]
    judged: tuple[Record, ...]
    learnt: Callable[[int, int | None], list[Record]]
    teacher: Encoder
    told: Findings
    all_findings: Findings
    redrawn: bool = False
    ceilings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    remark: str = ""
    kind: str = "disease"
    facts: Mapping[str, Any] = field(default_factory=dict)
    for_tuning: Callable[[], Task] | None = None

    @property
    def groups(self) -> list[str]:
        return [publication(record) for record in self.judged]


class Remembering(Encoder):
    """A teacher that is asked once for each case, however many systems learn from its answer."""

    def __init__(self, inner: Encoder) -> None:
        self.inner, self.classes, self.batch_size = inner, inner.classes, inner.batch_size
        self.known: dict[str, Tensor] = {}

    def score_batch(self, records: Sequence[Record]) -> Tensor:
        new = [record for record in records if record.id not in self.known]
        if new:
            self.known |= dict(zip([record.id for record in new], self.inner.score_batch(new), strict=True))
        found = [self.known[record.id] for record in records]
        stacked: Tensor = found[0].new_empty(len(found), len(self.classes))
        for row, scores in enumerate(found):
            stacked[row] = scores
        return stacked


def builtin_task(
    *,
    teacher: str | Path | None = None,
    train: int | None = None,
    test: int | None = None,
    validation: int = 200,
    split: str = "test",
    device: str = "auto",
) -> Task:
    """The simulated patients: every seed draws new ones to learn from, all are judged by the same."""
    encoder = Remembering(load_encoder(teacher or TEACHER, device=device))
    task = _drawn_task(encoder, train or TRAIN, test or TEST, split, validation)
    return replace(task, facts={"teacher": str(teacher or TEACHER)})


def _drawn_task(encoder: Encoder, train: int, test: int, split: str, validation: int) -> Task:
    judged = tuple(draw_cases(test, 0, split, SIDE))
    best = {
        f"best possible, {words}": {f"top_{k}": share for k, share in ceiling(judged, modality, (1, 10)).items()}
        for words, modality in _MODALITIES.items()
    }
    best[ANY_BASE] = {f"top_{k}": share for k, share in reading_learnt_whole(judged).items()}
    return Task(
        name="builtin:rare-disease",
        classes=classes(),
        judged=judged,
        learnt=lambda seed, size: list(draw_cases(size or train, seed, "train", SIDE)),
        teacher=encoder,
        told=_told_in_simulation,
        all_findings=lambda record: {*_told_in_simulation(record), *(f"photo {t}" for t in record.image.terms)},
        redrawn=True,
        ceilings=best,
        remark="Patients, notes and photos are simulated: drawn from a table of published findings, never from a person.",
        for_tuning=lambda: _drawn_task(encoder, train, validation, "validation", validation),
    )


def _told_in_simulation(record: Record) -> set[str]:
    """The findings that the note states, those that it mentions of others, and those that it denies."""
    found = recall(record.id).findings
    return {*found.stated, *found.mentioned, *(f"no {term}" for term in found.denied)}


def file_task(
    path: str | Path,
    *,
    folder: Path,
    teacher: str | Path | None = None,
    labels: str | Path | None = None,
    draw_faces: bool = False,
    photo_terms: Collection[str] = frozenset(),
    min_cases: int = 10,
    min_findings: int | None = None,
    folds: int = 3,
    teacher_base: str | Path | None = None,
    teacher_epochs: int = 10,
    teacher_lr: float = 0.0,
    train: int | None = None,
    device: str = "auto",
) -> Task:
    """Cases of a file, split by publication; without a teacher one is trained here, and only on the training part."""
    names, learnt, judged = file_cases(path, labels, min_cases, draw_faces, photo_terms)
    if draw_faces:
        least = 2 if min_findings is None else min_findings
        judged = [record for record in judged if _has_both(record, photo_terms, least)]
    if not learnt or not judged:
        raise RecordError(
            f"{path}: {len(learnt)} cases to learn from, {len(judged)} to judge by; some of both are wanted"
        )
    remark = _photos_in_words(judged, learnt)
    if teacher in (None, BAYES):
        teaching = {"base": teacher_base, "epochs": teacher_epochs, "lr": teacher_lr, "loss": "cross_entropy"}
        trains = bayes if teacher == BAYES else fusion(device, **teaching)
        what = "naive Bayes over all findings of a case" if teacher == BAYES else "a fusion encoder of photo and note"
        remark += f" The teacher is {what}; no training case was scored by one that had learnt from its publication."
        place = folder / f"teacher-{teacher or 'fusion'}"
        note_facts(place / "facts.json", {"folds": folds, "classes": digest(names), "cases": digest(learnt)} | teaching)
        teacher = crossfit(learnt, judged, names, place, folds, trains)
    task = Task(
        name=str(path),
        classes=names,
        judged=tuple(judged),
        learnt=lambda seed, size: _sample(learnt, size or train, seed),
        teacher=Remembering(load_encoder(teacher, classes=names, device=device)),
        told=lambda record: told(record, photo_terms),
        all_findings=lambda record: record.terms,
        remark=remark,
        facts={"teacher": str(teacher)},
    )
    return replace(task, for_tuning=lambda: _tuning_part(task, learnt))


def file_cases(
    path: str | Path, labels: str | Path | None, min_cases: int, draw_faces: bool, photo_terms: Collection[str]
) -> tuple[tuple[str, ...], list[Record], list[Record]]:
    """The closed set of a file, its cases to learn from, and those of the validation part."""
    learnt, judged = sides([record for record in read_records(path) if record.label is not None])
    names = tuple(read_labels(labels)) if labels else closed_set(learnt, min_cases)
    learnt, judged = (_prepared(part, names, draw_faces, photo_terms) for part in (learnt, judged))
    return names, learnt, judged


def _tuning_part(task: Task, learnt: Sequence[Record]) -> Task:
    """The training part split once more, by publication. A disease of these publications alone cannot be known then, and
    judges nobody."""
    rest = [record for record in learnt if fold_of(record, TUNING_PARTS)]
    known = {record.label for record in rest}
    judged = [record for record in learnt if fold_of(record, TUNING_PARTS) == 0 and record.label in known]
    if not judged or not rest:
        raise ConfigError(f"--tune: the training part has too few publications to split ({len(learnt)} cases)")
    return replace(task, judged=tuple(judged), learnt=lambda seed, size: _sample(rest, size, seed), for_tuning=None)


def _prepared(
    records: Sequence[Record], names: Collection[str], draw_faces: bool, photo_terms: Collection[str]
) -> list[Record]:
    """The cases of the closed set that have a note, with a drawn face if that is asked for."""
    kept = [record for record in records if record.label in names]
    if draw_faces:
        kept = [with_drawn_face(record, photo_terms, SIDE) for record in progress(kept, "faces", len(kept), "case")]
    told = [record for record in kept if record.note.strip()]
    if len(told) < len(kept):
        say(f"{len(kept) - len(told)} cases have no note beside their photo, and are left out")
    return told


def _has_both(record: Record, photo_terms: Collection[str], least: int) -> bool:
    """Whether photo and note have at least so many findings each."""
    shown = len(seen(record, photo_terms))
    return shown >= least and len(record.terms) - shown >= least


def _sample(records: Sequence[Record], size: int | None, seed: int) -> list[Record]:
    """`size` of the cases, drawn by the seed; all of them where no size is given."""
    if size is None or size >= len(records):
        return list(records)
    return random.Random(seed).sample(list(records), size)


def _photos_in_words(judged: Sequence[Record], learnt: Sequence[Record]) -> str:
    """What the photos of the cases are: drawn faces, photos, or none."""
    records = [*learnt, *judged]
    drawn, pictured = sum(map(is_drawn, records)), sum(record.image is not None for record in records)
    if drawn:
        rest = f" {pictured - drawn:,} cases have a photo, {len(records) - pictured:,} have none."
        return f"{SIMULATED} Of {len(records):,} cases {drawn:,} have a drawn face." + rest
    return f"Of {len(records):,} cases {pictured:,} have a photo; no face was drawn."
