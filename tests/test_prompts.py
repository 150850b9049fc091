"""The words of a conversation: what each modality shows, templates, and that nothing else leaks in."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mint.errors import ConfigError, RecordError
from mint.prompts import MODALITIES, default_template, prompt_messages, read_template
from mint.types import Record

RECORD = Record(
    id="p1", note="A girl of 3 years with long palpebral fissures.", image="p1.png", label="Kabuki syndrome"
)


def test_a_note_is_one_turn_of_the_user_with_the_note_and_the_number_asked_for() -> None:
    (message,) = prompt_messages(RECORD, "note", k=7)
    assert message["role"] == "user"
    assert message["content"].startswith(RECORD.note)
    assert "7" in message["content"]
    assert "POTENTIAL_DISEASES:" in message["content"]
    assert "Kabuki" not in message["content"]


def test_an_image_stands_before_its_words_as_the_vision_models_have_it() -> None:
    (message,) = prompt_messages(RECORD, "image", kind="tissue", k=5)
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    assert message["content"][0] == {"type": "image"}
    assert "POTENTIAL_TISSUES:" in message["content"][1]["text"]
    (both,) = prompt_messages(RECORD, "both")
    assert both["content"][0] == {"type": "image"}
    assert RECORD.note in both["content"][1]["text"]


def test_an_image_alone_shows_no_word_of_the_note_nor_of_the_photo_s_metadata(tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x010E] = "metadatasecret"
    Image.new("RGB", (8, 8)).save(photo, exif=exif, comment=b"commentsecret")
    assert b"metadatasecret" in photo.read_bytes()
    record = Record(
        id="idsecret", note="notesecret", image=str(photo), label="labelsecret", terms=("termsecret",), sex="sexsecret"
    )
    for kind in ("disease", "tissue"):
        assert "secret" not in str(prompt_messages(record, "image", kind=kind))
        assert "secret" not in str(prompt_messages(record, "note", kind=kind)).replace("notesecret", "")
        assert "photo" not in str(prompt_messages(record, "note", kind=kind))


def test_braces_and_places_in_a_note_are_only_text() -> None:
    record = Record(id="p", note="{k} {note} {labels} {0} {evil.__class__} {{}} % $x \\1")
    (message,) = prompt_messages(record, "note", k=3)
    assert message["content"].startswith(f"{record.note}\n\n")


def test_a_template_replaces_the_words(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text('\ufeffCase: {note}\nAnswer in JSON like {"a": [1, {}]} with {k} of {labels}.\n', encoding="utf-8")
    template = read_template(path)
    (message,) = prompt_messages(Record(id="p", note="short"), template=template, k=2, labels=["b", "a"])
    assert message["content"] == 'Case: short\nAnswer in JSON like {"a": [1, {}]} with 2 of a, b.'


def test_bad_templates_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("{note}\n{nota} {k}")
    with pytest.raises(ConfigError, match=r"mine.txt:2: the place \{nota\}"):
        read_template(path)
    path.write_bytes(b"\xff{note}")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_template(path)
    path.write_bytes(b"x" * (65 << 10))
    with pytest.raises(ConfigError, match="longer than"):
        read_template(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_template(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match=r"asks for \{note\}"):
        prompt_messages(RECORD, "image", template="{note} {k}")
    with pytest.raises(ConfigError, match=r"has no place \{note\}"):
        prompt_messages(RECORD, "note", template="Name {k}.")
    with pytest.raises(ConfigError, match=r"\{x\} is unknown"):
        prompt_messages(RECORD, "note", template="{note}{x}")


def test_a_case_without_what_is_to_be_shown_is_refused_by_id() -> None:
    with pytest.raises(RecordError, match="case 'p2': the note is empty"):
        prompt_messages(Record(id="p2", note=" \n"), "note")
    with pytest.raises(RecordError, match="case 'p2': has no image"):
        prompt_messages(Record(id="p2", note="x"), "image")
    with pytest.raises(RecordError, match="case 'p2': has no image"):
        prompt_messages(Record(id="p2", note="x"), "both")


def test_unknown_modalities_and_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="modality 'text'"):
        prompt_messages(RECORD, "text")
    with pytest.raises(ConfigError, match="kind 'gene'"):
        prompt_messages(RECORD, "note", kind="gene")
    with pytest.raises(ConfigError, match="modality 'text'"):
        prompt_messages(RECORD, "text", template="{note}")


def test_passages_stand_before_the_case_in_their_order() -> None:
    (message,) = prompt_messages(RECORD, passages=["first {note}", "second"])
    words = message["content"]
    assert words.index("[1] first {note}") < words.index("[2] second") < words.index(RECORD.note)


def test_every_default_names_its_places() -> None:
    for modality in MODALITIES:
        for kind in ("disease", "tissue"):
            words = default_template(modality, kind)
            assert "{k}" in words
            assert ("{note}" in words) == (modality != "image")
