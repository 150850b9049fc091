"""Answers written as numbered lists and read back, whatever form a model gives them."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint.answers import HEADINGS, Named, answer_text, line_start, parse_answer
from mint.errors import ConfigError
from mint.labels import LabelSet

REAL = Path(os.environ.get("MINT_REAL", Path(__file__).parents[1] / "../shared/real"))
KNOWN = LabelSet(
    [
        "Kabuki syndrome",
        "Noonan syndrome",
        "Cohen-Gibson syndrome",
        "Spinocerebellar ataxia 1",
        "Fetal akinesia, type 2",
    ],
    {"Niikawa-Kuroki syndrome": "Kabuki syndrome"},
)
THREE = ["Noonan syndrome", "Kabuki syndrome", "Spinocerebellar ataxia 1"]


def labels(text: str) -> list[str | None]:
    return [entry.label for entry in parse_answer(text, KNOWN)]


def test_an_answer_is_a_numbered_list_under_its_heading() -> None:
    assert answer_text(["Kabuki syndrome", "Noonan syndrome"], "disease") == (
        "POTENTIAL_DISEASES:\n1. Kabuki syndrome\n2. Noonan syndrome"
    )
    assert answer_text(["Colon"], "tissue") == "POTENTIAL_TISSUES:\n1. Colon"
    assert HEADINGS["disease"] + line_start(1) + "Colon" == "POTENTIAL_DISEASES:\n1. Colon"


def test_an_answer_of_nothing_or_of_broken_names_is_refused() -> None:
    for wrong in ([], ["  "], ["Kabuki\nsyndrome"], ["a", "b\r"]):
        with pytest.raises(ConfigError, match="an answer cannot be written"):
            answer_text(wrong, "disease")
    with pytest.raises(ConfigError, match="kind 'gene'"):
        answer_text(["a"], "gene")


@settings(max_examples=50, deadline=None)
@given(st.permutations(KNOWN.labels), st.integers(1, 5), st.sampled_from(["disease", "tissue"]))
def test_what_is_written_is_read_back(order: list[str], k: int, kind: str) -> None:
    assert labels(answer_text(order[:k], kind)) == order[:k]


@pytest.mark.parametrize(
    "text",
    [
        "POTENTIAL_DISEASES:\n1. Noonan syndrome\n2. Kabuki syndrome\n3. Spinocerebellar ataxia 1",
        "POTENTIAL_DISEASES:\n1. 'Noonan syndrome'\n2. 'Kabuki syndrome'\n3. 'Spinocerebellar ataxia 1'",
        "POTENTIAL_DISEASES:\n'1': Noonan syndrome\n'2': Kabuki syndrome\n'3': Spinocerebellar ataxia 1",
        "{'1': 'Noonan syndrome', '2': 'Kabuki syndrome', '3': 'Spinocerebellar ataxia 1'}",
        '{"1": "Noonan syndrome",\n "2": "Kabuki syndrome",\n "3": "Spinocerebellar ataxia 1"}',
        "1) noonan syndrome;\n2) KABUKI SYNDROME;\n3) Spinocerebellar ataxia 1.",
        "(1) Noonan syndrome\n(2) Kabuki syndrome\n(3) Spinocerebellar ataxia 1",
        "**Potential diseases**\n\n1. **Noonan syndrome**\n2. **Kabuki syndrome**\n3. **Spinocerebellar ataxia 1**",
        "- Noonan syndrome\n- Niikawa-Kuroki syndrome\n- Spinocerebellar ataxia 1",
        "\u2022 Noonan syndrome\n\u2022 Kabuki syndrome\n\u2022 Spinocerebellar ataxia 1\n",
        "1. Noonan syndrome, 2. Kabuki syndrome, 3. Spinocerebellar ataxia 1",
        "POTENTIAL_DISEASES: 1. Noonan syndrome 2. Kabuki syndrome 3. Spinocerebellar ataxia 1",
        "Noonan syndrome\nKabuki syndrome\nSpinocerebellar ataxia 1",
        "1 - Noonan syndrome\n2 - Kabuki syndrome\n3 - Spinocerebellar ataxia 1",
        "1. Noonan syndrome - for the stature\n2. Kabuki syndrome (OMIM 147920)\n3. Spinocerebellar ataxia 1: rare",
        "1.Noonan syndrome\n2.Kabuki syndrome\n3.Spinocerebellar ataxia 1",
        "01. Noonan syndrome\n02. Kabuki syndrome\n03. Spinocerebellar ataxia 1",
        (
            "Let me think: 2 findings fit.\n\nPOTENTIAL_DISEASES:\n1. Noonan syndrome\n2. Kabuki syndrome\n"
            "3. Spinocerebellar ataxia 1\n\nI hope this helps."
        ),
        (
            "POTENTIAL_DISEASES:\n1. Noonan syndrome\n2. Kabuki syndrome\n3. Spinocerebellar ataxia 1\n"
            "POTENTIAL_DISEASES:\n1. Cohen-Gibson syndrome"
        ),
        "1. Noonan syndrome\n2. Kabuki syndrome\n3. Spinocerebellar ataxia 1\n1. Cohen-Gibson syndrome",
    ],
)
def test_lists_of_every_style_are_read(text: str) -> None:
    assert labels(text) == THREE


def test_a_name_with_a_number_or_a_comma_inside_stays_whole() -> None:
    assert labels("1. Spinocerebellar ataxia 1\n2. Fetal akinesia, type 2") == [
        "Spinocerebellar ataxia 1",
        "Fetal akinesia, type 2",
    ]


def test_a_name_that_begins_with_a_number_is_no_numbered_line() -> None:
    known = LabelSet(["3-M syndrome 1", "46,XX sex reversal 5", "22q11.2 deletion syndrome"])
    for text in ("- {}\n- {}\n- {}", "{}\n{}\n{}", "1. {}\n2. {}\n3. {}", "* 1) {}\n* 2) {}\n* 3) {}"):
        assert [entry.label for entry in parse_answer(text.format(*known), known)] == list(known)


STYLES = (
    "{i}. {n}",
    "{i}) '{n}'",
    "'{i}': {n}",
    "({i}) {n}.",
    "- {n}",
    "{i}. **{n}** (OMIM 1)",
    "{i}. {n} - since",
    "{n}",
)


@pytest.mark.skipif(not (REAL / "cases_open.jsonl.gz").is_file(), reason="the real cases are not here")
def test_the_names_of_real_diseases_are_read_in_every_style() -> None:
    with gzip.open(REAL / "cases_open.jsonl.gz") as file:
        names = sorted({json.loads(line)["disease"]["label"] for line in file})
    known = LabelSet(names)
    assert len(known) > 600
    for style in STYLES:
        for begin in range(0, len(names) - 10, 10):
            ten = names[begin : begin + 10]
            text = "\n".join(style.format(i=place, n=name) for place, name in enumerate(ten, start=1))
            assert [entry.label for entry in parse_answer(text, known)] == ten


def test_what_lies_outside_the_set_is_reported_as_such() -> None:
    found = parse_answer("1. Kabuki syndrome\n2. Moon disease.\n3. Noonan syndrome, type 99", KNOWN)
    assert found == [
        Named("Kabuki syndrome", "Kabuki syndrome"),
        Named("Moon disease", None),
        Named("Noonan syndrome, type 99", None),
    ]


def test_repeats_are_kept_for_the_reader_to_judge() -> None:
    assert labels("1. Kabuki syndrome\n2. kabuki syndrome") == ["Kabuki syndrome", "Kabuki syndrome"]


def test_a_sentence_yields_the_labels_that_it_mentions_or_itself() -> None:
    assert labels("The findings suggest Kabuki syndrome rather than Noonan syndrome.") == THREE[1::-1]
    (entry,) = parse_answer("I cannot tell.", KNOWN)
    assert entry == Named("I cannot tell", None)


def test_an_empty_answer_has_no_names() -> None:
    for text in ("", "  \n ", "POTENTIAL_DISEASES:", "POTENTIAL_DISEASES:\n", "1. \n2. ''\n"):
        assert parse_answer(text, KNOWN) == []


def test_a_similar_name_counts_only_on_request() -> None:
    text = "1. Kabukii syndrom\n2. Moon disease"
    assert labels(text) == [None, None]
    assert [entry.label for entry in parse_answer(text, KNOWN, similarity=0.85)] == ["Kabuki syndrome", None]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("12345.:)('\"-*\n {}KabukiPOTENTIAL_\u00e9\u2013\u2019\u2028"), max_size=80))
def test_any_text_can_be_read(text: str) -> None:
    for entry in parse_answer(text, KNOWN):
        assert entry.text
        assert entry.label is None or entry.label in KNOWN


def test_a_very_long_answer_is_read_quickly_and_bounded() -> None:
    assert len(parse_answer("\n".join(f"{i}. Moon disease {i}" for i in range(1, 9000)), KNOWN)) == 1000
    assert parse_answer("1 " * 100_000, KNOWN)
    assert parse_answer("(" * 100_000, KNOWN) is not None
