"""Closed sets of names: spellings, aliases, files of every form, and what is refused by file and line."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint.errors import MintError, RecordError
from mint.labels import LabelSet, letters, read_labels, spelling

NAMES = ("Kabuki syndrome", "Sjögren-Larsson syndrome", "Noonan syndrome 1", "Bile-duct", "HeadNeck")
KNOWN = LabelSet(NAMES, {"Niikawa-Kuroki syndrome": "Kabuki syndrome", "NS1": "Noonan syndrome 1"})


@pytest.mark.parametrize(
    ("written", "label"),
    [
        ("Kabuki syndrome", "Kabuki syndrome"),
        ("  KABUKI   Syndrome. ", "Kabuki syndrome"),
        ("'kabuki syndrome'", "Kabuki syndrome"),
        ("\u201cKabuki syndrome\u201d;", "Kabuki syndrome"),
        ("**Kabuki syndrome**", "Kabuki syndrome"),
        ("Sjo\u0308gren\u2013Larsson syndrome", "Sjögren-Larsson syndrome"),
        ("Sjogren Larsson syndrome", "Sjögren-Larsson syndrome"),
        ("niikawa kuroki syndrome", "Kabuki syndrome"),
        ("ns1", "Noonan syndrome 1"),
        ("Bile duct", "Bile-duct"),
        ("Bile_duct", "Bile-duct"),
        ("\uff2e\uff33\uff11", "Noonan syndrome 1"),
        ("Noonan syndrome 2", None),
        ("Noonan syndrome", None),
        ("Kabuki", None),
        ("", None),
        ("...", None),
    ],
)
def test_a_name_is_found_under_its_spellings_and_no_other(written: str, label: str | None) -> None:
    assert KNOWN.find(written) == label


def test_names_that_differ_in_signs_only_are_kept_apart() -> None:
    blood = LabelSet(["Rh+ type", "Rh- type"])
    assert blood.find("rh+ type") == "Rh+ type"
    assert blood.find("RH- TYPE") == "Rh- type"
    assert blood.find("Rh type") is None


def test_similar_names_count_only_on_request() -> None:
    assert KNOWN.find("Kabukii syndrom") is None
    assert KNOWN.find("Kabukii syndrom", similarity=0.8) == "Kabuki syndrome"
    assert KNOWN.find("Turner", similarity=0.8) is None


def test_names_inside_running_text_are_found_in_order_and_the_longest_wins() -> None:
    known = LabelSet(["Noonan syndrome", "Noonan syndrome 1", "Kabuki syndrome"])
    text = "This is Noonan syndrome 1, less likely Kabuki-Syndrome; or plain Noonan syndrome."
    assert known.within(text) == ["Noonan syndrome 1", "Kabuki syndrome", "Noonan syndrome"]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_a_spelling_is_its_own_spelling_and_so_are_letters(text: str) -> None:
    assert letters(letters(text)) == letters(text)
    assert spelling(text).strip() == spelling(text)


def test_sets_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(RecordError, match="no labels"):
        LabelSet([])
    with pytest.raises(RecordError, match="twice"):
        LabelSet(["Kabuki", "kabuki "])
    with pytest.raises(RecordError, match="no label of the set"):
        LabelSet(["Kabuki"], {"NS": "Noonan"})
    with pytest.raises(RecordError, match="names another label too"):
        LabelSet(["Kabuki", "Noonan"], {"noonan": "Kabuki"})
    with pytest.raises(RecordError, match="is empty"):
        LabelSet(["Kabuki"], {"--": "Kabuki", " . ": "Kabuki"})


FORMS = {
    "plain.txt": "Kabuki syndrome\tNiikawa-Kuroki\nNoonan syndrome, type 1\n\n",
    "bom.txt": "\ufeffKabuki syndrome\tNiikawa-Kuroki\r\nNoonan syndrome, type 1\r\n",
    "table.csv": 'label,omim,aliases\nKabuki syndrome,147920,Niikawa-Kuroki\n"Noonan syndrome, type 1",163950,\n',
    "table.tsv": "Name\taliases\nKabuki syndrome\tNiikawa-Kuroki|KS\nNoonan syndrome, type 1\t\n",
    "semicolons.csv": "label;aliases\nKabuki syndrome;Niikawa-Kuroki\nNoonan syndrome, type 1;\n",
    "list.json": '[{"label": "Kabuki syndrome", "aliases": ["Niikawa-Kuroki"]}, "Noonan syndrome, type 1"]',
    "object.json": '{"Kabuki syndrome": ["Niikawa-Kuroki"], "Noonan syndrome, type 1": []}',
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_file_gives_the_same_labels_and_aliases(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMS[name].encode())
    known = read_labels(tmp_path / name)
    assert known.labels == ("Kabuki syndrome", "Noonan syndrome, type 1")
    assert known.find("NIIKAWA-KUROKI") == "Kabuki syndrome"


def test_a_dictionary_of_numbered_classes_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "disease_dict.json"
    path.write_text(json.dumps({"1": "Noonan", "10": "L", "0": "Kabuki", **{str(i): f"C{i}" for i in range(2, 10)}}))
    assert read_labels(path).labels == ("Kabuki", "Noonan", *(f"C{i}" for i in range(2, 10)), "L")
    path.write_text('{"0": "Kabuki", "2": "Noonan"}')
    with pytest.raises(RecordError, match="must be 0 to 1"):
        read_labels(path)


def test_one_label_and_labels_that_begin_alike_are_fine(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("Kabuki syndrome\n")
    assert read_labels(tmp_path / "one.txt").labels == ("Kabuki syndrome",)
    (tmp_path / "two.txt").write_text("Noonan syndrome\nNoonan syndrome 1\n")
    assert len(read_labels(tmp_path / "two.txt")) == 2


BAD = {
    "empty": (b"", "empty"),
    "blank": (b"\n \n", "empty"),
    "gap": (b"Kabuki\n\nNoonan\n", r"labels:2: an empty line"),
    "duplicate": (b"Kabuki\nNoonan\nKABUKI\n", r"labels:3: .*already \(.*labels:1\)"),
    "two forms of one name": ("Sj\u00f6gren\nSjo\u0308gren\n".encode(), r"labels:2: .*already"),
    "special": (b"Kabuki<|eot_id|>\nNoonan\n", r"labels:1: .*special token <\|eot_id\|>"),
    "not text": (b"Kabuki\n\xff\xfe\n", r"labels:2: not UTF-8"),
    "control": (b"Kabuki\n\x00\n", r"labels:2: .*"),
    "long": (b"x" * 2000, r"labels:1: .*2,000 characters"),
    "newline in json": (b'["Kabuki\\nNoonan"]', r"entry 0: .*line break"),
    "newline in table": (b'label\n"Kabuki\nNoonan"\n', r"line break"),
    "broken json": (b'["Kabuki"', r"labels:1"),
    "wrong json": (b"[1]", r"entry 0: wanted a name"),
    "surrogate": (b'["\\ud800x"]', r"half of a surrogate pair"),
    "open quote": (b'label\n"Kabuki\nNoonan\n', r"quote that never closes"),
    "ragged": (b"label,aliases\nKabuki\n", r"labels:2: 1 cells"),
    "alias of two": (b"Kabuki\tKS\nNoonan\tKS\n", r"labels:2: the alias 'KS'.*labels:1"),
    "digits": (b"[" + b"9" * 5000 + b"]", r"not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_label_files_are_refused_by_file_and_line(tmp_path: Path, name: str) -> None:
    content, words = BAD[name]
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=words):
        read_labels(path)


def test_a_missing_file_a_folder_and_an_impossible_name_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path, "a\x00b", "\ud800"):
        with pytest.raises(RecordError):
            read_labels(path)


def test_a_large_set_is_read_in_bounded_time_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("".join(f"Disorder of kind {i}\n" for i in range(20_000)))
    tracemalloc.start()
    begin = time.perf_counter()
    known = read_labels(path)
    seconds, (_, peak) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(known) == 20_000
    assert known.find("disorder of kind 19999") == "Disorder of kind 19999"
    assert peak < 16 << 20
    assert seconds < 20


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_only_named_errors_come_out_of_mutated_label_files(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(FORMS[data.draw(st.sampled_from(sorted(FORMS)))].encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        content = content or bytearray(b"x")
    path = tmp_path_factory.getbasetemp() / "mutated.labels"
    path.write_bytes(content)
    message = str(path)
    try:
        known = read_labels(path)
    except MintError as error:
        message = str(error)
    else:
        assert all(known.find(label) == label for label in known)
    assert str(path) in message
