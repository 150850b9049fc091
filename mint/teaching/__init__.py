"""Cases to a teacher: trains the fusion encoder as GestaltMML is trained (the paper's first half).

The loss is binary cross-entropy over all classes, times their number, or cross-entropy. `out` becomes the teacher's
folder in the official layout, with run.json, metrics.jsonl and the state to resume from beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..devices import pick_device
from ..encoders.encoder import with_pictures
from ..encoders.teachers import choose_classes, new_encoder, open_base
from ..errors import ConfigError, RecordError
from ..files import locked, refuse_to_replace
from ..images import open_image
from ..progress import progress
from ..records import split_records
from ..types import Record
from .lessons import RUN, Lessons, TeachSettings
from .targets import labels_of


@dataclass(frozen=True, slots=True)
class Taught:
    """What came of it: the teacher's folder and how well it ranks the held-out cases (None where there are none)."""

    folder: Path
    classes: tuple[str, ...]
    steps: int
    top1: float | None
    top10: float | None


def teach(
    cases: Iterable[Record],
    *,
    out: str | Path,
    base: str | Path | None = None,
    classes: Iterable[str] | None = None,
    validation: Sequence[Record] | None = None,
    network: Mapping[str, Any] | None = None,
    device: str | torch.device = "auto",
    resume: bool = False,
    **settings: Any,
) -> Taught:
    """Train a teacher on `cases` and write it to `out`; `settings` are the fields of TeachSettings.

    `base` is a ViLT checkpoint to start from; without one a network is made from nothing, of the size that `network`
    states in the keys of ViLT's config.json. `validation` cases judge the teacher; without them a share of the cases is
    held out (their own `split` column decides where there is one).
    """
    chosen = TeachSettings(**settings)
    train, judged = _sides(cases, validation, chosen)
    place, folder = pick_device(device), Path(out)
    if base is not None and Path(base).resolve() == folder.resolve():
        raise ConfigError(f"out: {folder} is the base itself; give the new teacher a folder of its own")
    refuse_to_replace(folder, RUN)
    labels = {label for record in train for label in labels_of(record)}
    if base is None:
        names = choose_classes(None, classes, labels, "classes")
        encoder = new_encoder((record.note for record in train), names, network or {}, place, chosen.seed)
    elif network:
        raise ConfigError("network: the base has a size of its own; give one of the two")
    else:
        encoder = open_base(base, classes, labels, place, chosen.seed)
    unknown = sorted({label for record in judged for label in labels_of(record)} - set(encoder.classes))
    if unknown:
        raise ConfigError(f"validation: {unknown[0]!r} is a class of no training case; leave its cases out")
    run = Lessons(folder, encoder, train, judged, chosen, "nothing" if base is None else str(base))
    with locked(folder):
        run.run(resume)
    return Taught(folder, encoder.classes, run.step, run.best.get("top1"), run.best.get("top10"))


def usable(records: Iterable[Record], skipped: list[str]) -> Iterator[Record]:
    """The cases that can be learnt; what is wrong with the others is put in `skipped`. Each picture is opened for it."""
    for record in progress(records, "looking at cases", unit="case"):
        try:
            _check_labelled(record)
            if record.image is not None:
                with_pictures([record], lambda pictures: open_image(pictures[0]))
        except RecordError as fault:
            skipped.append(str(fault))
        else:
            yield record


def _check_labelled(record: Record) -> None:
    if not labels_of(record):
        raise RecordError(f"record {record.id}: no label to learn; give it one, or leave it out")


def _sides(
    cases: Iterable[Record], validation: Sequence[Record] | None, settings: TeachSettings
) -> tuple[list[Record], list[Record]]:
    """Cases to train on and cases to judge by; all have labels."""
    train = list(cases)
    for record in [*train, *(validation or ())]:
        _check_labelled(record)
    if validation is None:
        shares = {"train": 1 - settings.held_out, "validation": settings.held_out, "test": 0.0}
        sides = split_records(train, shares, settings.seed)
        train, validation = _with_rare(sides["train"], sides["validation"])
    if not train:
        raise RecordError("cases: none to train on; give some, or hold fewer out")
    return train, list(validation)


def _with_rare(train: list[Record], judged: list[Record]) -> tuple[list[Record], list[Record]]:
    """Held-out cases of a class that is nowhere else go to the training side, with all of their group, unless their
    own `split` put them where they are: what cannot be learnt cannot be judged."""
    known = {label for record in train for label in labels_of(record)}
    unknown = [record for record in judged if not (record.split or known.issuperset(labels_of(record)))]
    back = {record.group or record.id for record in unknown}
    moved = [record for record in judged if (record.group or record.id) in back]
    return train + moved, [record for record in judged if (record.group or record.id) not in back]
