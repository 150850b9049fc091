"""Broken and hostile files: only MINT's own errors come out, in bounded memory."""

import contextlib
import gzip
import io
import json
import os
import random
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mint.errors import MintError, RecordError
from mint.records import read_records
from mint.types import Record

MUTATIONS = int(os.environ.get("MINT_FUZZ", "300"))
FUZZ = settings(
    max_examples=MUTATIONS,
    deadline=None,
    derandomize="MINT_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
CASE = {"id": "a", "note": 'x, "y"', "terms": ["Ptosis"], "age": 3.5, "image": "a/b.png", "label": "L"}
PACKET = {
    "id": "p",
    "subject": {"sex": "MALE", "timeAtLastEncounter": {"age": {"iso8601duration": "P3Y"}}},
    "phenotypicFeatures": [{"type": {"id": "HP:0000316", "label": "Hypertelorism"}, "excluded": True}],
    "interpretations": [{"diagnosis": {"disease": {"id": "OMIM:1", "label": "A"}}}],
    "metaData": {"externalReferences": [{"id": "PMID:1"}]},
}


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.json", json.dumps(PACKET))
        archive.writestr("b.json", json.dumps({**PACKET, "id": "q"}))
    return file.getvalue()


def array(value: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


LINES = "".join(json.dumps({**CASE, "id": f"{number}"}) + "\n" for number in range(4)).encode()
SEEDS = {
    "lines": LINES,
    "gzip": gzip.compress(LINES, mtime=0),
    "document": json.dumps([CASE, PACKET], indent=1).encode(),
    "packet": json.dumps(PACKET).encode(),
    "csv": b'id,note,terms,image\na,"x, ""y""",p;q,a.png\nb,"two\nlines",,\nc,z,,b/c.png\n',
    "tsv": b"\xef\xbb\xbfid\tnote\tage\na\tx\t3\nb\ty\tP3Y\n",
    "gmdb": b"image_id\tpatient_id\tpresent_features\tage_year\tage_month\n1\t1\tHP:1;HP:2\t3.0\t6.0\n2\t1\t\t\t\n",
    "gestaltmml": b",image_id,filename,texts\n0,1,1.jpg,Sex male Age 3 years 6 months Ethnicity European Ptosis\n",
    "zip": zipped(),
    "types": array(np.array(["Breast", "Colon"])),
    "images": array(np.zeros((2, 2, 2, 3), np.uint8)),
}
NASTY = [
    b'"',
    b"\x00",
    b"\xff\xfe",
    b"{",
    b"[" * 50,
    b"\\ud800",
    b"NaN",
    b"-1",
    b"99999999999",
    b"'|O'",
    b"..",
    b"\r",
    b"\n",
]


def mutated(seed: bytes, dice: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(dice.randint(1, 4)):
        place = dice.randrange(len(data) + 1)
        match dice.randrange(5):
            case 0:
                data[place : place + 1] = bytes([dice.randrange(256)])
            case 1:
                del data[place : place + dice.randint(1, 20)]
            case 2:
                data[place:place] = dice.choice(NASTY)
            case 3:
                data[place:place] = data[: dice.randint(1, 40)]
            case 4:
                del data[place:]
    return bytes(data)


def records_in(folder: Path, kind: str, data: bytes) -> int:
    """How many records `data` gives with bad rows left out; any error but MINT's own goes through."""
    name = {"types": "types.npy", "images": "images.npy"}.get(kind, "cases")
    if name.endswith(".npy"):
        (folder / "types.npy").write_bytes(SEEDS["types"])
        (folder / "images.npy").write_bytes(SEEDS["images"])
    (folder / name).write_bytes(data)
    count = 0
    skipped: list[str] = []
    with contextlib.suppress(MintError):
        for record in read_records(folder / name, skipped=skipped):
            count += 1
            assert isinstance(record, Record)
            assert record.image is None or os.path.normpath(record.image).startswith(str(folder))
            json.dumps([record.id, record.note, record.label, record.terms], ensure_ascii=False).encode()
    assert not any("\n" in message for message in skipped)
    return count


@pytest.mark.parametrize("kind", SEEDS)
def test_mutated_files_raise_nothing_but_our_own_errors(tmp_path, kind):
    whole = records_in(tmp_path, kind, SEEDS[kind])
    assert whole >= 1
    dice = random.Random(kind)
    counts = {records_in(tmp_path, kind, mutated(SEEDS[kind], dice)) for _ in range(MUTATIONS)}
    assert min(counts) < whole


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["id", "subject", "sex", "age", "type", "label", "excluded", "diagnosis", "disease", "onset", "term", "start"]
    ), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
NAMES = [*CASE, *PACKET, "hpo", "disease", "diseases", "labels", "excluded", "pmid", "sex"]


@FUZZ
@given(rows=st.lists(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6), max_size=3))
def test_any_json_of_our_names_raises_nothing_but_our_own_errors(tmp_path, rows):
    records_in(tmp_path, "lines", "".join(json.dumps(row) + "\n" for row in rows).encode())


@FUZZ
@given(body=st.text(alphabet='ab",;\n\r\t\x00é\ud800 ', max_size=60), header=st.sampled_from(["id,note", "id;terms"]))
def test_any_text_below_a_header_raises_nothing_but_our_own_errors(tmp_path, body, header):
    records_in(tmp_path, "csv", f"{header}\n{body}".encode("utf-8", "surrogatepass"))


def peak_of(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["cases.jsonl", "cases.csv"])
def test_a_line_of_two_gigabytes_is_refused_after_a_bounded_read(tmp_path, name):
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(b'{"id": "a", "note": "x"}\n' if name.endswith("l") else b"id,note\na,x\n")
        file.write(b" " * 100_000)  # blanks, then holes on the disk
        file.truncate(2 << 30)
    skipped: list[str] = []
    peak = peak_of(
        lambda: [record.id for record in read_records(path, skipped=skipped)] == ["a"] or pytest.fail("lost")
    )
    assert "a line of more than 16,777,216 bytes" in skipped[0]
    assert len(skipped) == 1
    assert peak < 100 << 20


def test_a_gzipped_bomb_takes_bounded_memory(tmp_path):
    path = tmp_path / "cases.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"id": "' + b"x" * (64 << 20)))
    assert path.stat().st_size < 100_000
    skipped: list[str] = []
    peak = peak_of(lambda: list(read_records(path, skipped=skipped)))
    assert "a line of more than" in skipped[0]
    assert peak < 100 << 20


def test_a_json_document_that_is_too_large_is_refused_after_a_bounded_read(tmp_path):
    path = tmp_path / "cases.json"
    with path.open("wb") as file:
        file.write(b"[\n" + b" " * (33 << 20))
        file.truncate(1 << 30)
    skipped: list[str] = []
    peak = peak_of(lambda: list(read_records(path, skipped=skipped)))
    assert "write one JSON object a line" in skipped[0]
    assert peak < 150 << 20


def test_a_file_that_breaks_off_gives_what_is_whole_and_names_the_end(tmp_path):
    path = tmp_path / "cases.jsonl.gz"
    rows = "".join(f'{{"id": "{number}", "note": "{random.Random(number).random()}"}}\n' for number in range(20_000))
    path.write_bytes(gzip.compress(rows.encode())[:-2000])
    skipped: list[str] = []
    kept = list(read_records(path, skipped=skipped))
    assert 15_000 < len(kept) < 20_000
    assert len(skipped) == 1
    assert f"{path}:{len(kept) + 1}: the file breaks off" in skipped[0]


def test_a_binary_file_is_refused(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_bytes(b"\x7fELF\x00\x01\x02")
    with pytest.raises(RecordError, match="neither text, zip nor picture"):
        list(read_records(path))


def test_a_file_that_vanishes_from_a_folder_is_named(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps({**PACKET, "id": name}))
    skipped: list[str] = []
    records = read_records(tmp_path, skipped=skipped)
    assert next(records).id == "a"
    (tmp_path / "b.json").unlink()
    assert list(records) == []
    assert f"{tmp_path / 'b.json'}: cannot be opened" in skipped[0]


def test_a_file_that_grows_while_it_is_read_gives_whole_rows(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text('{"id": "0", "note": "x"}\n')
    seen = []
    for record in read_records(path):
        seen.append(record.id)
        if len(seen) < 3:
            with path.open("a") as file:
                file.write(f'{{"id": "{len(seen)}", "note": "x"}}\n')
    assert seen == ["0", "1", "2"]


def test_no_file_stays_open_when_reading_stops_early(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_bytes(LINES)
    before = len(os.listdir("/proc/self/fd"))
    records = read_records(path)
    next(records)
    records.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_grows_by_a_hash_for_each_record_and_no_more(tmp_path):
    path = tmp_path / "cases.jsonl"
    with path.open("w") as file:
        for number in range(30_000):
            file.write(f'{{"id": "{number}", "note": "{"x" * 300}"}}\n')
    peak = peak_of(lambda: sum(1 for _ in read_records(path)))
    assert path.stat().st_size > 9_000_000
    assert peak < 5_000_000
