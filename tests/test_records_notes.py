"""The words of a composed note, GestaltMML's own texts, and the names of HPO terms."""

import json
from pathlib import Path

import pytest

from mint.errors import RecordError
from mint.records.hpo import hpo_beside, read_hpo
from mint.records.notes import age_in_words, compose_note, demographics
from mint.types import Record

CASE = Record(
    "a",
    sex="male",
    age="P3Y6M",
    ethnicity="European",
    terms=("Long palpebral fissure", "Intellectual disability, severe", "Mandibular prognathia"),
    excluded=("Ptosis",),
)


def test_a_note_has_sex_age_ethnicity_and_terms_in_this_order():
    note = "Sex male Age 3 years 6 months Ethnicity European Long palpebral fissure"
    assert compose_note(CASE) == f"{note} Intellectual disability, severe Mandibular prognathia"


def test_excluded_findings_are_in_the_note_only_when_asked_for():
    assert "tosis" not in compose_note(CASE)
    assert compose_note(CASE, excluded=True) == f"{compose_note(CASE)} No Ptosis"


def test_the_published_text_loses_punctuation_and_every_and():
    note = "Sex male Age 3 years 6 months Ethnicity European Long palpebral fissure"
    assert compose_note(CASE, published=True) == f"{note} Intellectual disability severe Mibular prognathia"
    one = Record("b", sex="female", age="1 year 8 months", terms=("Delayed speech and language development",))
    assert compose_note(one, published=True) == "Sex female Age 1 years 8 months Delayed speech language development"


def test_what_is_not_known_is_left_out_of_a_note():
    assert compose_note(Record("a")) == ""
    assert compose_note(Record("a", age="P2W")) == "Age 2 weeks"
    assert compose_note(Record("a", sex="female", terms=("Ptosis",))) == "Sex female Ptosis"


@pytest.mark.parametrize(
    ("age", "words", "published"),
    [
        ("P3Y6M", "3 years 6 months", "3 years 6 months"),
        ("P1Y", "1 year", "1 years 0 months"),
        ("P11M", "11 months", "0 years 11 months"),
        ("P1Y11M27D", "1 year 11 months 27 days", "1 years 11 months"),
        ("P3Y18M", "4 years 6 months", "4 years 6 months"),
        ("P0D", "0 days", "0 years 0 months"),
        ("P2W", "2 weeks", "0 years 0 months"),
        ("p2y", "2 years", "2 years 0 months"),
        ("PT5H", "0 days", "0 years 0 months"),
        ("3.5", "3 years 6 months", "3 years 6 months"),
        ("P0.5Y", "6 months", "0 years 6 months"),
        ("12", "12 years", "12 years 0 months"),
        ("1 years 8 months", "1 year 8 months", "1 years 8 months"),
        ("Neonatal onset", "Neonatal onset", "Neonatal onset"),
        ("P", "P", "P"),
        (None, None, None),
    ],
)
def test_ages_become_words(age, words, published):
    assert age_in_words(age) == words
    assert age_in_words(age, published=True) == published


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "Sex male Age 3 years 6 months Ethnicity European Long palpebral fissure",
            {"sex": "male", "age": "3 years 6 months", "ethnicity": "European"},
        ),
        (
            "Sex female Age 0 years 5 months Ethnicity Middle-East/West Asian Ptosis",
            {"sex": "female", "age": "0 years 5 months", "ethnicity": "Middle-East/West Asian"},
        ),
        ("Sex male Ethnicity Long palpebral fissure", {"sex": "male"}),
        ("Age 7 months Ptosis", {"age": "7 months"}),
        ("Sex maleficent", {}),
        ("Long palpebral fissure Sex male", {}),
        ("", {}),
    ],
)
def test_demographics_are_read_back_from_a_text_as_far_as_they_stand_in_it(text, found):
    assert demographics(text) == found


def test_a_composed_note_reads_back():
    assert demographics(compose_note(CASE)) == {"sex": "male", "age": "3 years 6 months", "ethnicity": "European"}


NAMES = {"HP:0000316": "Hypertelorism", "HP:0000508": "Ptosis"}
OBO = """format-version: 1.2
data-version: x

[Term]
id: HP:0000316
name: Hypertelorism
alt_id: HP:0000578
synonym: "Wide-set eyes" EXACT []

[Term]
id: HP:0000508
name: Ptosis

[Typedef]
id: part_of
name: part of
"""
GRAPHS = {
    "graphs": [
        {
            "nodes": [
                {"id": "http://x.example/obo/HP_0000316", "lbl": "Hypertelorism"},
                {"id": "http://x.example/obo/HP_0000508", "lbl": "Ptosis"},
                {"id": "http://x.example/obo/UBERON_1", "lbl": "not a phenotype"},
                {"id": "http://x.example/obo/HP_0000001"},
            ]
        }
    ]
}


def test_hpo_terms_beside_a_table_are_no_link_that_leads_out(tmp_path: Path):
    (tmp_path / "hp.obo").write_text("format-version: 1.2\n\n[Term]\nid: HP:0000316\nname: Hypertelorism\n")
    (tmp_path / "inner").mkdir()
    assert hpo_beside(tmp_path / "inner") == {}
    (tmp_path / "inner/hp.obo").symlink_to("../hp.obo")
    with pytest.raises(RecordError, match=r"inner/hp.obo: a link that leads out of .*--hpo"):
        hpo_beside(tmp_path / "inner")
    assert hpo_beside(tmp_path) == {"HP:0000316": "Hypertelorism"}


def test_hpo_terms_are_read_from_tables_obo_and_json(tmp_path: Path):
    table = tmp_path / "hpo_terms.tsv"
    table.write_text("# a remark\nid\tlabel\tin_release\nHP:0000316\tHypertelorism\t1\nHP:0000508\tPtosis\t0\n")
    assert read_hpo(table) == NAMES
    commas = tmp_path / "terms.csv"
    commas.write_text('label,id\n"Hypertelorism",HP:0000316\nPtosis,HP_0000508\n')
    assert read_hpo(commas) == NAMES
    obo = tmp_path / "hp.obo"
    obo.write_text(OBO)
    assert read_hpo(obo) == {**NAMES, "HP:0000578": "Hypertelorism"}
    graphs = tmp_path / "hp.json"
    graphs.write_text(json.dumps(GRAPHS))
    assert read_hpo(graphs) == NAMES


@pytest.mark.parametrize(
    "stanza",
    [
        "alt_id: HP:0000578\nid: HP:0000316\nname: Hypertelorism\n",
        "name: Hypertelorism\nalt_id: HP:0000578\nid: HP:0000316\n",
    ],
)
def test_the_lines_of_a_term_may_come_in_any_order(tmp_path: Path, stanza: str):
    """And an alternative id without a name takes none from the term before it."""
    (obo := tmp_path / "hp.obo").write_text(f"format-version: 1.2\n\n[Term]\n{stanza}\n[Term]\nalt_id: HP:0000579\n")
    assert read_hpo(obo) == {"HP:0000316": "Hypertelorism", "HP:0000578": "Hypertelorism"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id\tname\nHP:1\tx\n", "the columns are id, name; wanted id and label"),
        ("", "wanted id and label"),
        ("id\tlabel\n", "no HPO term in it"),
        ('{"graphs": [3, {"nodes": [1, {"lbl": 2}]}]}', "no HPO term in it"),
        ("{", "not JSON"),
        ("format-version: 1.2\n", "no HPO term in it"),
        ('id\tlabel\nHP:0000001\t"x' + "y" * 200_000, "not a table"),
    ],
)
def test_a_file_without_hpo_terms_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "terms"
    path.write_text(text)
    with pytest.raises(RecordError, match=message) as refused:
        read_hpo(path)
    assert str(path) in str(refused.value)
