"""The note of a case that has none: its sex, age, ethnicity and findings in words, in the order of GestaltMML's texts.

    Sex male Age 3 years 6 months Ethnicity European Long palpebral fissure Growth delay

`compose_note` writes such a text, `demographics` reads its first part back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from ..types import Record


def compose_note(record: Record, *, excluded: bool = False, published: bool = False) -> str:
    """The note of a record's sex, age, ethnicity and terms; what is not known is left out.

    Findings looked for and absent are left out too: GestaltMML's texts have none, and ViLT reads 40 tokens. With
    `excluded` they follow as 'No Ptosis'. With `published` the text is letter for letter as the released GestaltMML
    checkpoint was trained on: years and months both, no `,.()`, and every 'and' cut out, even inside words.
    """
    parts = [("Sex", record.sex), ("Age", age_in_words(record.age, published)), ("Ethnicity", record.ethnicity)]
    words = [f"{name} {value}" for name, value in parts if value]
    words += record.terms
    if excluded:
        words += [f"No {term}" for term in record.excluded]
    text = " ".join(words)
    return " ".join(_CUT.sub("", text).split()) if published else text


def composed(record: Record, findings: Iterable[str]) -> str:
    """The note of a record that tells these findings in place of its own."""
    return compose_note(replace(record, terms=tuple(findings)))


def age_in_words(age: str | None, published: bool = False) -> str | None:
    """'P3Y6M' or '3.5' as '3 years 6 months'; an age already in words as it is. Published: always years and months."""
    if not age:
        return None
    counts = _counts(age)
    if counts is None:
        return age
    years, months, weeks, days = counts
    if published:
        return f"{years + months // 12} years {months % 12} months"
    named = [(years, "year"), (months, "month"), (weeks, "week"), (days, "day")]
    words = [f"{count} {name}{'' if count == 1 else 's'}" for count, name in named if count]
    return " ".join(words) or "0 days"


def age_in_years(age: str | None) -> float | None:
    """'P3Y6M', '3.5' or '3 years 6 months' as 3.5; None where it is not known or said in other words."""
    counts = _counts(age) if age else None
    if counts is None:
        return None
    years, months, weeks, days = counts
    return years + months / 12 + weeks / 52 + days / 365


def demographics(text: str) -> dict[str, str]:
    """Sex, age and ethnicity at the start of a GestaltMML text, as far as they are there.

    No mark ends the ethnicity: the longest known one that the text goes on with is taken, and an unknown one is not.
    """
    found = _DEMOGRAPHICS.match(text)
    return {name: value.strip() for name, value in found.groupdict().items() if value} if found else {}


def _counts(age: str) -> tuple[int, int, int, int] | None:
    """Years, months, weeks and days of an ISO 8601 duration, of years as a number, or of 'N years M months'."""
    if found := _DURATION.fullmatch(age) or _IN_WORDS.fullmatch(age):
        years, months, weeks, days = (float((part or "0").replace(",", ".")) for part in found.groups())
    elif _NUMBER.fullmatch(age):
        years, months, weeks, days = float(age), 0.0, 0.0, 0.0
    else:
        return None
    months = round(months + 12 * (years % 1))
    if years:
        years, months = years + months // 12, months % 12
    return int(years), int(months), int(weeks), int(days)


_PART = r"(?:(\d{1,4}(?:[.,]\d{1,6})?)%s)?"
_DURATION = re.compile("P(?=.)" + "".join(_PART % unit for unit in "YMWD") + r"(?:T[\dHMS.,]{1,20})?", re.IGNORECASE)
_IN_WORDS = re.compile("(?=.)" + "".join(_PART % rf"\s?{unit}s?\s*" for unit in ("year", "month", "week", "day")))
_NUMBER = re.compile(r"\d{1,3}(?:\.\d{1,6})?")
_CUT = re.compile(r"[,.()]|and")
_ETHNICITIES = (
    *("European", "Caucasian", "White", "Hispanic", "Latino", "Latin American", "American - Native", "Native American"),
    *("African", "African American", "North African", "Sub-Saharan African", "American - African", "Black", "Jewish"),
    *("Asian", "East Asian", "South Asian", "Southeast Asian", "South-East Asian", "South East Asian", "Central Asian"),
    *("Middle-East/West Asian", "West Asian", "Middle Eastern", "Arab", "Turkish", "Oceanian", "Pacific Islander"),
    *("American - Latin/Hispanic", "Mixed", "Others", "Other", "Unknown", "unknown"),
)
_DEMOGRAPHICS = re.compile(
    r"\s*(?:Sex (?P<sex>male|female)\b)?"
    r"(?:\s*Age (?P<age>\d{1,3} years?(?: \d{1,2} months?)?|\d{1,4} months?|\d{1,5} (?:days?|weeks?)))?"
    rf"(?:\s*Ethnicity (?P<ethnicity>{'|'.join(map(re.escape, sorted(_ETHNICITIES, key=len, reverse=True)))})(?!\S))?"
)
