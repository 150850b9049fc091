"""Closed sets of names (diseases, tissues): each found again under any of its spellings, and the files of names."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from .errors import RecordError
from .files import read_json
from .jsonlines import text_lines

_PLAIN = str.maketrans(
    "\u2018\u2019\u201a\u201b\u2032\u201c\u201d\u201e\u201f\u2033\u2010\u2011\u2012\u2013\u2014\u2015\u2212",
    "'" * 5 + '"' * 5 + "-" * 7,
)  # curly quotes and the many dashes
_EDGES = " \t'\"`*_.,;:!?"
_SPECIAL = re.compile(r"<\|[^|<>]*\|>")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")
_LONGEST = 1000


def spelling(text: str) -> str:
    """The name without what carries no meaning: case, width, quotes, runs of space, punctuation at either end."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_PLAIN)
    return " ".join(text.casefold().split()).strip(_EDGES)


def letters(text: str) -> str:
    """Only the letters and digits of a name, in words: `Sjögren–Larsson` and `sjogren larsson` are the same."""
    text = spelling(text)
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join("".join(c if c.isalnum() else " " for c in text).split())


class LabelSet:
    """The labels in their order, and the way from a spelling or a declared alias back to the label."""

    def __init__(self, labels: Iterable[str], aliases: Mapping[str, str] | None = None, source: str = "labels") -> None:
        self.labels = tuple(unicodedata.normalize("NFC", label) for label in labels)
        self.aliases = dict(aliases or {})
        self._members = frozenset(self.labels)
        if not self.labels:
            raise RecordError(f"{source}: no labels; at least one is wanted")
        seen: set[str] = set()
        for label in self.labels:
            fault = _fault(label) or ("is there twice" if spelling(label) in seen else "")
            if fault:
                raise RecordError(f"{source}: the label {label[:80]!r} {fault}")
            seen.add(spelling(label))
        for alias, label in self.aliases.items():
            if label not in self._members:
                raise RecordError(f"{source}: the alias {alias!r} stands for {label!r}, which is no label of the set")
            if not spelling(alias) or self._spellings[spelling(alias)] != label:
                found = "names another label too" if spelling(alias) else "is empty"
                raise RecordError(f"{source}: the alias {alias!r} of {label!r} {found}")

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[str]:
        return iter(self.labels)

    def __contains__(self, label: object) -> bool:
        return label in self._members

    @cached_property
    def _spellings(self) -> dict[str, str]:
        aliases = {spelling(alias): label for alias, label in self.aliases.items()}
        return aliases | {spelling(label): label for label in self.labels}

    @cached_property
    def _letters(self) -> dict[str, str]:
        """Names by their letters alone, without those that two labels share (`Rh+`, `Rh-`)."""
        table: dict[str, str] = {}
        shared: set[str] = set()
        for name, label in self._spellings.items():
            key = letters(name)
            if table.setdefault(key, label) != label:
                shared.add(key)
        return {key: label for key, label in table.items() if key and key not in shared}

    @cached_property
    def _most_words(self) -> int:
        return max((key.count(" ") + 1 for key in self._letters), default=0)

    def find(self, text: str, similarity: float | None = None) -> str | None:
        """The label that `text` names: itself, a spelling, an alias, or None.

        With `similarity`, a share of 0..1 of matching characters, also the most similar label that reaches it.
        """
        if text in self._members:
            return text
        found = self._spellings.get(spelling(text)) or self._letters.get(letters(text))
        if found is None and similarity is not None:
            return self._nearest(letters(text), similarity)
        return found

    def within(self, text: str) -> list[str]:
        """Labels named inside running text, in the order in which they appear; the longest name wins."""
        words, found, at = letters(text).split(), [], 0
        while at < len(words):
            for end in range(min(len(words), at + self._most_words), at, -1):
                label = self._letters.get(" ".join(words[at:end]))
                if label is not None:
                    found.append(label)
                    at = end - 1
                    break
            at += 1
        return found

    @lru_cache(maxsize=4096)  # noqa: B019  a label set lives as long as the run
    def _nearest(self, text: str, similarity: float) -> str | None:
        matcher = SequenceMatcher(b=text, autojunk=False)
        best, best_ratio = None, similarity
        for name, label in self._letters.items():
            matcher.set_seq1(name)
            if matcher.quick_ratio() >= best_ratio and (ratio := matcher.ratio()) >= best_ratio:
                if best is None or ratio > best_ratio:
                    best = label
                best_ratio = ratio
        return best


def _fault(label: str) -> str:
    """What makes a string unfit as a label, or nothing."""
    if not spelling(label):
        return "is empty"
    if len(label) > _LONGEST:
        return f"has {len(label):,} characters; at most {_LONGEST:,} make a name"
    if _CONTROL.search(label):
        return "holds a line break or another control character"
    if special := _SPECIAL.search(label):
        return f"holds the special token {special.group()}"
    return ""


def read_labels(path: str | Path) -> LabelSet:
    """The labels of a file, in their order, with their aliases; the first line shows which form it has.

    Plain text: a label a line, aliases after tabs. CSV or TSV: a column `label` (or `name`), aliases in `aliases` with
    `|` between them. JSON: a list of names or of {"label", "aliases"}; {label: [aliases]}; or {"0": name, "1": name}.
    """
    labels: dict[str, str] = {}
    aliases: dict[str, str] = {}
    places: dict[str, str] = {}
    for where, written, others in _rows(path):
        label, key = unicodedata.normalize("NFC", written), spelling(written)
        fault = _fault(label)
        if fault:
            raise RecordError(f"{where}: the label {label[:80]!r} {fault}")
        if key in labels:
            raise RecordError(
                f"{where}: the label {label!r} is there already ({_first(path, key)}); take one of them out"
            )
        labels[key] = label
        for other in others:
            taken = aliases.get(other, label)
            if taken != label:
                raise RecordError(f"{where}: the alias {other!r} stands for {taken!r} already ({places[other]})")
            aliases[other], places[other] = label, where
    return LabelSet(labels.values(), aliases, source=str(path))


def _first(path: str | Path, key: str) -> str:
    """Where the label of that spelling stands first."""
    return next(where for where, label, _ in _rows(path) if spelling(label) == key)


def _rows(path: str | Path) -> Iterator[tuple[str, str, Sequence[str]]]:
    """(place, label, aliases) of each entry, by the form that the file's first character and first line show."""
    first = next((line for _, line in text_lines(path) if line.strip()), "")
    if not first:
        raise RecordError(f"{path}: empty; a label a line is wanted")
    if first.lstrip()[0] in "[{":
        return _json_rows(path)
    for delimiter in "\t,;":
        header = [cell.strip().strip('"').casefold() for cell in first.split(delimiter)]
        if {"label", "name"} & set(header):
            return _table_rows(path, delimiter, header)
    return _text_rows(path)


def _text_rows(path: str | Path) -> Iterator[tuple[str, str, Sequence[str]]]:
    blank = 0
    for number, line in text_lines(path):
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            raise RecordError(f"{path}:{blank}: an empty line among the labels; take it out")
        label, *aliases = (cell.strip() for cell in line.split("\t"))
        yield f"{path}:{number}", label, [alias for alias in aliases if alias]


def _table_rows(path: str | Path, delimiter: str, header: list[str]) -> Iterator[tuple[str, str, Sequence[str]]]:
    label_column = header.index("label" if "label" in header else "name")
    alias_column = header.index("aliases") if "aliases" in header else None
    reader = csv.reader((f"{line}\n" for _, line in text_lines(path)), delimiter=delimiter, strict=True)
    try:
        next(reader)
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if len(row) != len(header):
                raise RecordError(
                    f"{where}: {len(row)} cells, but the first line has {len(header)}; quote what holds a comma"
                )
            aliases = row[alias_column].split("|") if alias_column is not None else []
            yield where, row[label_column].strip(), [alias.strip() for alias in aliases if alias.strip()]
    except csv.Error as fault:
        raise RecordError(
            f"{path}:{reader.line_num}: not a table ({fault}); look for a quote that never closes"
        ) from fault


def _json_rows(path: str | Path) -> Iterator[tuple[str, str, Sequence[str]]]:
    value = read_json(path, RecordError)
    entries = value if isinstance(value, list) else _object_entries(path, value)
    for index, entry in enumerate(entries):
        where = f"{path}: entry {index}"
        named = {"label": entry} if isinstance(entry, str) else entry
        label = named.get("label") if isinstance(named, dict) else None
        aliases = named.get("aliases", []) if isinstance(named, dict) else None
        if not isinstance(label, str) or not isinstance(aliases, list) or not all(isinstance(a, str) for a in aliases):
            raise RecordError(f'{where}: wanted a name or {{"label": name, "aliases": [name, ...]}}')
        yield where, label.strip(), aliases


def _object_entries(path: str | Path, value: Any) -> list[Any]:
    """{label: [aliases]}, or {"0": name, "1": name} as a classifier's dictionary of classes has it."""
    if not isinstance(value, dict):
        raise RecordError(f"{path}: a JSON {type(value).__name__}; a list or an object of labels is wanted")
    if value and all(isinstance(name, str) for name in value.values()):
        if set(value) != {str(i) for i in range(len(value))}:
            raise RecordError(f"{path}: the keys of {{number: name}} must be 0 to {len(value) - 1}, each once")
        return [value[str(i)] for i in range(len(value))]
    return [{"label": label, "aliases": aliases} for label, aliases in value.items()]


def closed_set(labels: str | Path | Sequence[str] | LabelSet | None) -> LabelSet | None:
    """The labels of a file, or given as such."""
    if labels is None or isinstance(labels, LabelSet):
        return labels
    return read_labels(labels) if isinstance(labels, str | Path) else LabelSet(labels)
