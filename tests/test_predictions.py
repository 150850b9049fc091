"""Files of predictions: written, read back, and refused by name where they are broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint.errors import MintError, RecordError
from mint.evaluation import measure
from mint.evaluation.predictions import read_predictions, write_predictions
from mint.labels import LabelSet
from mint.types import Prediction, Record


def test_predictions_are_written_and_read_back(tmp_path: Path) -> None:
    predictions = [
        Prediction(
            id="é",
            ranking=(
                {"label": "A", "logprob": -0.5, "probability": 0.6},
                {"label": "B", "logprob": -9.0, "probability": 1e-4},
            ),
        ),
        Prediction(id="2", text="1. A\n2. B", passages=("from a book",)),
        Prediction(id="3", ranking=({"label": "A"},), text=""),
    ]
    path = tmp_path / "out" / "predictions.jsonl"
    assert write_predictions(path, iter(predictions)) == 3
    assert list(read_predictions(path)) == predictions


ENTRY = {"label": "A", "logprob": -1.0, "probability": 0.5}
GOOD = {"id": "1", "ranking": [ENTRY]}
BAD: dict[str, tuple[Any, str]] = {
    "no id": ({"ranking": [ENTRY]}, "id 'None'"),
    "id is a number": ({**GOOD, "id": 3}, "id '3'"),
    "nothing said": ({"id": "2"}, "neither 'ranking' nor 'text'"),
    "text is a list": ({"id": "2", "text": ["A"]}, "text is a JSON list"),
    "ranking is text": ({"id": "2", "ranking": "A"}, "ranking is a JSON str"),
    "entry is text": ({"id": "2", "ranking": ["A"]}, "ranking, place 1: wanted"),
    "no label": ({"id": "2", "ranking": [ENTRY, {"logprob": -1.0}]}, "ranking, place 2: wanted"),
    "probability above one": ({"id": "2", "ranking": [{**ENTRY, "probability": 1.5}]}, "probability 1.5 is none"),
    "probability is text": ({"id": "2", "ranking": [{**ENTRY, "probability": "0.5"}]}, "probability '0.5' is none"),
    "logprob above zero": ({"id": "2", "ranking": [{**ENTRY, "logprob": 3}]}, "logprob 3 is none"),
    "logprob is true": ({"id": "2", "ranking": [{**ENTRY, "logprob": True}]}, "logprob True is none"),
    "logprob too large": ('{"id": "2", "ranking": [{"label": "A", "logprob": -1e999}]}', "logprob -inf is none"),
    "passages": ({"id": "2", "text": "", "passages": [1]}, "passages must be"),
    "twice": (GOOD, "case '1' was answered in line 1"),
    "half a line": ('{"id": "2", "rank', "not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_predictions_are_refused_by_file_and_line_or_left_out(tmp_path: Path, name: str) -> None:
    bad, words = BAD[name]
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + (bad if isinstance(bad, str) else json.dumps(bad)))
    with pytest.raises(RecordError, match=words) as raised:
        list(read_predictions(path))
    assert str(raised.value).startswith(f"{path}:2:")
    skipped: list[str] = []
    assert [prediction.id for prediction in read_predictions(path, skipped=skipped)] == ["1"]
    assert skipped == [str(raised.value)]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_only_named_errors_come_out_of_mutated_predictions(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray((json.dumps(GOOD) + "\n" + json.dumps({"id": "2", "text": "1. A"})).encode())
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(st.one_of(st.binary(max_size=3), st.sampled_from([b"null", b"[]", b"{}", b"-1e999", b"\n"])))
        content[at : at + data.draw(st.integers(0, 6))] = piece
        content = content or bytearray(b"x")
    path = tmp_path_factory.getbasetemp() / "mutated.predictions"
    path.write_bytes(content)
    message = str(path)
    try:
        predictions = list(read_predictions(path))
        if predictions:
            measure(
                predictions,
                [Record(prediction.id, label="A") for prediction in predictions],
                labels=LabelSet(["A", "B"]),
                resamples=5,
            )
    except MintError as error:
        message = str(error)
    assert "\n" not in message
    assert str(path) in message
