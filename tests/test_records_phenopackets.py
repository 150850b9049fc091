"""Phenopackets of both schemas, one, in folders and in zips, and the flat cases made from them."""

import copy
import json
import stat
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from mint.errors import RecordError
from mint.records import read_records
from mint.types import Record

PACKET = {
    "id": "PMID_1_patient_1",
    "subject": {"id": "p1", "timeAtLastEncounter": {"age": {"iso8601duration": "P3Y6M"}}, "sex": "MALE"},
    "phenotypicFeatures": [
        {"type": {"id": "HP:0000316", "label": "Hypertelorism"}, "onset": {"age": {"iso8601duration": "P1Y"}}},
        {"type": {"id": "HP:0000508", "label": "Ptosis"}, "excluded": True},
        {"type": {"id": "HP:0001250"}},
        {"type": {"id": "HP:0000316", "label": "Hypertelorism"}},
    ],
    "interpretations": [
        {"id": "x", "progressStatus": "SOLVED", "diagnosis": {"disease": {"id": "OMIM:1", "label": "Some syndrome"}}}
    ],
    "diseases": [{"term": {"id": "OMIM:2", "label": "Another"}, "onset": {"age": {"iso8601duration": "P2Y"}}}],
    "metaData": {"externalReferences": [{"id": "DOI:1"}, {"id": "PMID:12345", "reference": "…"}]},
}
WANTED = Record(
    "PMID_1_patient_1",
    note="Sex male Age 3 years 6 months Hypertelorism HP:0001250",
    label="Some syndrome",
    terms=("Hypertelorism", "HP:0001250"),
    excluded=("Ptosis",),
    sex="male",
    age="P3Y6M",
    group="PMID:12345",
)


def packet(**changes: object) -> dict:
    value = {**copy.deepcopy(PACKET), **changes}
    return {name: part for name, part in value.items() if part is not None}


def read(folder: Path, value: object, **options) -> list[Record]:
    path = folder / "packet.json"
    path.write_text(json.dumps(value, indent=2))
    return list(read_records(path, **options))


def test_a_phenopacket_is_read_and_excluded_findings_are_kept_apart(tmp_path):
    assert read(tmp_path, PACKET) == [WANTED]


def test_ids_without_a_label_are_named_by_the_hpo_table(tmp_path):
    hpo = tmp_path / "hpo.tsv"
    hpo.write_text("id\tlabel\nHP:0001250\tSeizure\nHP:0000316\tnot this: the packet has its own\n")
    assert read(tmp_path, PACKET, hpo=hpo)[0].terms == ("Hypertelorism", "Seizure")


@pytest.mark.parametrize("indent", [None, 2])
def test_a_folder_of_phenopackets_is_read_in_order_however_deep(tmp_path, indent):
    (tmp_path / "GENE").mkdir()
    (tmp_path / "GENE" / "b.json").write_text(json.dumps(packet(id="b"), indent=indent))
    (tmp_path / "a.json").write_text(json.dumps(packet(id=None), indent=indent))
    (tmp_path / "README.md").write_text("not read")
    assert [record.id for record in read_records(tmp_path)] == ["b", "a"]


def test_a_zip_of_phenopackets_is_read_and_hostile_members_are_named(tmp_path):
    path = tmp_path / "store.zip"
    linked = zipfile.ZipInfo("x/link.json")
    linked.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/a.json", json.dumps(packet(id="a")))
        archive.writestr("../out.json", json.dumps(packet(id="out")))
        archive.writestr("/root.json", json.dumps(packet(id="root")))
        archive.writestr(linked, "/etc/passwd")
        archive.writestr("bomb.json", b" " * (17 << 20))
        archive.writestr("broken.json", "{")
        archive.writestr("__MACOSX/x/._a.json", "shadow")
        archive.writestr("readme.txt", "not read")
        archive.writestr("x/b.json", json.dumps(packet(id="b")))
    assert path.stat().st_size < 100_000
    skipped: list[str] = []
    assert [record.id for record in read_records(path, skipped=skipped)] == ["a", "b"]
    reasons = ["leads out of its folder", "leads out of its folder", "a link", "more than 16,777,216 bytes", "not JSON"]
    assert [reason in message for reason, message in zip(reasons, skipped, strict=True)] == [True] * 5
    assert [str(path) in message for message in skipped] == [True] * 5
    assert list(tmp_path.iterdir()) == [path]


def test_a_zip_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mint.records.archives.TOTAL_LIMIT", 3 << 20)
    path = tmp_path / "store.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(8):
            archive.writestr(f"{number}.json", json.dumps(packet(id=str(number))) + " " * (1 << 20))
    with pytest.raises(RecordError, match="unpacks to more than 3,145,728 bytes"):
        list(read_records(path))


def test_a_zip_that_names_a_huge_directory_takes_no_memory(tmp_path):
    path = tmp_path / "store.zip"
    end = b"PK\x05\x06" + bytes(8) + (2**31).to_bytes(4, "little") + (0).to_bytes(4, "little") + bytes(2)
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(2**31 + 4)
        file.seek(0, 2)
        file.write(end)
    tracemalloc.start()
    try:
        with pytest.raises(RecordError, match="a directory of 2,147,483,648 bytes, at most 33,554,432 are read"):
            list(read_records(path))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_phenopacket_without_a_diagnosis_is_refused_unless_allowed(tmp_path):
    bare = packet(interpretations=None, diseases=None)
    with pytest.raises(RecordError, match=r"packet.json: no diagnosis, one was wanted in interpretations\[\]"):
        read(tmp_path, bare)
    assert read(tmp_path, bare, undiagnosed=True)[0].label is None
    ruled_out = packet(interpretations=[], diseases=[{"term": {"label": "x"}, "excluded": True}])
    with pytest.raises(RecordError, match="no diagnosis"):
        read(tmp_path, ruled_out)


def test_the_diagnosis_falls_back_to_the_diseases_and_several_are_all_kept(tmp_path):
    record = read(tmp_path, packet(interpretations=None))[0]
    assert (record.label, record.labels) == ("Another", ())
    two = [{"diagnosis": {"disease": {"label": "A"}}}, {"diagnosis": {"disease": {"id": "OMIM:9"}}}]
    record = read(tmp_path, packet(interpretations=two))[0]
    assert (record.label, record.labels) == ("A", ("A", "OMIM:9"))


def test_the_first_schema_is_read_too(tmp_path):
    old = packet(
        subject={"ageAtCollection": {"age": "P7M"}, "sex": "FEMALE"},
        phenotypicFeatures=[{"type": {"label": "Ptosis"}, "negated": True}, {"type": {"label": "Long face"}}],
        interpretations=[{"diagnosis": [{"disease": {"label": "A"}}]}],
    )
    record = read(tmp_path, old)[0]
    assert (record.sex, record.age, record.label) == ("female", "P7M", "A")
    assert (record.terms, record.excluded) == (("Long face",), ("Ptosis",))


@pytest.mark.parametrize(
    ("changes", "age"),
    [
        ({"subject": {"timeAtLastEncounter": {"ageRange": {"start": {"iso8601duration": "P2Y"}}}}}, "P2Y"),
        ({"subject": {"timeAtLastEncounter": {"ontologyClass": {"label": "Infant"}}}}, "Infant"),
        ({"subject": {}}, "P2Y"),
        ({"subject": {}, "diseases": [{"onset": {"ontologyClass": {"label": "Neonatal onset"}}}]}, "Neonatal onset"),
        ({"subject": {}, "diseases": []}, "P1Y"),
        ({"subject": {}, "diseases": [], "phenotypicFeatures": []}, None),
    ],
)
def test_the_age_is_that_when_last_seen_else_that_of_the_onset(tmp_path, changes, age):
    assert read(tmp_path, packet(**changes))[0].age == age


def test_a_broken_file_in_a_folder_costs_only_itself(tmp_path):
    for name, text in {"a": json.dumps(PACKET), "b": "{", "c": "", "d": "[1]", "e": '{"subject": 3}'}.items():
        (tmp_path / f"{name}.json").write_text(text)
    skipped: list[str] = []
    assert len(list(read_records(tmp_path, skipped=skipped))) == 1
    assert [str(tmp_path / f"{name}.json") in message for name, message in zip("bcde", skipped, strict=True)] == [
        True
    ] * 4
    with pytest.raises(RecordError, match=r"b\.json"):
        list(read_records(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"subject": []},
        {"phenotypicFeatures": {}},
        {"phenotypicFeatures": [None]},
        {"phenotypicFeatures": [{"type": "HP:1"}]},
        {"interpretations": [{"diagnosis": "x"}]},
        {"diseases": [{"term": 3}], "interpretations": []},
        {"metaData": {"externalReferences": "PMID:1"}},
        {"id": {"a": 1}},
        {"subject": {"sex": []}},
        {"subject": {"timeAtLastEncounter": {"age": {"iso8601duration": []}}}},
        {"phenotypic_features": []},  # names of another format: what is below them would be lost
        {"meta_data": {}},
    ],
)
def test_a_phenopacket_of_another_shape_is_refused_by_file_and_part(tmp_path, changes):
    with pytest.raises(RecordError, match=r"packet\.json: .* wanted"):
        read(tmp_path, packet(**changes))


def test_flat_cases_are_read_as_they_are(tmp_path):
    case = {
        "id": "case-1",
        "sex": "unknown",
        "age": None,
        "age_years": None,
        "hpo": [
            {"id": "HP:0000316", "label": "Hypertelorism", "excluded": False},
            {"id": "HP:0000508", "label": "Ptosis", "excluded": True},
        ],
        "disease": {"id": "OMIM:1", "label": "Some syndrome"},
        "pmid": "PMID:1",
    }
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps(case) + "\n" + json.dumps({**case, "disease": None, "id": "case-2"}) + "\n")
    skipped: list[str] = []
    assert list(read_records(path, skipped=skipped)) == [
        Record(
            "case-1",
            note="Hypertelorism",
            label="Some syndrome",
            terms=("Hypertelorism",),
            excluded=("Ptosis",),
            group="PMID:1",
        )
    ]
    assert "cases.jsonl:2: no diagnosis" in skipped[0]
