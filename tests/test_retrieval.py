"""Documents of every kind into passages, and the passages that fit a question: BM25 against its formula, and vectors."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from mint.errors import RecordError
from mint.retrieval import OVERLAP, WORDS, Bm25, Dense, Passage, cut, open_retriever, read_documents

TEXTS = [
    "ptosis and low-set ears",
    "Kabuki: arched eyebrows, ptosis, long palpebral fissures",
    "tall stature",
    "ptosis ptosis",
]


def passages(texts: list[str] = TEXTS) -> list[Passage]:
    return [Passage(f"p{n}", text) for n, text in enumerate(texts)]


def by_formula(question: list[str], documents: list[list[str]]) -> list[float]:
    """Okapi BM25 as it is written down, term by term."""
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for words in documents:
        total = 0.0
        for term in question:
            holders, times = sum(term in other for other in documents), Counter(words)[term]
            rarity = math.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
            total += rarity * times * 2.5 / (times + 1.5 * (0.25 + 0.75 * len(words) / mean))
        scores.append(total)
    return scores


def test_bm25_is_its_formula() -> None:
    words = [text.lower().replace("-", " ").replace(":", "").replace(",", "").split() for text in TEXTS]
    for question in ("ptosis", "Ptosis, long stature", "ears ears unseen", "unseen"):
        asked = question.lower().replace(",", "").split()
        assert Bm25(passages()).scores(question).tolist() == pytest.approx(by_formula(asked, words))


def test_the_best_come_first_and_nothing_comes_without_a_shared_word() -> None:
    finder = Bm25(passages())
    assert [p.name for p in finder.top("PTOSIS", 2)] == ["p3", "p0"]
    assert [p.name for p in finder.top("arched éyebrows", 9)] == ["p1"]
    assert finder.top("nothing of it", 3) == []


def test_documents_of_every_kind_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.md").write_text("# head\nthree")
    (tmp_path / "c.jsonl").write_text(
        json.dumps({"title": "T", "text": "four"}) + "\n" + json.dumps({"content": "five"})
    )
    (tmp_path / "d.csv").write_text('name,text\nN,"six, seven"\n')
    (tmp_path / "e.bin").write_bytes(b"\x00")
    assert dict(read_documents(tmp_path)) == {
        "a.txt": "one\ntwo", "c.jsonl:1": "T: four", "c.jsonl:2": "five", "d.csv:2": "N: six, seven",
        "deep/b.md": "# head\nthree",
    }  # fmt: skip
    assert dict(read_documents(tmp_path / "a.txt")) == {"a.txt": "one\ntwo"}


@pytest.mark.parametrize("count", [0, 1, WORDS, WORDS + 1, 3 * WORDS, 1000])
def test_passages_hold_every_word_and_overlap(count: int) -> None:
    words = [f"w{n}" for n in range(count)]
    found = list(cut("d", " ".join(words)))
    rejoined = [word for n, p in enumerate(found) for word in p.text.split()[OVERLAP if n else 0 :]]
    assert rejoined == words
    assert all(0 < len(p.text.split()) <= WORDS for p in found)
    assert [p.name for p in found] == [f"d#{n}" for n in range(1, len(found) + 1)]


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("fine")
    (tmp_path / "in" / "b.txt").symlink_to(tmp_path / "secret.txt")
    assert [name for name, _ in read_documents(tmp_path / "in")] == ["a.txt"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"\xff\xfe", "a.txt:1: not UTF-8"),
        ("a.txt", b" \n ", "no words in it"),
        ("a.jsonl", b'{"id": "1"}', "a.jsonl:1.*wanted a text"),
        ("a.csv", b'text\n"open', "a.csv.*not a table"),
        ("a.csv", b"id\n1", "a.csv:2.*wanted a text"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RecordError, match=words):
        open_retriever(tmp_path / name)


def test_a_folder_without_documents_or_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no document in it"):
        open_retriever(tmp_path)
    with pytest.raises(RecordError, match=r"none\.txt"):
        open_retriever(tmp_path / "none.txt")


class Axes:
    """An encoder that looks for four words."""

    def vectors(self, texts: list[str]) -> torch.Tensor:
        found = [[float(word in text.lower()) for word in ("ptosis", "ears", "stature", "arched")] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(found), dim=-1)

    def question(self, text: str) -> torch.Tensor:
        return self.vectors([text])[0]


def test_vectors_find_the_nearest_passages() -> None:
    finder = Dense(passages() * 20, Axes())  # type: ignore[arg-type]
    assert [p.name for p in finder.top("stature", 20)] == ["p2"] * 20
    assert [p.name for p in finder.top("ptosis, ears", 1)] == ["p0"]
