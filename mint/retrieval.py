"""Passages of reference works for a prompt: the paper's baseline with retrieval, and a user's tool.

Documents are cut into passages; `Bm25` finds those that share rare words with a case, `Dense` those that an encoder puts
close to it. Shapes: P passages, D width.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from .encoders.bert import TextEncoder, open_text_encoder
from .errors import RecordError
from .files import lies_in
from .jsonlines import read_json_lines, text_lines
from .labels import letters
from .progress import progress

WORDS = 120
"""Words of a passage."""
OVERLAP = 20
"""Words that a passage repeats from the one before, so that what is cut apart in one stands whole in the other."""
_SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson", ".csv", ".tsv")
_TEXT, _NAME = ("text", "content", "body", "passage"), ("title", "name", "id")
_BATCH = 32


@dataclass(frozen=True, slots=True)
class Passage:
    """Some lines of a document: `name` says which, `text` is what the prompt shows."""

    name: str
    text: str


class Retriever(Protocol):
    """What finds passages: `top(question, k)`, best first."""

    def top(self, question: str, k: int) -> list[Passage]: ...


def open_retriever(path: str | Path, encoder: str | Path | None = None, device: str = "auto") -> Retriever:
    """The passages of a file or folder, found by words (BM25), or with `encoder`, a BERT checkpoint, by meaning."""
    found = [passage for name, text in read_documents(path) for passage in cut(name, text)]
    if not found:
        raise RecordError(f"{path}: no words in it; give .txt, .md, .jsonl or .csv with something to read")
    return Bm25(found) if encoder is None else Dense(found, open_text_encoder(encoder, device))


def read_documents(path: str | Path) -> Iterator[tuple[str, str]]:
    """(name, text) of each document: a .txt or .md file is one, as is a line of JSON lines or a row of a table with a
    column `text`, and `title`, `name` or `id` if it has one. A folder is read with all that is below it, by name."""
    path = Path(path)
    if not path.is_dir():
        yield from _documents(path, path.name)
        return
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
    home = os.path.realpath(path)
    files = [file for file in files if lies_in(file, [home])]  # no link leads out
    if not files:
        raise RecordError(f"{path}: no document in it; wanted files of {', '.join(_SUFFIXES)}")
    for file in files:
        yield from _documents(file, file.relative_to(path).as_posix())


def _documents(path: Path, name: str) -> Iterator[tuple[str, str]]:
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        for number, row in read_json_lines(path):
            yield _row(row, f"{path}:{number}", f"{name}:{number}")
    elif kind in (".csv", ".tsv"):
        yield from _table(path, name, "\t" if kind == ".tsv" else ",")
    else:
        yield name, "\n".join(line for _, line in text_lines(path))


def _table(path: Path, name: str, delimiter: str) -> Iterator[tuple[str, str]]:
    reader = csv.reader((f"{line}\n" for _, line in text_lines(path)), delimiter=delimiter, strict=True)
    try:
        header = [cell.strip().casefold() for cell in next(reader, [])]
        for cells in reader:
            if cells:
                row = dict(zip(header, cells, strict=False))
                yield _row(row, f"{path}:{reader.line_num}", f"{name}:{reader.line_num}")
    except csv.Error as fault:
        raise RecordError(f"{path}:{reader.line_num}: not a table ({fault}); look for a quote left open") from fault


def _row(row: Mapping[str, object], where: str, name: str) -> tuple[str, str]:
    text = next((row[key] for key in _TEXT if key in row), None)
    if not isinstance(text, str):
        raise RecordError(f"{where}: found {', '.join(map(str, row))[:80]}, wanted a text in one of {', '.join(_TEXT)}")
    title = next((row[key] for key in _NAME if isinstance(row.get(key), str) and row[key]), None)
    return name, f"{title}: {text}" if title else text


def cut(name: str, text: str) -> Iterator[Passage]:
    """A document in passages of WORDS words, each with the last OVERLAP of the one before."""
    words = text.split()
    for number, at in enumerate(range(0, max(len(words) - OVERLAP, min(len(words), 1)), WORDS - OVERLAP), start=1):
        yield Passage(f"{name}#{number}", " ".join(words[at : at + WORDS]))


class Bm25:
    """Okapi BM25: a word counts by its rarity, by how often a passage has it (ever less), and by the passage's length.

    score = sum over words of log(1 + (P - p + 1/2) / (p + 1/2)) * f (k1 + 1) / (f + k1 (1 - b + b length / mean length))
    with p the passages that have the word and f how often this one has it.
    """

    def __init__(self, passages: Sequence[Passage], k1: float = 1.5, b: float = 0.75) -> None:
        self.passages, counts = passages, [Counter(letters(passage.text).split()) for passage in passages]
        lengths = np.array([count.total() for count in counts], dtype=np.float64)
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1.0))
        holders: dict[str, list[tuple[int, int]]] = {}
        for row, count in enumerate(counts):
            for word, times in count.items():
                holders.setdefault(word, []).append((row, times))
        self.weights: dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}
        for word, found in holders.items():
            rows, often = np.array([row for row, _ in found]), np.array([n for _, n in found], dtype=np.float64)
            rarity = np.log1p((len(passages) - len(found) + 0.5) / (len(found) + 0.5))
            self.weights[word] = rows, rarity * often * (k1 + 1) / (often + norm[rows])

    def scores(self, question: str) -> np.ndarray[Any, Any]:
        """The score of each passage: (P,). A word that the question repeats counts again."""
        total = np.zeros(len(self.passages))
        for word in letters(question).split():
            if word in self.weights:
                rows, weights = self.weights[word]
                total[rows] += weights
        return total

    def top(self, question: str, k: int) -> list[Passage]:
        """The best k of the passages that share a word with the question."""
        scores = self.scores(question)
        order = np.argsort(-scores, kind="stable")[:k]
        return [self.passages[row] for row in order if scores[row] > 0]


class Dense:
    """Passages and questions as vectors; the nearest by cosine are found by one product."""

    def __init__(self, passages: Sequence[Passage], encoder: TextEncoder) -> None:
        self.passages, self.encoder = passages, encoder
        groups = [passages[at : at + _BATCH] for at in range(0, len(passages), _BATCH)]
        parts = progress(groups, "reading passages", len(groups), "batch")
        self.vectors = torch.cat([encoder.vectors([passage.text for passage in group]) for group in parts])  # (P, D)

    def top(self, question: str, k: int) -> list[Passage]:
        scores = self.vectors @ self.encoder.question(question)
        return [self.passages[row] for row in scores.sort(descending=True, stable=True).indices[:k].tolist()]
