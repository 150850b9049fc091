"""Real cases and tiles, where they lie (environment variable MINT_REAL)."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from mint.records import read_records, split_records

REAL = Path(os.environ.get("MINT_REAL", Path(__file__).parents[1] / ".." / "shared" / "real"))
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL}")


def test_all_cases_become_records_with_findings_kept_apart():
    records = {record.id: record for record in read_records(REAL / "cases_open.jsonl.gz")}
    with gzip.open(REAL / "cases_open.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    assert len(records) == len(rows) == 5397
    for row in rows:
        record = records[row["id"]]
        assert record.label == row["disease"]["label"].strip()
        assert set(record.terms) == {term["label"] for term in row["hpo"] if not term["excluded"]}
        assert set(record.excluded) == {term["label"] for term in row["hpo"] if term["excluded"]}
        assert (record.age, record.group) == (row["age"], row["pmid"])
        assert record.sex == (None if row["sex"] == "unknown" else row["sex"])
        assert all(term in record.note for term in record.terms)


def test_a_folder_with_the_cases_among_other_tables_is_read_as_the_cases():
    assert sum(1 for _ in read_records(REAL)) == 5397


def test_no_publication_is_on_both_sides_of_a_split():
    sides = split_records(read_records(REAL / "cases_open.jsonl.gz"))
    groups = {name: {record.group for record in side} for name, side in sides.items()}
    assert sum(map(len, sides.values())) == 5397
    assert sum(map(len, groups.values())) == len(set().union(*groups.values()))
    assert all(len(side) > 300 for side in sides.values())


def test_tiles_are_read_as_class_folders_and_by_their_manifest():
    classes = Counter(record.label for record in read_records(REAL / "images" / "lc25000"))
    assert classes == dict.fromkeys(("colon_aca", "colon_n", "lung_aca", "lung_n", "lung_scc"), 20)
    assert {record.label for record in read_records(REAL / "images" / "nct_crc")} == {None}
    columns = {"id": "file", "image": "file", "label": "tissue"}
    records = list(read_records(REAL / "images" / "manifest.csv", columns=columns))
    assert len(records) == sum(1 for _ in read_records(REAL / "images")) == 225
    assert all(Path(record.image).is_file() for record in records)
