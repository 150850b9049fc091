"""Tables that are not quite right, GestaltMML's inference CSV and the metadata of GMDB."""

from pathlib import Path

import pytest

from mint.errors import RecordError
from mint.records import read_records
from mint.records.notes import compose_note
from mint.types import Record


def table(path: Path, text: str) -> Path:
    path.write_text(text, newline="")
    return path


def both_ways(path: Path, **options) -> tuple[list[str], list[str]]:
    """The ids left when bad rows are left out, and what was wrong; the first of that is what raises otherwise."""
    skipped: list[str] = []
    kept = [record.id for record in read_records(path, skipped=skipped, **options)]
    with pytest.raises(RecordError) as refused:
        list(read_records(path, **options))
    assert str(refused.value) == skipped[0]
    return kept, skipped


def test_a_quote_that_never_closes_costs_its_row_and_no_other(tmp_path):
    path = table(tmp_path / "c.csv", 'id,note\na,x\nb,"open\nc,x\nd,x\n')
    kept, skipped = both_ways(path)
    assert kept == ["a", "c", "d"]
    why = "a quote that opens in it never closes; close it, or double the quotes inside a field"
    assert skipped == [f"{path}:3: not a row of a table ({why})"]


def test_a_quote_that_never_closes_in_a_long_file_is_found_in_bounded_memory(tmp_path):
    rows = "".join(f"r{number},{'x' * 90}\n" for number in range(20_000))
    path = table(tmp_path / "c.csv", f'id,note\na,"open\n{rows}')
    kept, skipped = both_ways(path)
    assert kept == [f"r{number}" for number in range(20_000)]
    assert len(skipped) == 1


def test_a_quote_in_the_middle_and_a_field_too_many_or_too_few_are_named_by_line(tmp_path):
    path = table(tmp_path / "c.csv", 'id,note\na,x\nb,"x"y\nc\nd,x,y\ne,x,,\n"f","two\nlines"\ng,"x\n')
    kept, skipped = both_ways(path)
    assert kept == ["a", "e", "f"]
    assert [message.split(":")[1] for message in skipped] == ["3", "4", "5", "9"]
    assert "1 fields, the header has 2" in skipped[1]
    assert "3 fields, the header has 2" in skipped[2]


def test_a_row_that_is_not_utf8_is_named_by_line(tmp_path):
    path = tmp_path / "c.csv"
    path.write_bytes(b"id,note\na,x\nb,caf\xe9\nc,x\n")
    kept, skipped = both_ways(path)
    assert kept == ["a", "c"]
    assert skipped == [f"{path}:3: not UTF-8; save the file again as UTF-8"]


def test_utf16_is_refused_with_the_mend(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("id,note\na,x\n", encoding="utf-16")
    with pytest.raises(RecordError, match="this is UTF-16, UTF-8 was wanted; save the file again as UTF-8"):
        list(read_records(path))


def test_lines_that_end_in_a_bare_carriage_return_are_refused_with_the_mend(tmp_path):
    (tmp_path / "old.csv").write_bytes(b"id,note,label\ra,Short,X\rb,Tall,Y\r")
    with pytest.raises(RecordError, match="its lines end in a bare carriage return; save it with LF or CRLF"):
        list(read_records(tmp_path / "old.csv"))


def test_a_table_without_the_wanted_columns_is_refused_with_those_it_has(tmp_path):
    path = table(tmp_path / "c.csv", "name,text\na,x\n")
    with pytest.raises(RecordError, match=r"c.csv:1: the columns are \['name', 'text'\]; wanted id and one of note"):
        list(read_records(path, skipped=[]))
    with pytest.raises(RecordError, match="the column note is there twice"):
        list(read_records(table(path, "id,note,note\na,x,y\n")))


def test_lists_in_a_table_are_separated_by_semicolons(tmp_path):
    path = table(tmp_path / "c.csv", "id,terms,excluded\na,Ptosis; Long face ;,\n")
    assert next(read_records(path)) == Record("a", note="Ptosis Long face", terms=("Ptosis", "Long face"))


def test_a_row_that_goes_on_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mint.records.tables.LINE_LIMIT", 1000)
    path = table(tmp_path / "c.csv", "id,note\n" + 'a,"\n' * 2000)
    skipped: list[str] = []
    monkeypatch.setattr("mint.records.tables._REREAD_LIMIT", 5000)
    with pytest.raises(RecordError, match="too many broken rows before it"):
        list(read_records(table(path, "id,note\n" + '",a","b\n' * 2000), skipped=skipped))
    assert 0 < len(skipped) < 20


GESTALTMML = (
    ",image_id,filename,texts\n"
    "0,461,461_aligned.jpg,Sex male Age 3 years 6 months Ethnicity European Long palpebral fissure Growth delay\n"
    "1,477,477_aligned.jpg,*\n"
)


@pytest.mark.parametrize("pictures", [".", "test_images"])
def test_the_gestaltmml_csv_is_read_and_its_photos_are_found(tmp_path, pictures):
    path = table(tmp_path / "GestaltMML_input.csv", GESTALTMML)
    (tmp_path / "other").mkdir()
    (tmp_path / pictures).mkdir(exist_ok=True)
    for name in ("461", "477"):
        (tmp_path / pictures / f"{name}_aligned.jpg").touch()
    first, second = read_records(path)
    assert first == Record(
        "461",
        note="Sex male Age 3 years 6 months Ethnicity European Long palpebral fissure Growth delay",
        image=str(tmp_path / pictures / "461_aligned.jpg"),
        sex="male",
        age="3 years 6 months",
        ethnicity="European",
    )
    assert second == Record("477", image=str(tmp_path / pictures / "477_aligned.jpg"))
    assert next(read_records(path, images=tmp_path / "photos")).image == str(tmp_path / "photos" / "461_aligned.jpg")


def test_a_photo_of_the_gestaltmml_csv_that_lies_outside_is_refused(tmp_path):
    path = table(tmp_path / "c.csv", ",image_id,filename,texts\n0,1,../1.jpg,x\n")
    with pytest.raises(RecordError, match=r"c.csv:2: .*'../1.jpg' leads out of its folder"):
        list(read_records(path))


GMDB = {
    "image_id": "401",
    "patient_id": "312",
    "filename": "401.png",
    "gene_names": "KMT2D",
    "gene_entrez_ids": "8085",
    "disorder_names": "KABUKI SYNDROME 1",
    "omim_ids": "147920, PS241550",
    "present_features": "HP:0000637;HP:0001510;HP:9999999",
    "absent_features": "HP:0000508",
    "age_year": "3.0",
    "age_month": "6.0",
    "gender": "male",
    "ethnicity": '["Caucasian"]',
    "ethnicity_note": "",
    "ethnicity_category": "European",
    "ethnicity_sub_category": "unknown",
    "internal_syndrome_id": "484",
    "internal_syndrome_name": "Kabuki syndrome",
}
HPO = "id\tlabel\nHP:0000637\tLong palpebral fissure\nHP:0001510\tGrowth delay\nHP:0000508\tPtosis\n"


def gmdb(folder: Path, *rows: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(GMDB)] + ["\t".join(row[name].replace('"', '""') for name in GMDB) for row in rows]
    lines = [line.replace('[""Caucasian""]', '"[""Caucasian""]"') for line in lines]
    return table(folder / "image_metadata_v1.0.9.tsv", "\n".join(lines) + "\n")


def test_the_metadata_of_gmdb_is_read_with_its_crops_and_an_hpo_table(tmp_path):
    path = gmdb(tmp_path / "gmdb_metadata", GMDB)
    (tmp_path / "gmdb_crops").mkdir()
    (tmp_path / "gmdb_crops" / "401_aligned.jpg").touch()
    hpo = table(tmp_path / "hpo.tsv", HPO)
    wanted = Record(
        "401",
        note="Sex male Age 3 years 6 months Ethnicity European Long palpebral fissure Growth delay HP:9999999",
        image=str(tmp_path / "gmdb_crops" / "401_aligned.jpg"),
        label="Kabuki syndrome",
        terms=("Long palpebral fissure", "Growth delay", "HP:9999999"),
        excluded=("Ptosis",),
        sex="male",
        age="3 years 6 months",
        ethnicity="European",
        group="312",
    )
    assert list(read_records(tmp_path, hpo=hpo)) == [wanted]
    assert list(read_records(path, hpo=hpo, images=tmp_path / "gmdb_crops")) == [wanted]


def test_an_hpo_table_beside_the_metadata_is_found_and_without_one_ids_stay_ids(tmp_path):
    path = gmdb(tmp_path, GMDB)
    assert next(read_records(path)).terms == ("HP:0000637", "HP:0001510", "HP:9999999")
    table(tmp_path / "hpo_terms.tsv", HPO)
    assert next(read_records(path)).terms == ("Long palpebral fissure", "Growth delay", "HP:9999999")


def test_gaps_in_the_metadata_of_gmdb_are_gaps_in_the_record(tmp_path):
    gaps = ("present_features", "absent_features", "age_year", "age_month", "internal_syndrome_name")
    bare = {**GMDB, **dict.fromkeys(gaps, ""), "gender": "unknown", "ethnicity_category": "Unknown"}
    day_old = {**GMDB, "image_id": "402", "age_year": "0", "age_month": "0", "ethnicity_sub_category": "East Asian"}
    first, second = read_records(gmdb(tmp_path, bare, day_old))
    assert (first.sex, first.age, first.ethnicity, first.terms, first.note) == (None, None, None, (), "")
    assert first.label == "KABUKI SYNDROME 1"
    assert (second.age, second.ethnicity) == ("0 days", "East Asian")


def test_the_published_text_of_a_gmdb_row_is_the_text_of_the_gestaltmml_csv(tmp_path):
    row = {**GMDB, "present_features": "HP:0000637;HP:0001510"}
    table(tmp_path / "hpo_terms.tsv", HPO)
    records = read_records(gmdb(tmp_path, row), compose=lambda record: compose_note(record, published=True))
    assert next(records).note == GESTALTMML.splitlines()[1].split(",")[3]
