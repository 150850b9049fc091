"""A file of scores as a teacher, in each of its forms, and what is wrong with one that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mint.encoders import load_encoder
from mint.errors import ConfigError, MintError, RecordError
from mint.types import Record

RECORDS = [Record("a"), Record("b"), Record("c")]
SCORES = [[0.1, 2.0, -1.0], [3.0, 0.5, 0.25], [1.0, 1.0, 4.0]]
CLASSES = ("x", "y", "z")


def write_lines(path: Path, entries: list[Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    rows = [{"id": r.id, "scores": dict(zip(CLASSES, s, strict=True))} for r, s in zip(RECORDS, SCORES, strict=True)]
    rows[1]["scores"] = dict(reversed(rows[1]["scores"].items()))  # the order of the classes may differ by line
    return write_lines(tmp_path / "scores.jsonl", rows)


@pytest.fixture
def array(tmp_path: Path) -> Path:
    np.save(tmp_path / "scores.npy", np.array(SCORES, dtype=np.float64))
    (tmp_path / "classes.txt").write_text("x\ny\nz\n")
    return tmp_path / "scores.npy"


def test_lines_score_records_by_id(lines: Path) -> None:
    teacher = load_encoder(lines)
    assert teacher.classes == CLASSES
    assert torch.equal(teacher.scores([RECORDS[2], RECORDS[0], RECORDS[1]]), torch.tensor(SCORES)[[2, 0, 1]])
    assert torch.equal(load_encoder(lines, classes=["z", "x"]).scores(RECORDS), torch.tensor(SCORES)[:, [2, 0]])


def test_an_array_scores_records_by_id_or_in_their_order(array: Path) -> None:
    teacher = load_encoder(array)
    assert teacher.classes == CLASSES
    teacher.batch_size = 2
    assert torch.equal(teacher.scores(iter(RECORDS)), torch.tensor(SCORES))
    array.with_name("ids.txt").write_text("c\nb\na\n")
    assert torch.equal(load_encoder(array).scores(RECORDS[:1]), torch.tensor(SCORES)[2:])


@pytest.mark.parametrize("count", [2, 4])
def test_another_number_of_records_than_rows_is_refused(array: Path, count: int) -> None:
    with pytest.raises(RecordError, match=r"3 rows, and another number of records; say which is which in ids.txt"):
        load_encoder(array).scores((RECORDS * 2)[:count])


def test_a_record_without_scores_and_a_class_without_are_named(lines: Path) -> None:
    with pytest.raises(RecordError, match="no scores of record 'd', 'e'"):
        load_encoder(lines).scores([*RECORDS, Record("d"), Record("e")])
    with pytest.raises(ConfigError, match="the teacher lacks 'w'"):
        load_encoder(lines, classes=["x", "w"])


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "no line of scores"),
        ([{"id": "a"}], ":1: wanted"),
        ([{"id": "a", "scores": {}}], ":1: wanted"),
        ([{"id": None, "scores": {"x": 1}}], ":1: wanted"),
        ([{"id": "a", "scores": {"x": "1"}}], ":1: the score of 'x' is '1'"),
        ([{"id": "a", "scores": {"x": True}}], ":1: the score of 'x' is True"),
        ([{"id": "a", "scores": {"x": float("nan")}}], ":1: the score of 'x' is nan"),
        ([{"id": "a", "scores": {"x": 1, "y": 2}}, {"id": "b", "scores": {"x": 1}}], ":2: no score of 'y'"),
        ([{"id": "a", "scores": {"x": 1}}, {"id": "b", "scores": {"x": 1, "q": 1}}], ":2: a score of 'q'"),
        ([{"id": "a", "scores": {"x": 1}}, {"id": "a", "scores": {"x": 1}}], ":2: id 'a' stands there twice"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, entries: list[Any], words: str) -> None:
    path = write_lines(tmp_path / "scores.jsonl", entries)
    with pytest.raises(RecordError, match=rf"scores.jsonl:? ?.*{words}"):
        load_encoder(path)


def test_a_line_that_is_no_json_is_named(lines: Path) -> None:
    with lines.open("a") as file:
        file.write('{"id": \n')
    with pytest.raises(RecordError, match=r"scores.jsonl:4: not JSON"):
        load_encoder(lines)


def test_an_array_that_does_not_fit_is_named(array: Path) -> None:
    array.with_name("ids.txt").write_text("a\nb\nb\n")
    with pytest.raises(ConfigError, match=r"ids.txt: 3 ids, 2 different, for 3 rows"):
        load_encoder(array)
    array.with_name("classes.txt").write_text("x\ny\n")
    with pytest.raises(ConfigError, match=r"float64 \[3, 3\], numbers \(N, 2\) were wanted"):
        load_encoder(array)
    array.with_name("classes.txt").unlink()
    with pytest.raises(ConfigError, match=r"classes.txt: cannot be read"):
        load_encoder(array)
    np.save(array, np.array([{"harm": 1}]), allow_pickle=True)
    with pytest.raises(MintError, match=r"scores.npy: not an array of numbers"):
        load_encoder(array)


def test_a_score_that_is_no_number_is_named_by_row(array: Path) -> None:
    np.save(array, np.array([[1, 2, 3], [1, np.nan, 3], [1, 2, 3]], dtype=np.float32))
    with pytest.raises(RecordError, match="row 1 has a score that is no finite number"):
        load_encoder(array).scores(RECORDS)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MintError, match=r"nothing.jsonl"):
        load_encoder(tmp_path / "nothing.jsonl")
