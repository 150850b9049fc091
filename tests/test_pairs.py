"""Rankings to preference pairs: which classes are chosen, which rejected, and that the words keep to the modality."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest

from mint.answers import parse_answer
from mint.errors import ConfigError, RecordError
from mint.labels import LabelSet
from mint.pairs import prefer_pairs
from mint.types import PreferencePair, Ranking, Record

CLASSES = tuple(f"disease {c:02}" for c in range(40))
KNOWN = LabelSet(CLASSES)


def ranking(name: str = "a", labels: tuple[str, ...] = CLASSES) -> Ranking:
    return Ranking(id=name, labels=labels, scores=tuple(-float(c) for c in range(len(labels))))


def record(name: str = "a", **more: Any) -> Record:
    return Record(id=name, note="a note", image="a.png", **more)


def listed(answer: Any) -> list[str | None]:
    assert [message["role"] for message in answer] == ["assistant"]
    return [entry.label for entry in parse_answer(answer[0]["content"], KNOWN)]


def one(labels: tuple[str, ...] = CLASSES, case: Record | None = None, **options: Any) -> PreferencePair:
    (pair,) = prefer_pairs([ranking(labels=labels)], [case or record()], **options)
    return pair


def test_the_first_ten_are_chosen_and_the_last_fifteen_rejected_as_in_the_paper() -> None:
    pair = one()
    assert pair.id == "a"
    assert listed(pair.chosen) == list(CLASSES[:10])
    assert listed(pair.rejected) == list(CLASSES[25:])
    assert pair.image is None


def test_tissues_have_five_and_five() -> None:
    pair = one(CLASSES[:19], kind="tissue", modality="image")
    assert listed(pair.chosen) == list(CLASSES[:5])
    assert listed(pair.rejected) == list(CLASSES[14:19])
    assert pair.chosen[0]["content"].startswith("POTENTIAL_TISSUES:")  # type: ignore[index]
    assert pair.image == "a.png"


def test_k_and_q_are_checked_against_the_number_of_classes() -> None:
    pair = one(CLASSES[:25])
    assert set(listed(pair.chosen)) & set(listed(pair.rejected)) == set()
    with pytest.raises(ConfigError, match="case 'a': 10 chosen and 15 rejected of 24 classes"):
        one(CLASSES[:24])
    for sizes in ({"chosen_k": 0}, {"rejected_q": 0}, {"chosen_k": -1}):
        with pytest.raises(ConfigError, match="at least 1"):
            one(**sizes)


def test_the_known_label_can_come_first_and_is_then_never_rejected() -> None:
    pair = one(case=record(label="disease 39"), label_first=True, chosen_k=3, rejected_q=2)
    assert listed(pair.chosen) == ["disease 39", "disease 00", "disease 01"]
    assert listed(pair.rejected) == ["disease 37", "disease 38"]
    first_of_many = one(case=record(labels=("disease 05", "disease 06")), label_first=True)
    assert listed(first_of_many.chosen)[0] == "disease 05"
    assert listed(one(label_first=True).chosen) == list(CLASSES[:10])


def test_a_label_that_the_teacher_lacks_is_refused_by_case() -> None:
    with pytest.raises(RecordError, match="case 'a': its label 'Turner' is none of the teacher's 40 classes"):
        one(case=record(label="Turner"), label_first=True)
    assert one(case=record(label="Turner")).id == "a"


def test_cases_that_the_teacher_gets_wrong_can_be_dropped() -> None:
    cases = [("right", "disease 00"), ("second", "disease 01"), ("wrong", "disease 30"), ("unknown", None)]
    rankings = [ranking(name) for name, _ in cases]
    records = [record(name, label=label) for name, label in cases]
    assert [pair.id for pair in prefer_pairs(rankings, records, label_within=1)] == ["right"]
    assert [pair.id for pair in prefer_pairs(rankings, records, label_within=2)] == ["right", "second"]
    assert len(list(prefer_pairs(rankings, records))) == 4
    with pytest.raises(ConfigError, match="label_within 0"):
        list(prefer_pairs(rankings, records, label_within=0))


def test_hard_negatives_come_from_just_below_the_chosen() -> None:
    assert listed(one(rejected="near", chosen_k=4, rejected_q=3).rejected) == list(CLASSES[4:7])


def test_random_negatives_depend_on_the_seed_and_the_case_alone() -> None:
    options: dict[str, Any] = {"rejected": "random", "chosen_k": 4, "rejected_q": 6}
    alone = listed(one(**options).rejected)
    names = ["z", "a", "b"]
    among = {
        pair.id: listed(pair.rejected) for pair in prefer_pairs(map(ranking, names), map(record, names), **options)
    }
    assert among["a"] == alone
    assert among["b"] != alone
    assert listed(one(**options, seed=1).rejected) != alone
    assert len(set(alone)) == 6
    assert not set(alone) & set(CLASSES[:4])
    with pytest.raises(ConfigError, match="rejected 'worst'"):
        one(rejected="worst")


def test_rankings_and_records_out_of_step_are_refused() -> None:
    with pytest.raises(RecordError, match="case 'a' meets the record 'b'"):
        list(prefer_pairs([ranking("a")], [record("b")]))
    with pytest.raises(RecordError, match="case none meets the record 'b'"):
        list(prefer_pairs([ranking("a")], [record("a"), record("b")]))


def test_pairs_stream_from_endless_sources() -> None:
    def endless(make: Any) -> Any:
        number = 0
        while True:
            yield make(str(number))
            number += 1

    pairs = prefer_pairs(endless(ranking), endless(record))
    assert [pair.id for pair in islice(pairs, 3)] == ["0", "1", "2"]


def test_the_words_keep_to_what_the_student_sees() -> None:
    case = Record(id="a", note="notesecret", image="a.png", label="disease 03", terms=("termsecret",))
    seen = one(case=case, modality="image")
    assert "secret" not in str((seen.prompt, seen.chosen, seen.rejected))
    read = one(case=case, modality="note")
    assert "notesecret" in str(read.prompt)
    assert "secret" not in str((read.chosen, read.rejected))
    assert read.image is None


def test_the_prompt_is_there_once_and_the_answers_hold_no_part_of_it() -> None:
    pair = one()
    assert [message["role"] for message in pair.prompt] == ["user"]  # type: ignore[index]
    assert "a note" not in str((pair.chosen, pair.rejected))


def test_a_list_of_labels_in_the_prompt_does_not_tell_the_teacher_s_order() -> None:
    turned = one(CLASSES[::-1], template="{note} {labels}")
    assert turned.prompt == one(template="{note} {labels}").prompt
