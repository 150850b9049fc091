"""The form of an answer: a numbered list of names under a heading, written here and read back tolerantly.

POTENTIAL_DISEASES:
1. Kabuki syndrome
2. Noonan syndrome
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .errors import ConfigError
from .labels import LabelSet, spelling

HEADINGS = {"disease": "POTENTIAL_DISEASES:", "tissue": "POTENTIAL_TISSUES:"}
"""The first line of an answer, by the kind of thing it lists."""

_HEADING = re.compile(r"[A-Z][A-Z _-]*:")
_NUMBERED = re.compile(r"""[\s>*_#\-•('"\[{]*(\d{1,4})[)'"\]*_]*(?:\s*[.):\]]+\s*|\s+[-\u2013]\s+)(\S.*)""")
_BULLET = re.compile(r"\s*[-*•+\u2013]\s+(\S.*)")
_REMARK = re.compile(r"\s+[-\u2013\u2014(\[]|[:;]\s|\s*->")
_EDGES = " \t\"'`*_,{}[]\u2018\u2019\u201c\u201d"
_MOST = 1000  # names of one answer
_LONGEST = 100_000  # characters of one answer that are read
_LONGEST_NAME = 1000


@dataclass(frozen=True, slots=True)
class Named:
    """One line of an answer: the words as written, and the label of the closed set that they name, or None."""

    text: str
    label: str | None


def heading(kind: str) -> str:
    """The heading of an answer of that kind."""
    if kind not in HEADINGS:
        raise ConfigError(f"kind {kind!r}: one of {', '.join(HEADINGS)} is wanted")
    return HEADINGS[kind]


def line_start(place: int) -> str:
    """What stands between two names: the end of a line and the number of the next, from 1."""
    return f"\n{place}. "


def opening(kind: str) -> str:
    """How every answer begins, up to its first name: the heading and the number 1."""
    return heading(kind) + line_start(1)


def answer_text(labels: Sequence[str], kind: str) -> str:
    """The answer that lists `labels` in their order."""
    wrong = next((label for label in labels if not label.strip() or "\n" in label or "\r" in label), None)
    if wrong is not None or not labels:
        found = "no labels" if not labels else f"the label {wrong!r}, which is empty or spans lines"
        raise ConfigError(f"an answer cannot be written from {found}")
    return heading(kind) + "".join(line_start(place) + label for place, label in enumerate(labels, start=1))


def first_part(answer: str) -> str:
    """An answer up to and with its first name; the whole of it where there is no second one."""
    return answer.partition(line_start(2))[0]


def parse_answer(text: str, known: LabelSet, similarity: float | None = None) -> list[Named]:
    """The names of an answer in their order, however they are numbered, quoted or spelled; repeats are kept.

    A list is read from its first numbered line to where the numbers start again. Text without a list yields the
    labels that it mentions, and a line that mentions none stands for itself, outside the set.
    """
    lines = _block(text[:_LONGEST])
    items = _numbered(lines) or _inline(" ".join(lines)) or [m[1] for line in lines if (m := _BULLET.fullmatch(line))]
    if items:
        named = (Named(item, _label(item, known, similarity)) for item in map(_clean, items[:_MOST]))
        return [entry for entry in named if spelling(entry.text)]
    return list(_mentions(lines[:_MOST], known, similarity))


def _block(text: str) -> list[str]:
    """The lines below the first heading up to the next one, or all lines where there is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    at = [index for index, line in enumerate(lines) if _heading_of(line)]
    if not at:
        return lines
    rest = lines[at[0]].strip("*#_ ").partition(":")[2].strip("*_ ")
    end = at[1] if len(at) > 1 else len(lines)
    return ([rest] if rest else []) + lines[at[0] + 1 : end]


def _heading_of(line: str) -> bool:
    match = _HEADING.match(line.strip("*#_ "))
    return match is not None and "_" in match.group()


def _numbered(lines: list[str]) -> list[str]:
    """The numbered lines; a list that starts again at 1 is a repetition and ends it."""
    items: list[str] = []
    for line in lines:
        match = _NUMBERED.fullmatch(line)
        if match is None:
            continue
        if items and int(match[1]) <= 1:
            break
        items.append(match[2])
    return items if len(items) > 1 or not _inline(" ".join(lines)) else []


def _inline(text: str) -> list[str]:
    """The names of a list written in one line: `1. A, 2. B` or `{'1': 'A', '2': 'B'}`; needs the numbers 1 and 2."""
    starts: list[tuple[int, int]] = []
    at = 0
    while match := re.compile(rf"""(?:^|(?<=[\s,;{{]))[('"]*{len(starts) + 1}['")]*[.):]\s*""").search(text, at):
        starts.append(match.span())
        at = match.end()
    if len(starts) < 2:
        return []
    ends = [begin for begin, _ in starts[1:]] + [len(text)]
    return [text[begin:end].strip().rstrip(",;") for (_, begin), end in zip(starts, ends, strict=True)]


def _clean(item: str) -> str:
    """The words of an item without quotes, emphasis and closing punctuation."""
    return item.strip().rstrip(".;,").strip(_EDGES)


def _label(item: str, known: LabelSet, similarity: float | None) -> str | None:
    """The label of an item: of the whole, else of what comes before a remark (` - because`, ` (OMIM 1)`, `: as`)."""
    found = known.find(item)
    if found is None and len(item) <= _LONGEST_NAME:
        parts = (item[: match.start()] for match in _REMARK.finditer(item))
        found = next((label for part in parts if (label := known.find(_clean(part)))), None)
    return found if found or similarity is None else known.find(item[:_LONGEST_NAME], similarity)


def _mentions(lines: list[str], known: LabelSet, similarity: float | None) -> Iterator[Named]:
    """What text without a list names: a line that is a name, the names inside a line, or the line as it is."""
    for line in map(_clean, lines):
        whole = known.find(line, similarity)
        labels = [whole] if whole else known.within(line)
        yield from (Named(line if whole else label, label) for label in labels)
        if not labels and spelling(line):
            yield Named(line, None)
