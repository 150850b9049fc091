"""The base that is made for a file of cases: it reads the notes of the training part, and no diagnosis."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mint.answers import answer_text, parse_answer
from mint.chat import ChatTokenizer
from mint.decoders import load_decoder
from mint.experiment import reader
from mint.experiment.crossfit import bayes
from mint.experiment.reader import Read, conversations, make_reader, notes_of
from mint.experiment.splits import in_validation, sides
from mint.experiment.tasks import file_task
from mint.kernels import tree_attention, tree_layout
from mint.labels import LabelSet
from mint.prompts import prompt_messages
from mint.records.notes import compose_note
from mint.trees import Text, token_tree
from mint.types import Record

NAMES = ("Noonan syndrome", "Kabuki syndrome", "Sotos syndrome")
WORDS = ("Short stature", "Ptosis", "Hypertelorism", "Seizure", "Short stature, severe")


def _case(number: int, label: str) -> Record:
    terms = tuple(WORDS[(number + step) % len(WORDS)] for step in range(1 + number % 4))
    bare = Record(f"c{number}", label=label, terms=terms, sex="male", group=f"p{number // 2}")
    return replace(bare, note=compose_note(bare))


CASES = [_case(number, NAMES[number % 3]) for number in range(60)]


def _notes(cases: list[Record]) -> list[Read]:
    return notes_of(cases, lambda record: record.terms)


def _made(folder: Path, cases: list[Record]) -> dict[str, bytes]:
    make_reader(folder, _notes(cases), NAMES, steps=2)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reader") / "model"
    _made(place, CASES)
    return place


def test_no_diagnosis_leaves_a_trace_and_the_bytes_repeat(folder: Path, tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    others = [replace(case, label=NAMES[0], labels=NAMES) for case in CASES]
    assert _made(tmp_path / "others", others) == first
    changed = [*CASES[:-1], replace(CASES[-1], terms=("Ptosis",), note="Sex male Ptosis")]
    assert _made(tmp_path / "changed", changed)["model.safetensors"] != first["model.safetensors"]


def test_findings_and_names_are_one_token(folder: Path) -> None:
    chat: ChatTokenizer = load_decoder(folder, device="meta").tokenizer
    for text in (*WORDS, *(f" {word}" for word in WORDS), *NAMES, "POTENTIAL_DISEASES:", "FINDINGS:", "3. "):
        assert len(chat.encode(text)) == 1, text
    said = "Sex male Age 3 years Ptosis na\u00efve\n1. Noonan syndrome"
    assert chat.decode(chat.encode(said)) == said


def test_findings_that_stand_together_have_vectors_that_say_so(folder: Path) -> None:
    """p(f, g) / p(f) p(g) by hand: of four notes A stands in 2, B in 2, both in 1; C in 1, with A."""
    meant = reader._together([[0, 1], [0, 2], [1], []], 3, 3)
    products = meant @ meant.T
    assert products[0, 1] == pytest.approx(0, abs=1e-4 * float(products[0, 0]))  # 4 * 1 / (2 * 2) = 1
    assert products[0, 2] / products[0, 0] == pytest.approx(1.0, abs=1e-3)  # 4 * 1 / (2 * 1) = 4 * 2 / (2 * 2) = 2
    assert products[2, 2] / products[0, 0] == pytest.approx(2.0, abs=1e-3)  # 4 * 1 / (1 * 1) = 4: log 4 = 2 log 2
    decoder = load_decoder(folder, device="cpu")
    vectors, chat = decoder.network.model.embed_tokens.weight, decoder.tokenizer
    said = {text: vectors[chat.encode(text)[0], : reader.OWN.start] for text in (" Ptosis", "Ptosis", "3. ", NAMES[0])}
    assert said["Ptosis"].equal(said[" Ptosis"])
    assert float(said["Ptosis"].abs().max()) > 0
    assert not said["3. "].any()
    assert not said[NAMES[0]].any()


def test_reading_teaches_the_head_alone_and_nothing_of_what_goes_with_a_name(folder: Path, tmp_path: Path) -> None:
    make_reader(tmp_path / "unread", _notes(CASES), NAMES, steps=0)
    read, unread = (load_decoder(place, device="cpu") for place in (folder, tmp_path / "unread"))
    before = dict(unread.network.named_parameters())
    changed = {name for name, weight in read.network.named_parameters() if not weight.equal(before[name])}
    assert changed == {"lm_head.weight"}
    head, chat = read.network.lm_head.weight, read.tokenizer
    assert not head[[chat.encode(name)[0] for name in NAMES], : reader.OWN.start].any()
    assert head[[chat.encode(word)[0] for word in WORDS], : reader.OWN.start].any(dim=1).all()


def test_an_answer_begins_with_all_findings_of_the_note_alike(folder: Path) -> None:
    """Whatever the order of the findings, what the first layer adds at the end of a note is the mean of what stands there,
    but for what all tokens have alike, which stays as it is."""
    decoder = load_decoder(folder, device="cpu")
    block, vectors = decoder.network.model.layers[0], decoder.network.model.embed_tokens.weight
    ids = decoder.tokenizer.encode("Sex male Ptosis Seizure Hypertelorism")
    for order in (ids, ids[:1] + ids[:0:-1]):
        tree = token_tree([Text(order)])
        attend = partial(_attend, tree_layout(tree.end))
        with torch.no_grad():
            out = block(vectors[tree.ids], decoder.network.model.rope(tree.position, vectors.dtype), attend)
            mean = block.input_layernorm(vectors[tree.ids]).mean(0)
        mean[reader.EVER :] = 0
        assert torch.allclose(out[-1], vectors[tree.ids[-1]] + mean, atol=1e-5)


@pytest.mark.parametrize("listed", [1, 2])
def test_a_list_goes_on_with_the_next_number_and_a_name_that_is_not_on_it(folder: Path, listed: int) -> None:
    """After one batch of reading the base keeps its lists; what it has learnt of notes is not needed for that."""
    decoder = load_decoder(folder, device="cpu")
    chat = decoder.tokenizer
    asked = chat.chat_ids(prompt_messages(CASES[0], k=3), generate=True)
    text = answer_text(NAMES[:listed], "disease")
    for ending, words, wanted, unwanted in (
        ("\n", [f"{place}. " for place in range(1, 7)], [listed], range(listed)),
        (f"\n{listed + 1}. ", NAMES, range(listed, 3), range(listed)),
    ):
        last = decoder.logits(torch.tensor([[*asked, *chat.encode(text + ending)]]))[0, -1]
        said = last[[chat.encode(word)[0] for word in words]].tolist()
        least = min(said[at] for at in wanted)
        assert least > max(said[at] for at in unwanted) + 5
        if ending == "\n":
            assert least == max(said)
            assert sorted(said)[-2] < least - 3


def test_more_names_than_there_is_room_for_are_told_apart_as_far_as_may_be(tmp_path: Path) -> None:
    names = [f"Syndrome {number}" for number in range(200)]
    make_reader(tmp_path / "many", _notes(CASES[:4]), names, steps=0)
    decoder = load_decoder(tmp_path / "many", device="cpu")
    ids = [decoder.tokenizer.encode(name)[0] for name in names]
    codes = decoder.network.model.embed_tokens.weight[ids, reader.LISTING.start : reader.EVER]
    alike = codes @ codes.T - torch.eye(len(ids))
    assert torch.allclose(codes.norm(dim=1), torch.ones(len(ids)), atol=1e-5)
    assert float(alike.abs().max()) < 0.5


def _attend(layout: Any, _: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return tree_attention(q, k, v, layout)


def test_the_other_findings_are_asked_for_and_the_names_are_drawn() -> None:
    listed = list(conversations(_notes(CASES), NAMES, 400, 0))
    assert listed == list(conversations(_notes(CASES), NAMES, 400, 0))
    drawn = dict.fromkeys(NAMES, 0)
    for messages, answer in listed:
        asked = messages[0]["content"]
        lines = [line.partition(". ")[2] for line in answer.splitlines()[1:]]
        assert len(set(lines)) == len(lines) > 0
        if answer.startswith("FINDINGS:"):
            note = asked.partition("\n")[0]
            assert all(
                f" {line}" not in note.replace("Short stature, severe", "") for line in lines if line in WORDS[:4]
            )
        else:
            assert {entry.label for entry in parse_answer(answer, LabelSet(NAMES))} == set(lines)
            drawn[lines[0]] += 1
    assert min(drawn.values()) > 20


def test_a_written_note_is_read_as_it_is() -> None:
    (read,) = _notes([replace(CASES[3], note="A boy with a long history.")])
    assert read.findings == ()
    assert read.record.note == "A boy with a long history."
    assert read.record.label is None
    ((messages, answer),) = conversations([read], NAMES, 1, 0)
    assert messages[0]["content"].startswith("A boy with a long history.\n\n")
    assert answer.startswith("POTENTIAL_DISEASES:")


def test_the_command_reads_the_training_part_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Read] = []
    monkeypatch.setattr(reader, "make_reader", lambda _, notes, *__: seen.extend(notes))
    rows = [{"id": c.id, "label": c.label, "terms": c.terms, "sex": c.sex, "group": c.group} for c in CASES]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["reader", str(tmp_path / "cases.jsonl"), "--draw-faces", "--min-cases", "2", "--out", str(tmp_path / "m")]
    monkeypatch.setattr(sys, "argv", words)
    reader.main()
    learnt, judged = sides(CASES)
    assert judged
    assert {read.record.id for read in seen} == {case.id for case in learnt}
    assert not any(in_validation(read.record.group or "") for read in seen)
    assert not any("Ptosis" in read.record.note or "Hypertelorism" in read.findings for read in seen)  # the photo's


def test_a_fold_s_naive_bayes_neither_lists_nor_rejects_a_class_it_has_no_case_of(tmp_path: Path) -> None:
    learnt = [Record(f"l{n}", label=NAMES[n % 2], terms=(WORDS[n % 2],)) for n in range(6)]
    (row,) = bayes(learnt, learnt[:1], NAMES, tmp_path)
    scores = row["scores"]
    assert min(scores.values()) < scores[NAMES[2]] < max(scores.values())
    assert scores[NAMES[2]] == pytest.approx((scores[NAMES[0]] + scores[NAMES[1]]) / 2)


def test_tuning_judges_by_diseases_that_are_left_to_learn_from(tmp_path: Path) -> None:
    lonely = [replace(_case(100 + n, "Lonely syndrome"), group="alone-12") for n in range(4)]
    rows = [{"id": c.id, "label": c.label, "terms": c.terms, "group": c.group} for c in (*CASES, *lonely)]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = file_task(tmp_path / "cases.jsonl", folder=tmp_path / "out", teacher="bayes", min_cases=2)
    assert task.for_tuning is not None
    tuning = task.for_tuning()
    known = {record.label for record in tuning.learnt(0, None)}
    assert {record.label for record in tuning.judged} <= known
    assert "Lonely syndrome" in task.classes
