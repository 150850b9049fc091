"""`prefer` and `teach` from the command line: cases and a teacher in, pairs that `align` takes out; faults by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mint.commands import cli
from mint.pairs.files import read_pairs

CLASSES = [f"disease {number:02}" for number in range(30)]


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    """Three cases in a CSV file, and a file of scores that ranks their diseases by number."""
    rows = "".join(f'{name},"short stature, low-set ears",disease {at:02}\n' for at, name in enumerate("abc"))
    (tmp_path / "cases.csv").write_text(f"id,note,label\n{rows}")
    scores = [{"id": name, "scores": {label: -at for at, label in enumerate(CLASSES)}} for name in "abc"]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    return tmp_path / "cases.csv"


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    return result.exit_code, result.output


def test_a_file_of_scores_teaches(cases: Path) -> None:
    out = cases.parent / "pairs.jsonl"
    code, said = run("prefer", cases, "--teacher", cases.parent / "scores.jsonl", "--out", out, "--json", "--quiet")
    assert (code, json.loads(said)["pairs"]) == (0, 3)
    pairs = list(read_pairs(out))
    assert [pair.id for pair in pairs] == ["a", "b", "c"]
    chosen = pairs[0].chosen[0]["content"].splitlines()  # type: ignore[index, union-attr]
    assert chosen[1] == "1. disease 00"
    assert len(chosen) == 11
    rejected = pairs[0].rejected[0]["content"].splitlines()  # type: ignore[index, union-attr]
    assert [rejected[1], rejected[-1]] == ["1. disease 15", "15. disease 29"]


def test_an_array_of_scores_teaches_in_the_order_of_the_cases(cases: Path) -> None:
    np.save(cases.parent / "scores.npy", np.tile(-np.arange(30.0), (3, 1)))
    (cases.parent / "classes.txt").write_text("\n".join(CLASSES))
    out = cases.parent / "pairs.jsonl"
    assert run("prefer", cases, "--teacher", cases.parent / "scores.npy", "--out", out)[0] == 0
    assert len(list(read_pairs(out))) == 3


def test_a_label_that_the_teacher_lacks_is_named_or_left_out(cases: Path) -> None:
    cases.write_text(cases.read_text().replace("disease 01", "disease 77"))
    words = ["prefer", cases, "--teacher", cases.parent / "scores.jsonl", "--out", cases.parent / "pairs.jsonl"]
    code, said = run(*words)
    assert code == 2
    assert "case 'b': its label 'disease 77' is none of the teacher's 30 classes" in said
    assert not (cases.parent / "pairs.jsonl").exists()
    code, said = run(*words, "--skip-bad")
    assert code == 0
    assert "left out 1 in all" in said
    assert [pair.id for pair in read_pairs(cases.parent / "pairs.jsonl")] == ["a", "c"]


def test_a_case_without_scores_is_named_or_left_out(cases: Path) -> None:
    with cases.open("a") as file:
        file.write("d,tall stature,disease 03\n")
    words = ["prefer", cases, "--teacher", cases.parent / "scores.jsonl", "--out", cases.parent / "pairs.jsonl"]
    code, said = run(*words)
    assert code == 2
    assert "d" in said
    assert run(*words, "--skip-bad")[0] == 0
    assert len(list(read_pairs(cases.parent / "pairs.jsonl"))) == 3


def test_too_few_classes_are_told(cases: Path) -> None:
    words = ["prefer", cases, "--teacher", cases.parent / "scores.jsonl", "--out", cases.parent / "pairs.jsonl"]
    code, said = run(*words, "--chosen-k", 20)
    assert code == 2
    assert "20 chosen and 15 rejected of 30 classes would overlap" in said


def test_a_teacher_that_is_not_there_is_told_in_one_line(cases: Path) -> None:
    code, said = run("prefer", cases, "--teacher", cases.parent / "nothing", "--out", cases.parent / "pairs.jsonl")
    assert code == 2
    assert len(said.strip().splitlines()) == 1


def test_a_taught_teacher_makes_pairs(tmp_path: Path) -> None:
    rows = [
        f"case-{at},{'long palpebral fissures' if at % 2 else 'small hands'},{'A' if at % 2 else 'B'}"
        for at in range(24)
    ]
    (tmp_path / "cases.csv").write_text("id,note,label\n" + "\n".join(rows) + "\n")
    words = ["--epochs", 1, "--batch-size", 8, "--quiet", "--json", "--out", tmp_path / "teacher"]
    code, said = run("teach", tmp_path / "cases.csv", *words)
    assert code == 0, said
    assert json.loads(said)["classes"] == 2
    out = tmp_path / "pairs.jsonl"
    code, said = run("prefer", tmp_path / "cases.csv", "--teacher", tmp_path / "teacher", "--chosen-k", 1,
                     "--rejected-q", 1, "--out", out, "--quiet")  # fmt: skip
    assert code == 0, said
    assert len(list(read_pairs(out))) == 24
