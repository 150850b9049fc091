"""A case told several times, each time by another part of its findings.

A note seldom says all that is known of a patient, and never twice the same. Who has learnt from parts of a note leans on
no single finding, and on no company of findings that one publication happened to report together.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from ..records.notes import composed
from ..types import Record


def retold(record: Record, findings: Sequence[str], seed: str) -> Record:
    """The case with a part of its note's `findings` in the note: a share drawn at random, one at least.

    A note that somebody wrote cannot be told in parts, and stays as it is.
    """
    if not findings or record.note != composed(record, findings):
        return record
    rng = random.Random(f"{seed}:{record.id}")
    share = rng.random()
    kept = [finding for finding in findings if rng.random() < share] or [rng.choice(findings)]
    return replace(record, note=composed(record, kept))
