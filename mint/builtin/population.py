"""The generative model of patients, with its exact Bayes rule.

A disease c is drawn from a uniform prior. Then, independently given c:

- every finding has its frequency in c, or a small background rate where the table gives none;
- findings of the face that cannot be seen together form blocks; a block takes one of its possible sets with probability
  proportional to the product of the odds of its members (independent findings, given that no two of them clash);
- the photo shows all findings of the face;
- the note states a present finding of the rest of the body with probability `stated`, denies an absent one with
  probability `denied`, and mentions a finding of the face with probability `mentioned`.

All else (sex, age, ethnicity, style and words of the note, the look of the picture) does not depend on c. So the
posterior given what a modality shows is a sum of table entries.   C classes, F findings of the body, S sets of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .syndromes import Disease

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rates:
    """The shares of the model that the table does not give."""

    stated: float = 0.40
    denied: float = 0.010
    mentioned: float = 0.10
    body_background: float = 0.008
    face_background: float = 0.012


@dataclass(frozen=True, slots=True)
class Findings:
    """What is known of one patient, as HPO ids. `mentioned` are those of `shown` that the note gives away."""

    shown: frozenset[str]  # in the photo
    mentioned: frozenset[str]
    stated: frozenset[str]
    denied: frozenset[str]


class Block:
    """Findings of the face that hang together through clashes, and all their sets without a clash."""

    def __init__(self, terms: Sequence[str], clashes: frozenset[frozenset[str]], frequency: Floats) -> None:
        """`frequency` (C, len(terms))."""
        self.terms = tuple(terms)
        chosen = [set_ for n in range(len(terms) + 1) for set_ in combinations(self.terms, n)]
        self.sets = [frozenset(s) for s in chosen if not any(frozenset(pair) in clashes for pair in combinations(s, 2))]
        member = np.array([[term in s for term in self.terms] for s in self.sets], dtype=np.float64)  # (S, terms)
        weight = np.exp(np.log(frequency / (1 - frequency)) @ member.T)
        self.probability = weight / weight.sum(axis=1, keepdims=True)  # (C, S)
        self.place = {s: number for number, s in enumerate(self.sets)}


class Population:
    """Patients of these diseases. `clashes` are pairs of face findings that are never seen together."""

    def __init__(
        self, diseases: Sequence[Disease], face: Sequence[str], clashes: frozenset[frozenset[str]], rates: Rates
    ) -> None:
        self.names, self.rates = tuple(disease.name for disease in diseases), rates
        self.body = tuple(sorted({term for disease in diseases for term in disease.findings} - set(face)))
        present = _frequencies(diseases, self.body, rates.body_background)  # (C, F)
        self.present = present
        self.log_stated = np.log(rates.stated * present)
        self.log_denied = np.log(rates.denied * (1 - present))
        self.log_silent = np.log1p(-rates.stated * present - rates.denied * (1 - present))
        self.column = {term: number for number, term in enumerate(self.body)}
        self.blocks = [
            Block(terms, clashes, _frequencies(diseases, terms, rates.face_background))
            for terms in _hanging_together(face, clashes)
        ]

    def draw(self, disease: int, rng: np.random.Generator) -> Findings:
        """The findings of one patient with this disease."""
        shown: set[str] = set()
        for block in self.blocks:
            shown |= block.sets[_choose(block.probability[disease], rng.random())]
        has, told = rng.random((2, len(self.body)))
        present = has < self.present[disease]
        stated = present & (told < self.rates.stated)
        denied = ~present & (told < self.rates.denied)
        order = sorted(shown)
        mentioned = frozenset(
            term for term, chance in zip(order, rng.random(len(order)), strict=True) if chance < self.rates.mentioned
        )
        return Findings(frozenset(shown), mentioned, self._named(stated), self._named(denied))

    def _named(self, which: NDArray[np.bool_]) -> frozenset[str]:
        return frozenset(self.body[number] for number in np.flatnonzero(which))

    def log_posterior(self, findings: Findings, note: bool, image: bool) -> Floats:
        """log p(class | what the modalities show), (C,), natural logarithm; with neither, the prior."""
        score = np.zeros(len(self.names))
        if note:
            score += self._log_body(findings)
        if image:
            score += self._log_face(
                findings.shown
            )  # the mentions add nothing: they depend on the class through the face alone
        elif note:
            score += self._log_mentions(findings.mentioned)
        score -= score.max()
        posterior: Floats = score - np.log(np.exp(score).sum())
        return posterior

    def _log_body(self, findings: Findings) -> Floats:
        score: Floats = self.log_silent.sum(axis=1)
        for terms, table in ((findings.stated, self.log_stated), (findings.denied, self.log_denied)):
            columns = [self.column[term] for term in sorted(terms)]
            score = score + (table[:, columns] - self.log_silent[:, columns]).sum(axis=1)
        return score

    def _log_face(self, shown: frozenset[str]) -> Floats:
        terms = [np.log(block.probability[:, block.place[shown.intersection(block.terms)]]) for block in self.blocks]
        return np.sum(terms, axis=0)  # type: ignore[no-any-return]

    def _log_mentions(self, mentioned: frozenset[str]) -> Floats:
        """Each block summed over its sets: those that hold what is mentioned, the rest of them left out of the note."""
        m, score = self.rates.mentioned, np.zeros(len(self.names))
        for block in self.blocks:
            named = mentioned.intersection(block.terms)
            chance = np.array([m ** len(named) * (1 - m) ** len(s - named) if named <= s else 0.0 for s in block.sets])
            score += np.log(block.probability @ chance)
        return score


def _frequencies(diseases: Sequence[Disease], terms: Sequence[str], background: float) -> Floats:
    """How often each disease has each finding: (C, len(terms))."""
    return np.array([[disease.findings.get(term, background) for term in terms] for disease in diseases])


def _hanging_together(terms: Sequence[str], clashes: frozenset[frozenset[str]]) -> list[tuple[str, ...]]:
    """The connected components of the graph of clashes, in the order of `terms`."""
    component = {term: {term} for term in terms}
    for one, other in (tuple(sorted(pair)) for pair in clashes):
        if component[one] is not component[other]:
            component[one] |= component[other]
            for term in component[other]:
                component[term] = component[one]
    seen: set[str] = set()
    blocks = []
    for term in terms:
        if term not in seen:
            seen |= component[term]
            blocks.append(tuple(t for t in terms if t in component[term]))
    return blocks


def _choose(probability: Floats, chance: float) -> int:
    """The place of `chance` in the running sum of the probabilities."""
    return min(int(np.searchsorted(np.cumsum(probability), chance, side="right")), len(probability) - 1)
