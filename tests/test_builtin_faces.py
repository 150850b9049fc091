"""The drawn face shows each finding, shows nothing else, and is the same picture every time."""

from __future__ import annotations

import ast
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mint.builtin import faces
from mint.builtin.face_terms import drawn_findings, nearest, photo_findings
from mint.builtin.faces import Photo, draw_face, photo_terms
from mint.builtin.tables import HERE, rows

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("MINT_REAL", ROOT.parent / "shared" / "real"))
SEEDS = (3, 14, 15)


def pixels(terms: tuple[str, ...] = (), seed: int = 0, **more: object) -> np.ndarray:
    return np.asarray(draw_face(terms, seed=seed, **more), dtype=np.int32)


@pytest.fixture(scope="module")
def plain() -> dict[int, np.ndarray]:
    return {seed: pixels(seed=seed) for seed in SEEDS}


@pytest.mark.parametrize("term", sorted(photo_terms()))
def test_a_finding_changes_the_picture_far_beyond_its_noise_on_everybody(term, plain):
    """The grain of a picture stays within five of its own standard deviations, at most 26 of 255 levels."""
    for seed in SEEDS:
        changed = np.abs(pixels((term,), seed) - plain[seed]).max(axis=2) > 26
        assert changed.sum() >= 16, (photo_findings()[term].label, seed)


def test_findings_are_told_apart_by_where_they_change_the_picture():
    """A finding changes two people more alike than it and any other finding do."""
    terms = sorted(photo_terms())

    def changes(seed: int) -> np.ndarray:
        base = pixels(seed=seed, sex="female", age=9.0, size=64, ethnicity="European")
        shown = (pixels((term,), seed, sex="female", age=9.0, size=64, ethnicity="European") - base for term in terms)
        flat = np.array([change.ravel() for change in shown], dtype=np.float64)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    right = (changes(5) @ changes(8).T).argmax(axis=1) == np.arange(len(terms))
    assert right.mean() > 0.85


def test_at_least_thirty_five_findings_are_drawn_and_listed():
    assert len(photo_terms()) >= 35
    assert photo_terms() == set(photo_findings())
    assert len({finding.drawing for finding in photo_findings().values()}) == len(photo_terms())


def test_the_same_arguments_give_the_same_bytes_and_another_seed_another_person():
    term = sorted(photo_terms())[7]
    assert draw_face([term], seed=4).tobytes() == draw_face([term], seed=4).tobytes()
    assert draw_face([term], seed=4).tobytes() != draw_face([term], seed=5).tobytes()
    photo = Photo((term,), "male", 4.0, "African", 9)
    assert photo.draw().tobytes() == photo.draw().tobytes()


def test_order_and_repetition_of_terms_do_not_change_the_picture():
    few = sorted(photo_terms())[::9]
    assert draw_face(few, seed=2).tobytes() == draw_face([*reversed(few), *few], seed=2).tobytes()


def test_terms_that_cannot_be_drawn_are_passed_over():
    assert draw_face(["HP:0001250", "not a term", ""], seed=6).tobytes() == draw_face([], seed=6).tobytes()


def test_a_related_term_is_drawn_as_its_nearest_drawing():
    table = rows("face_related.tsv", ("term_id", "label", "finding"))
    drawing = {finding.drawing: term for term, finding in photo_findings().items()}
    assert len(table) > 200
    assert not {row["term_id"] for row in table} & photo_terms()
    assert all(nearest(row["term_id"]) == drawing[row["finding"]] for row in table)
    shown = draw_face([table[0]["term_id"]], seed=1).tobytes()
    assert shown == draw_face([drawing[table[0]["finding"]]], seed=1).tobytes() != draw_face([], seed=1).tobytes()


def test_clashes_are_mutual_and_only_the_first_of_a_clash_is_drawn():
    for term, finding in photo_findings().items():
        assert term not in finding.against
        assert all(term in photo_findings()[other].against for other in finding.against)
    wide, narrow = (
        next(t for t, f in photo_findings().items() if f.label == name) for name in ("Wide mouth", "Narrow mouth")
    )
    assert drawn_findings([narrow, wide]) == drawn_findings([wide]) == {"wide_mouth"}


@pytest.mark.parametrize("age", [0.0, 0.5, 3.0, 18.0, 80.0])
def test_every_age_can_have_every_finding_at_once(age):
    shown = draw_face(photo_terms(), sex="male", age=age, seed=int(age))
    assert shown.size == (faces.SIZE, faces.SIZE)
    assert np.asarray(shown).std() > 10


def test_any_set_of_findings_draws_a_whole_picture():
    rng = np.random.default_rng(0)
    terms = sorted(photo_terms())
    for seed in range(40):
        some = [term for term, chance in zip(terms, rng.random(len(terms)), strict=True) if chance < 0.3]
        assert np.isfinite(np.asarray(draw_face(some, seed=seed, size=48), dtype=float)).all()


@pytest.mark.parametrize("size", [64, 112, 224])
def test_size_is_an_argument_and_the_person_stays_the_same(size):
    shown = draw_face([], seed=3, size=size)
    assert shown.size == (size, size)
    assert shown.mode == "RGB"
    small = np.asarray(shown.resize((32, 32), Image.Resampling.BOX), dtype=float)
    usual = np.asarray(draw_face([], seed=3).resize((32, 32), Image.Resampling.BOX), dtype=float)
    assert np.abs(small - usual).mean() < 4


def test_sex_age_and_ethnicity_are_used_when_they_are_given():
    base = {"sex": "female", "age": 5.0, "ethnicity": "European"}
    shown = draw_face([], seed=3, **base).tobytes()
    for changed in ({"sex": "male"}, {"age": 40.0}, {"ethnicity": "African"}):
        assert draw_face([], seed=3, **(base | changed)).tobytes() != shown


def test_the_sheet_is_written_as_one_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["faces", "--sheet", str(tmp_path / "faces.png"), "--size", "24"])
    faces.main()
    with Image.open(tmp_path / "faces.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.height > 27 * 24


def test_only_the_modules_that_draw_import_pillow():
    def imports(path: Path) -> set[str]:
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        return {
            name.split(".")[0]
            for n in nodes
            for name in ([n.module or ""] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names])
        }

    assert {path.stem for path in HERE.glob("*.py") if "PIL" in imports(path)} == {"canvas", "faces", "nuclei", "sheet"}


@pytest.mark.skipif(not REAL.is_dir(), reason="no real data here")
def test_most_real_patients_with_a_finding_of_the_face_get_it_drawn():
    with gzip.open(REAL / "cases_open.jsonl.gz", "rt", encoding="utf-8") as file:
        found = [[entry["id"] for entry in json.loads(line)["hpo"] if not entry["excluded"]] for line in file]
    terms = [row for row in (HERE / "face_terms.tsv").read_text().splitlines() if row.startswith("HP:")]
    assert len(terms) == len(photo_terms())
    shown = [len(drawn_findings(present)) for present in found]
    assert np.mean([number > 0 for number in shown]) > 0.4
    rich = max(range(len(found)), key=lambda number: shown[number])
    assert draw_face(found[rich], seed=0).tobytes() != draw_face([], seed=0).tobytes()
