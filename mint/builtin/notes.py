"""Clinical notes: the same findings in several styles and several words, none of which depends on the disease."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .syndromes import labels, wordings


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom a note is about; `months` is the age."""

    sex: str
    months: int
    ethnicity: str

    @property
    def age(self) -> str:
        """The age in words: `3 years 6 months`."""
        parts = ((self.months // 12, "year"), (self.months % 12, "month"))
        return " ".join(f"{number} {unit}{'s' if number > 1 else ''}" for number, unit in parts if number) or "newborn"

    @property
    def noun(self) -> str:
        young, grown = {"male": ("boy", "man"), "female": ("girl", "woman")}[self.sex]
        return grown if self.months >= 216 else young

    @property
    def pronoun(self) -> str:
        return {"male": "he", "female": "she"}[self.sex]


Style = Callable[[Subject, list[str], list[str], np.random.Generator], str]


def write_note(subject: Subject, present: Sequence[str], absent: Sequence[str], rng: np.random.Generator) -> str:
    """A note that gives these HPO ids as present and absent, in a style, an order and words drawn from `rng`."""
    style = STYLES[int(rng.random() * len(STYLES))]
    plain = style is _label_string
    return style(subject, _worded(present, plain, rng), _worded(absent, plain, rng), rng)


def _worded(terms: Sequence[str], plain: bool, rng: np.random.Generator) -> list[str]:
    """One wording for each term, in random order."""
    keys = rng.random((len(terms), 2))
    order = np.argsort(keys[:, 0], kind="stable")
    if plain:
        return [labels()[terms[i]] for i in order]
    return [(words := wordings()[terms[i]])[int(keys[i, 1] * len(words))] for i in order]


def _joined(items: Sequence[str], last: str = "and") -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _list(subject: Subject, present: list[str], absent: list[str], _rng: np.random.Generator) -> str:
    lines = [f"Sex: {subject.sex}. Age: {subject.age}. Ethnicity: {subject.ethnicity}."]
    lines.append(f"Findings: {'; '.join(present) if present else 'none noted'}.")
    if absent:
        lines.append(f"Absent: {'; '.join(absent)}.")
    return " ".join(lines)


def _sentences(subject: Subject, present: list[str], absent: list[str], rng: np.random.Generator) -> str:
    opening = ("was seen for", "presented with", "was referred because of")[int(rng.random() * 3)]
    who = (
        f"A {subject.noun} of {subject.age}, {subject.ethnicity},"
        if subject.months
        else f"A newborn {subject.noun}, {subject.ethnicity},"
    )
    half = (len(present) + 1) // 2
    text = [f"{who} {opening} {_joined(present[:half]) if present else 'genetic counselling'}."]
    if present[half:]:
        text.append(f"{_upper(subject.pronoun)} also has {_joined(present[half:])}.")
    if absent:
        text.append(f"There is no {_joined(absent, 'or')}.")
    return " ".join(text)


def _telegram(subject: Subject, present: list[str], absent: list[str], _rng: np.random.Generator) -> str:
    years, months = divmod(subject.months, 12)
    head = f"{years} y {months} mo {subject.sex[0].upper()}, {subject.ethnicity}"
    return ". ".join([head, *(_upper(item) for item in present), *(f"No {item}" for item in absent)]) + "."


def unpunctuated(text: str) -> str:
    return text.translate(str.maketrans("", "", ",.()"))


def _label_string(subject: Subject, present: list[str], absent: list[str], _rng: np.random.Generator) -> str:
    """One string of labels without punctuation, as tables of patients are often exported for a text encoder."""
    words = [
        f"Sex {subject.sex} Age {subject.age} Ethnicity {subject.ethnicity}",
        *present,
        *(f"No {item}" for item in absent),
    ]
    return unpunctuated(" ".join(words))


def _examination(subject: Subject, present: list[str], absent: list[str], rng: np.random.Generator) -> str:
    asked = ("Referral to clinical genetics", "Genetic consultation", "Assessment for a suspected syndrome")[
        int(rng.random() * 3)
    ]
    text = [f"{asked}: {subject.ethnicity} {subject.noun}, {subject.age}."]
    text.append(
        f"History and examination show {_joined(present)}." if present else "History and examination add nothing."
    )
    if absent:
        text.append(f"{_upper(_joined(absent))} {'was' if len(absent) == 1 else 'were'} looked for and not found.")
    return " ".join(text)


STYLES: tuple[Style, ...] = (_list, _sentences, _telegram, _label_string, _examination)
