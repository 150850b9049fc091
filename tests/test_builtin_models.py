"""The shipped models: official layout, opened by transformers with the same numbers, small, and made again by a script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mint.builtin import student, teacher
from mint.builtin.cases import STUDENT, TEACHER
from mint.builtin.rare_disease import ceiling, classes, draw_cases, draw_patients, population, recall
from mint.chat import chat_tokenizer
from mint.decoders import load_decoder
from mint.encoders import FusionEncoder, load_encoder
from mint.prompts import prompt_messages
from mint.tokens import CHAT_SPECIAL, learn_chat_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def test_the_shipped_folders_are_small() -> None:
    files = [path for folder in (STUDENT, TEACHER) for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}  # what the wheel takes along


def test_transformers_opens_the_student_and_gives_the_same_logits() -> None:
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    ours = load_decoder(STUDENT, device="cpu", dtype="float32")
    (record,) = draw_cases(1, 3, "validation")
    ids = [ours.tokenizer.chat_ids(prompt_messages(record), generate=True)]
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).logits
    torch.testing.assert_close(ours.logits(ids), wanted, atol=2e-4, rtol=1e-4)


def test_its_chat_template_says_what_our_tokenizer_says() -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(STUDENT), load_decoder(STUDENT, device="meta").tokenizer
    turns = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Short stature; deafness. "}]
    for messages in (turns, turns[1:]):
        wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.chat_ids(messages, generate=True) == list(wanted)


def test_the_prompt_is_the_same_on_every_day() -> None:
    config = load_decoder(STUDENT, device="meta").checkpoint.config
    assert chat_tokenizer(STUDENT, config).date == "26 Jul 2024"


def test_transformers_opens_the_teacher_and_gives_the_same_scores() -> None:
    from transformers import ViltForQuestionAnswering

    ours = load_encoder(TEACHER, device="cpu")
    assert isinstance(ours, FusionEncoder)
    assert ours.classes == classes()
    records = list(draw_cases(3, 3, "validation", teacher.SIDE))
    ids, text_mask, pixels, pixel_mask = ours.inputs(records)
    theirs = ViltForQuestionAnswering.from_pretrained(TEACHER, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=text_mask, pixel_values=pixels, pixel_mask=pixel_mask).logits
    torch.testing.assert_close(ours.scores(records), wanted, atol=2e-4, rtol=1e-4)


def test_the_writer_of_the_base_s_texts_knows_three_quarters_of_the_findings_and_nothing_false() -> None:
    known, whole = student.known_table(), population()
    names = {term: whole.present[:, column] for term, column in whole.column.items()}
    listed = sum(int((share > whole.rates.body_background).sum()) for share in names.values())
    told = 0
    for term, column in known.column.items():
        here = known.present[:, column]
        told += int((here > whole.rates.body_background).sum())
        assert np.all((here == names[term]) | (here == whole.rates.body_background))
    assert 0.65 < told / listed < 0.85


def test_the_writer_thinks_first_of_familiar_diseases() -> None:
    first = [student.partly_known(patient)[0] for patient in draw_patients(200, 12)]
    familiar = {name for name, known in zip(classes(), student.fame(), strict=True) if known > 0}
    assert sum(name in familiar for name in first) > 0.75 * len(first)


def test_a_base_of_any_size_ranks_as_the_writer_does_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(draw_cases(100, 4, "validation", teacher.SIDE))
    found = student.reading_learnt_whole(cases)
    noisy = [case.label in student.partly_known(recall(case.id)) for case in cases]
    monkeypatch.setattr(student, "SWAY", 0.0)
    sure = [student.partly_known(recall(case.id)) for case in cases]
    assert found[1] == np.mean([case.label == listed[0] for case, listed in zip(cases, sure, strict=True)])
    assert found[10] == np.mean([case.label in listed for case, listed in zip(cases, sure, strict=True)])
    assert found[10] > np.mean(noisy)
    assert found[1] < ceiling(cases, "note", (1,))[1]


def test_a_finding_and_a_name_are_one_token_for_the_student() -> None:
    chat = load_decoder(STUDENT, device="meta").tokenizer
    for text in (" failure to thrive", " Webbed neck", "Kabuki syndrome 1", "POTENTIAL_DISEASES:", "10. ", "\n"):
        assert len(chat.tokenizer.encode(text, add_special_tokens=False).ids) == 1, text
    said = "1. Kabuki syndrome 1\n10. no failure to thrive, na\u00efve"
    assert chat.decode(chat.tokenizer.encode(said, add_special_tokens=False).ids) == said


def test_conversations_repeat_and_list_ten_different_diseases() -> None:
    once, again = (list(student.conversations(4, 11)) for _ in range(2))
    assert once == again
    for patient in draw_patients(5, 11):
        listed = student.partly_known(patient)
        assert len(set(listed)) == 10
        assert set(listed) <= set(classes())


def test_the_learnt_tokenizer_writes_any_text_and_keeps_its_special_tokens_last() -> None:
    texts = ["Short stature; short neck.", "short stature and a short neck"] * 3
    tokenizer = learn_chat_tokenizer(texts, 300)
    for text in ("short stature", "naïve — 身長\n\n1. x"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
    ids = [tokenizer.token_to_id(name) for name in CHAT_SPECIAL]
    assert ids == list(range(tokenizer.get_vocab_size() - len(ids), tokenizer.get_vocab_size()))
    assert tokenizer.to_str() == learn_chat_tokenizer(texts, 300).to_str()


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_making_a_model_twice_gives_the_same_bytes(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "SAMPLE", 60)
    monkeypatch.setattr(teacher, "TOLD", 60)
    make = {
        "student": lambda out: student.make_student(out, rounds=((1, 8, 1), (3, 4, 1)), told=60),
        "teacher": lambda out: teacher.make_teacher(out, steps=2, photos=400),
    }[which]
    for name in ("one", "two"):
        make(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "model.safetensors" in files
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    assert files == sorted(path.name for path in {"student": STUDENT, "teacher": TEACHER}[which].iterdir())


def test_the_command_that_makes_them_has_help() -> None:
    words = [sys.executable, "-m", "mint.builtin.making", "--help"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "student" in said
    assert "teacher" in said
