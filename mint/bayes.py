"""Naive Bayes over what a case has (findings, or words of its note): the yardstick that any student has to pass.

Each item is there or not, independently of the others once the class is known:

    log p(class | items) = log p(class) + sum over items there of log p(item | class)
                                        + sum over the others of log (1 - p(item | class)) + constant

Shares are counts smoothed as by Laplace. An item's share in a class gets one imagined case more, in which the item is as
frequent as among all cases; so a class of few cases says little. Shapes: C classes, I items.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError
from .labels import letters
from .types import Prediction

Floats = NDArray[np.float64]


class NaiveBayes:
    """The counts of some cases, given as (items, class); `log_posterior` and `predict` judge others by them."""

    def __init__(self, cases: Iterable[tuple[Collection[str], str]], classes: Sequence[str]) -> None:
        cases, self.classes = list(cases), tuple(classes)
        if not cases:
            raise ConfigError("naive Bayes: no cases to count; give at least one")
        self.column = {
            name: at for at, name in enumerate(dict.fromkeys(i for items, _ in cases for i in sorted(items)))
        }
        row = {name: at for at, name in enumerate(self.classes)}
        sizes, counts = np.zeros(len(row)), np.zeros((len(row), len(self.column)))  # (C,), (C, I)
        for items, label in cases:
            sizes[row[label]] += 1
            counts[row[label], [self.column[item] for item in set(items)]] += 1
        everywhere = (counts.sum(0) + 1) / (len(cases) + 2)  # (I,)
        shares = (counts + everywhere) / (sizes[:, None] + 1)
        self.there, self.absent = np.log(shares), np.log1p(-shares)
        self.prior = np.log((sizes + 1) / (len(cases) + len(row)))

    def log_posterior(self, items: Collection[str]) -> Floats:
        """log p(class | items), (C,); an item that no counted case had says nothing."""
        known = sorted(self.column[item] for item in set(items) if item in self.column)  # one order, so the same bits
        joint = self.prior + self.absent.sum(1) + (self.there - self.absent)[:, known].sum(1)
        joint -= joint.max()
        found: Floats = joint - np.log(np.exp(joint).sum())
        return found

    def predict(self, case: str, items: Collection[str]) -> Prediction:
        """All classes, the likeliest first."""
        found = self.log_posterior(items)
        order = np.argsort(-found, kind="stable").tolist()
        entries = ((self.classes[at], float(found[at])) for at in order)
        return Prediction(
            case, tuple({"label": name, "logprob": value, "probability": math.exp(value)} for name, value in entries)
        )


def words(note: str) -> frozenset[str]:
    """The bare words of a note: no order, no case, no signs, nothing known of what they mean."""
    return frozenset(letters(note).split())
