"""Labels as a classifier learns them: targets, losses and class weights; and the rank that it gives the true label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Record


def labels_of(record: Record) -> tuple[str, ...]:
    """All labels of a record; most have one, some none."""
    return record.labels or (() if record.label is None else (record.label,))


def losses(logits: Tensor, targets: Tensor, kind: str) -> Tensor:
    """Loss (B,) of each row of logits (B, C) against targets (B, C).

    `bce` sums over the classes, so its mean over the batch is ViLT's own loss: the mean over (B, C) times C.
    `cross_entropy` shares a row's probability evenly between its labels.
    """
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
    return F.cross_entropy(logits, targets / targets.sum(1, keepdim=True), reduction="none")


def class_weights(records: Sequence[Record], classes: Sequence[str], kind: str) -> list[float]:
    """A weight for each class, 1 on average over the records: `balanced` goes with 1/n, `root` with 1/sqrt(n)."""
    counts = Counter(label for record in records for label in labels_of(record))
    power = {"none": 0.0, "root": 0.5, "balanced": 1.0}[kind]
    raw = [counts[name] ** -power if counts[name] else 0.0 for name in classes]
    mean = sum(weight * counts[name] for weight, name in zip(raw, classes, strict=True)) / sum(counts.values())
    return [weight / mean for weight in raw]


def ranks(scores: Tensor, rows: list[list[int]]) -> Tensor:
    """For each row of scores (n, C), how many classes stand above its best label; of equals the first stands above."""
    found = []
    for values, labels in zip(scores, rows, strict=True):
        order = values.argsort(descending=True, stable=True).tolist()
        found.append(min(order.index(label) for label in labels))
    return torch.tensor(found)
