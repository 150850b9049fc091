"""The door: MINT's own columns from JSON and CSV, bad rows by name, images inside their folder, splits."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from mint.errors import ConfigError, RecordError
from mint.records import SHARES, read_records, split_of, split_records
from mint.records.notes import compose_note
from mint.types import Record

FULL = {
    "id": "a",
    "note": "Long face.",
    "image": "faces/a.png",
    "label": "Sotos syndrome",
    "labels": ["Sotos syndrome", "Weaver syndrome"],
    "split": "train",
    "sex": "female",
    "age": "3 years",
    "ethnicity": "Asian",
    "terms": ["Macrocephaly", "Tall stature"],
    "excluded": ["Ptosis"],
    "group": "family 1",
    "remark": "columns that are not ours are left alone",
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def expected(folder: Path) -> Record:
    return Record(
        id="a",
        note="Long face.",
        image=str(folder / "faces/a.png"),
        label="Sotos syndrome",
        labels=("Sotos syndrome", "Weaver syndrome"),
        terms=("Macrocephaly", "Tall stature"),
        excluded=("Ptosis",),
        sex="female",
        age="3 years",
        ethnicity="Asian",
        split="train",
        group="family 1",
    )


def test_every_column_of_a_json_line_is_read(tmp_path):
    assert list(read_records(write(tmp_path / "cases.jsonl", FULL))) == [expected(tmp_path)]


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_column_of_a_table_is_read_whatever_delimiter_and_byte_order_mark(tmp_path, delimiter, bom, end):
    cells = {name: ";".join(value) if isinstance(value, list) else value for name, value in FULL.items()}
    rows = (delimiter.join(f'"{cell}"' for cell in line) for line in (cells, cells.values()))
    path = tmp_path / "cases.txt"
    path.write_text(bom + end.join(rows) + end, newline="")
    assert list(read_records(path)) == [expected(tmp_path)]


def test_a_gzipped_file_is_known_by_its_content(tmp_path):
    path = tmp_path / "cases"
    path.write_bytes(gzip.compress(json.dumps(FULL).encode() + b"\n" + b'{"id": "b", "label": "x"}'))
    assert [record.id for record in read_records(path)] == ["a", "b"]


def test_a_json_list_over_many_lines_is_read_item_by_item(tmp_path):
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([FULL, {"id": "b"}], indent=1))
    skipped: list[str] = []
    assert list(read_records(path, skipped=skipped)) == [expected(tmp_path)]
    assert skipped == [
        f"{path}: item 2: found ['id'], wanted id and one of {', '.join(sorted(FULL.keys() - NOT_CONTENT))}"
    ]


NOT_CONTENT = {"id", "split", "group", "remark"}


def test_numbers_serve_as_ids_and_ages_and_column_names_may_be_capital(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_text("ID,Age,Note\n7,3.5,\n")
    by_line = write(tmp_path / "cases.jsonl", {"id": 7, "age": 3.5})
    assert list(read_records(path)) == list(read_records(by_line))
    assert next(read_records(path)) == Record("7", note="Age 3 years 6 months", age="3.5")


def test_columns_of_other_names_are_read_where_they_are_named(tmp_path):
    columns = {"id": "File", "image": "File", "label": "Tissue"}
    path = tmp_path / "manifest.csv"
    path.write_text("File,Tissue,group\na/1.png,Colon,s1\n")
    wanted = Record("a/1.png", image=str(tmp_path / "a/1.png"), label="Colon", group="s1")
    assert list(read_records(path, columns=columns)) == [wanted]
    lines = write(tmp_path / "manifest.jsonl", {"File": "a/1.png", "Tissue": "Colon", "group": "s1"})
    assert list(read_records(lines, columns=columns)) == [wanted]
    with pytest.raises(ConfigError, match="'picture' is none of ours"):
        read_records(path, columns={"picture": "File"})


BAD_LINES = {
    "not an object": ("[1]", r":2: \[1\], an object with an id was wanted"),
    "broken": ('{"id": "b"', r":2: not JSON \(Expecting ',' delimiter at column 1"),
    "no id": ('{"note": "x"}', ":2: no id"),
    "an empty id": ('{"id": " ", "note": "x"}', ":2: no id"),
    "NaN": ('{"id": "b", "age": NaN}', "NaN is no JSON number"),
    "infinite": ('{"id": "b", "age": 1e999}', ":2: age is inf"),
    "true": ('{"id": true, "note": "x"}', ":2: id is True"),
    "an object as note": ('{"id": "b", "note": {}}', ":2: note is {}"),
    "a list of numbers of lists": ('{"id": "b", "terms": [[]]}', r":2: terms is \[\]"),
    "an object as terms": ('{"id": "b", "terms": {}}', ":2: terms is {}, a list of texts was wanted"),
    "half a character": ('{"id": "b", "note": "\\ud800"}', ":2: note holds half a character"),
    "a huge number": (f'{{"id": {"9" * 5000}}}', ":2: not JSON that can be read"),
    "deep nesting": ("[" * 100_000, ":2: not JSON that can be read"),
    "another file": ('{"id": "b", "prompt": "x"}', r":2: found \['id', 'prompt'\], wanted id and one of"),
    "an image outside": ('{"id": "b", "image": "../x.png"}', ":2: .*'../x.png' leads out of its folder"),
    "an image elsewhere": ('{"id": "b", "image": "/etc/passwd"}', ":2: image '/etc/passwd' leads out of"),
    "an image with a zero byte": ('{"id": "b", "image": "x\\u0000"}', ":2: .*leads out of its folder"),
    "the same id": ('{"id": "a", "note": "x"}', ":2: the id 'a' was there before"),
    "not UTF-8": (b'{"id": "b", "note": "\xff"}', r":2: not UTF-8 \(byte 22\)"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_refused_by_file_and_line_or_left_out_and_named(tmp_path, case):
    line, message = BAD_LINES[case]
    path = tmp_path / "cases.jsonl"
    raw = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"id": "a", "note": "x"}\n' + raw + b'\n{"id": "c", "note": "x"}\n')
    with pytest.raises(RecordError, match=message) as refused:
        list(read_records(path))
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    skipped: list[str] = []
    assert [record.id for record in read_records(path, skipped=skipped)] == ["a", "c"]
    assert skipped == [str(refused.value)]


def test_a_first_line_that_is_broken_costs_only_itself(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text('{"id": "a", \n{"id": "b", "note": "x"}\n')
    skipped: list[str] = []
    assert [record.id for record in read_records(path, skipped=skipped)] == ["b"]
    assert len(skipped) == 1
    assert f"{path}:1:" in skipped[0]


def test_a_missing_file_is_refused_at_once_and_an_empty_one_when_read(tmp_path):
    with pytest.raises(RecordError, match="no such file or folder"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(RecordError, match="no such file or folder"):
        read_records("zero\x00byte")
    for name, text in {"a.jsonl": "", "b.csv": "id,note\n", "c.json": "[]", "d.csv": "\n\n"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(RecordError, match=r"no records in it|an empty file"):
            list(read_records(tmp_path / name))


def test_an_absolute_image_inside_the_folder_is_read_and_the_folder_of_images_can_be_given(tmp_path):
    (tmp_path / "tables").mkdir()
    path = write(tmp_path / "tables" / "cases.jsonl", {"id": "a", "image": str(tmp_path / "photos" / "a.png")})
    with pytest.raises(RecordError, match="give the folder of the images"):
        list(read_records(path))
    assert next(read_records(path, images=tmp_path)).image == str(tmp_path / "photos" / "a.png")
    path = write(path, {"id": "a", "image": "a.png"})
    assert next(read_records(path, images=tmp_path / "photos")).image == str(tmp_path / "photos" / "a.png")


def test_a_relative_path_gives_relative_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "cases.jsonl", {"id": "a", "image": "images.npy#17"})
    assert next(read_records("cases.jsonl")).image == "images.npy#17"


def test_a_record_without_a_note_gets_one_from_the_function_given(tmp_path):
    path = write(tmp_path / "cases.jsonl", {"id": "a", "terms": ["Ptosis"]}, {"id": "b", "note": "kept", "sex": "male"})
    assert [record.note for record in read_records(path)] == ["Ptosis", "kept"]
    shouted = read_records(path, compose=lambda record: compose_note(record).upper())
    assert [record.note for record in shouted] == ["PTOSIS", "kept"]


@pytest.mark.parametrize(
    ("text", "sex"), [("M", "male"), ("Female", "female"), ("UNKNOWN_SEX", None), ("45,X", "45,X")]
)
def test_sex_is_spelt_in_one_way_and_unknown_is_none(tmp_path, text, sex):
    assert next(read_records(write(tmp_path / "cases.jsonl", {"id": "a", "sex": text}))).sex == sex


def test_reading_yields_before_it_has_seen_the_end(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text('{"id": "a", "note": "x"}\nbroken\n')
    records = read_records(path)
    assert next(records).id == "a"
    with pytest.raises(RecordError):
        next(records)


def test_a_folder_of_tables_is_read_with_the_splits_that_their_names_tell(tmp_path):
    write(tmp_path / "train.jsonl", {"id": "a", "note": "x"}, {"id": "b", "note": "x", "split": "other"})
    (tmp_path / "val.csv").write_text("id,note\nc,x\n")
    (tmp_path / "notes.csv").write_text("not,a,table,of,cases\n1,2,3,4,5\n")
    write(tmp_path / "more.jsonl", {"id": "d", "note": "x"})
    found = {record.id: record.split for record in read_records(tmp_path)}
    assert found == {"a": "train", "b": "other", "c": "validation", "d": None}


def test_an_id_in_two_tables_of_a_folder_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", {"id": "a", "note": "x"})
    write(tmp_path / "test.jsonl", {"id": "a", "note": "x"})
    with pytest.raises(RecordError, match=r"train.jsonl:1: the id 'a' was there before"):
        list(read_records(tmp_path))


def test_splits_are_stable_and_near_their_shares():
    records = [Record(f"case {number}") for number in range(5000)]
    counts = Counter(split_of(record) for record in records)
    assert {name: abs(counts[name] / 5000 - share) < 0.02 for name, share in SHARES.items()} == dict.fromkeys(
        SHARES, True
    )
    assert [split_of(Record(name)) for name in "abcdefghij"] == GOLDEN
    assert [split_of(Record(name), seed=1) for name in "abcdefghij"] != GOLDEN
    assert split_of(Record("a"), {"left": 0.0, "right": 1.0}) == "right"


GOLDEN = ["train"] * 9 + ["test"]


def test_a_record_keeps_its_side_when_others_come_or_go():
    records = [Record(f"case {number}", group=f"paper {number % 40}") for number in range(200)]
    few = split_records(records[::3])
    many = split_records(records)
    for name, side in few.items():
        assert set(side) <= set(many[name])
    assert sum(map(len, many.values())) == 200


def test_a_group_is_never_on_both_sides():
    records = [Record(f"case {number}", group=f"patient {number % 60}") for number in range(600)]
    sides = split_records(records, {"train": 0.5, "test": 0.5}, seed=3)
    groups = {name: {record.group for record in side} for name, side in sides.items()}
    assert groups["train"] & groups["test"] == set()
    assert groups["train"]
    assert groups["test"]


def test_the_split_column_wins_and_takes_its_group_along():
    records = [Record("a", group="p", split="Val"), Record("b", group="p"), Record("c", split="open")]
    sides = split_records(records)
    assert [record.id for record in sides["validation"]] == ["a", "b"]
    assert [record.id for record in sides["open"]] == ["c"]
    with pytest.raises(RecordError, match="group 'p': 'a' is in the split 'Val' and 'd' in 'test'"):
        split_records([*records, Record("d", group="p", split="test")])


@pytest.mark.parametrize("shares", [{"train": 0.8}, {"train": 1.5, "test": -0.5}, {}, {"train": float("nan")}])
def test_shares_that_do_not_add_up_are_refused(shares):
    with pytest.raises(ConfigError, match="1 was wanted"):
        split_of(Record("a"), shares)
