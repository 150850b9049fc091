"""The shipped tissue models: official layout, opened by transformers with the same numbers, small, made again by a script."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints_mllama import oracle_inputs

from mint.builtin import tissue_pool, tissue_student, tissue_teacher
from mint.builtin.cases import TISSUE_STUDENT, TISSUE_TEACHER
from mint.builtin.nuclei import draw_tissue_cases
from mint.builtin.tissue_facts import tissues
from mint.builtin.tissue_pool import SIDE, TilePool
from mint.decoders import load_decoder
from mint.encoders import ClipEncoder, load_encoder
from mint.images import open_image
from mint.images.pixels import clip_pixels, mllama_pixels
from mint.images.rules import ClipSettings, MllamaSettings
from mint.prompts import prompt_messages
from mint.tokens import learn_clip_tokenizer
from mint.types import Record


def drawn(count: int = 3) -> list[Record]:
    return list(draw_tissue_cases(count, 3, "validation", SIDE))


def test_the_shipped_folders_are_small() -> None:
    files = [path for folder in (TISSUE_STUDENT, TISSUE_TEACHER) for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 6e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}  # what the wheel takes along


def test_transformers_opens_the_teacher_and_gives_the_same_scores() -> None:
    from transformers import CLIPModel, CLIPProcessor

    records, ours = drawn(), load_encoder(TISSUE_TEACHER, classes=tissues(), templates=["a slide of {}."], device="cpu")
    theirs = CLIPModel.from_pretrained(TISSUE_TEACHER, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(TISSUE_TEACHER)
    sentences = [f"a slide of {name.replace('_', ' ')}." for name in tissues()]
    given = processor(text=sentences, images=[open_image(r.image) for r in records], return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted = theirs(**given).logits_per_image
    assert isinstance(ours, ClipEncoder)
    torch.testing.assert_close(ours.scores(records), wanted, atol=2e-3, rtol=1e-4)


def test_transformers_opens_the_student_and_gives_the_same_logits() -> None:
    from transformers import MllamaForConditionalGeneration, MllamaImageProcessor

    theirs = MllamaForConditionalGeneration.from_pretrained(TISSUE_STUDENT, dtype=torch.float32).eval()
    ours = load_decoder(TISSUE_STUDENT, device="cpu", dtype="float32")
    (record,) = drawn(1)
    picture, token = open_image(record.image), ours.network.config.image_token
    ids = ours.tokenizer.chat_ids(prompt_messages(record, "image", kind="tissue", k=5), generate=True)
    given = oracle_inputs(ids, [picture], token, SIDE)  # for four tiles; this tower has one
    shown = MllamaImageProcessor.from_pretrained(TISSUE_STUDENT)(picture, return_tensors="pt")
    given |= {name: shown[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    given["cross_attention_mask"] = given["cross_attention_mask"][..., :1]
    with torch.no_grad():
        wanted = theirs(**given).logits
    torch.testing.assert_close(ours.logits([ids], [[picture]]), wanted, atol=2e-4, rtol=1e-4)


def test_its_chat_template_says_what_our_tokenizer_says() -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(TISSUE_STUDENT), load_decoder(TISSUE_STUDENT, device="meta").tokenizer
    messages = prompt_messages(drawn(1)[0], "image", kind="tissue", k=5)
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.chat_ids(messages, generate=True) == list(wanted)


def test_the_pool_shows_what_both_networks_would_see_but_for_the_light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tissue_pool, "_LIGHT", 0.0)
    monkeypatch.setattr(tissue_pool, "_turned", lambda tile, _: tile)
    pool = TilePool(4, 11)
    seen, pictures = pool.seen(torch.arange(4)), [record.image for record in pool.records]
    one = mllama_pixels([[picture] for picture in pictures], MllamaSettings(SIDE, 1)).pixels[:, 0, 0]
    for other in (clip_pixels(pictures, ClipSettings(SIDE, (SIDE, SIDE))), one):
        torch.testing.assert_close(seen, other, atol=1e-4, rtol=1e-4)


def test_a_tile_is_turned_in_eight_different_ways() -> None:
    tile = torch.arange(12.0).view(3, 2, 2)
    assert len({tuple(tissue_pool._turned(tile, way).flatten().tolist()) for way in range(8)}) == 8


def test_a_sentence_alone_fits_every_tile_of_its_tissue_and_a_description_its_own() -> None:
    records = [Record(str(number), label=label) for number, label in enumerate(("Colon", "Liver", "Colon"))]
    fits = tissue_teacher.fitting(records, [True, True, False])
    assert fits.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]


def test_captions_name_the_tissue_or_describe_the_tile_or_both() -> None:
    record, rng = drawn(1)[0], np.random.default_rng(0)
    captions = {tissue_teacher.caption(record, rng) for _ in range(60)}
    sentences = {tissue_teacher.sentence(str(record.label), number) for number in range(4)}
    assert {words for words, general in captions if general} == sentences
    assert {words for words, general in captions if not general} == {
        record.note,
        *(f"{words} {record.note}" for words in sentences),
    }


def test_the_writer_of_the_base_s_lists_is_better_than_chance_and_far_from_right() -> None:
    records = list(draw_tissue_cases(400, 6, "validation"))
    first = np.mean([tissue_student.partly_known(record, sway=0.0)[0] == record.label for record in records])
    assert 0.3 < first < 0.6  # chance is 1 in 19
    lists = [tissue_student.partly_known(record) for record in records]
    assert all(len(set(listed)) == tissue_student.LISTED and set(listed) <= set(tissues()) for listed in lists)
    assert lists == [tissue_student.partly_known(record) for record in records]


def test_a_base_that_describes_a_tile_is_not_told_its_tissue() -> None:
    for record in drawn(8):
        messages, answer = tissue_student.conversation(record, describing=True)
        said = f"{messages} {answer}".replace("_", " ")
        assert not any(name.replace("_", " ") in said for name in tissues())


def test_clip_s_tokenizer_writes_any_text_and_ends_it() -> None:
    texts = ["an H&E image of colon tissue.", "small dark nuclei, many glands"] * 3
    tokenizer = learn_clip_tokenizer(texts, 560)
    assert tokenizer.get_vocab_size() <= 560
    for text in ("small dark colon", "naïve — 12"):
        ids = tokenizer.encode(text).ids
        assert ids[0] == tokenizer.token_to_id("<|startoftext|>")
        assert ids[-1] == tokenizer.token_to_id("<|endoftext|>")
        assert tokenizer.decode(ids).replace("</w>", "").replace(" ", "") == text.replace(" ", "")
    assert tokenizer.to_str() == learn_clip_tokenizer(texts, 560).to_str()


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_making_a_model_twice_gives_the_same_bytes(which: str, tmp_path: Path) -> None:
    make, shipped = {
        "student": (tissue_student.make_tissue_student, TISSUE_STUDENT),
        "teacher": (tissue_teacher.make_tissue_teacher, TISSUE_TEACHER),
    }[which]
    for name in ("one", "two"):
        make(tmp_path / name, steps=2, tiles=64)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    assert files == sorted(path.name for path in shipped.iterdir())
