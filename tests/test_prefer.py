"""`prefer` and `teach` from the command line: cases and a teacher in, pairs that `align` takes out; faults by name."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from students import write_student
from test_clip_encoder import clip
from torch import Tensor

from mint import pipeline, prefer
from mint.commands import cli
from mint.encoders import ClipEncoder, load_encoder
from mint.images import open_image
from mint.pairs.files import read_pairs
from mint.types import PreferencePair, Record

__all__ = ["clip"]
REAL = Path(os.environ.get("MINT_REAL", Path(__file__).parents[2] / "shared" / "real"))
TISSUES = ["Colon", "Lung", "Bladder", "Breast", "Kidney", "Prostate", "Stomach", "Brain", "Skin", "Liver"]
CLASSES = [f"disease {number:02}" for number in range(30)]


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    """Three cases in a CSV file, and a file of scores that ranks their diseases by number."""
    rows = "".join(f'{name},"short stature, low-set ears",disease {at:02}\n' for at, name in enumerate("abc"))
    (tmp_path / "cases.csv").write_text(f"id,note,label\n{rows}")
    scores = [{"id": name, "scores": {label: -at for at, label in enumerate(CLASSES)}} for name in "abc"]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    return tmp_path / "cases.csv"


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    return result.exit_code, result.output


def test_a_file_of_scores_teaches(cases: Path) -> None:
    out = cases.parent / "pairs.jsonl"
    code, said = run("prefer", cases, "--teacher", cases.parent / "scores.jsonl", "--out", out, "--json", "--quiet")
    assert (code, json.loads(said)["pairs"]) == (0, 3)
    pairs = list(read_pairs(out))
    assert [pair.id for pair in pairs] == ["a", "b", "c"]
    chosen = pairs[0].chosen[0]["content"].splitlines()  # type: ignore[index, union-attr]
    assert chosen[1] == "1. disease 00"
    assert len(chosen) == 11
    rejected = pairs[0].rejected[0]["content"].splitlines()  # type: ignore[index, union-attr]
    assert [rejected[1], rejected[-1]] == ["1. disease 15", "15. disease 29"]


def test_an_array_of_scores_teaches_in_the_order_of_the_cases(cases: Path) -> None:
    np.save(cases.parent / "scores.npy", np.tile(-np.arange(30.0), (3, 1)))
    (cases.parent / "classes.txt").write_text("\n".join(CLASSES))
    out = cases.parent / "pairs.jsonl"
    assert run("prefer", cases, "--teacher", cases.parent / "scores.npy", "--out", out)[0] == 0
    assert len(list(read_pairs(out))) == 3


def test_a_label_that_the_teacher_lacks_is_named_or_left_out(cases: Path) -> None:
    cases.write_text(cases.read_text().replace("disease 01", "disease 77"))
    words = ["prefer", cases, "--teacher", cases.parent / "scores.jsonl", "--out", cases.parent / "pairs.jsonl"]
    code, said = run(*words)
    assert code == 2
    assert "case 'b': its label 'disease 77' is none of the teacher's 30 classes" in said
    assert not (cases.parent / "pairs.jsonl").exists()
    code, said = run(*words, "--skip-bad")
    assert code == 0
    assert "left out 1 in all" in said
    assert [pair.id for pair in read_pairs(cases.parent / "pairs.jsonl")] == ["a", "c"]


def test_a_case_without_scores_is_named_or_left_out(cases: Path) -> None:
    with cases.open("a") as file:
        file.write("d,tall stature,disease 03\n")
    words = ["prefer", cases, "--teacher", cases.parent / "scores.jsonl", "--out", cases.parent / "pairs.jsonl"]
    code, said = run(*words)
    assert code == 2
    assert "d" in said
    assert run(*words, "--skip-bad")[0] == 0
    assert len(list(read_pairs(cases.parent / "pairs.jsonl"))) == 3


def test_too_few_classes_are_told(cases: Path) -> None:
    words = ["prefer", cases, "--teacher", cases.parent / "scores.jsonl", "--out", cases.parent / "pairs.jsonl"]
    code, said = run(*words, "--chosen-k", 20)
    assert code == 2
    assert "20 chosen and 15 rejected of 30 classes would overlap" in said


def test_a_teacher_that_is_not_there_is_told_in_one_line(cases: Path) -> None:
    code, said = run("prefer", cases, "--teacher", cases.parent / "nothing", "--out", cases.parent / "pairs.jsonl")
    assert code == 2
    assert len(said.strip().splitlines()) == 1


def test_a_taught_teacher_makes_pairs(tmp_path: Path) -> None:
    rows = [
        f"case-{at},{'long palpebral fissures' if at % 2 else 'small hands'},{'A' if at % 2 else 'B'}"
        for at in range(24)
    ]
    (tmp_path / "cases.csv").write_text("id,note,label\n" + "\n".join(rows) + "\n")
    words = ["--epochs", 1, "--batch-size", 8, "--quiet", "--json", "--out", tmp_path / "teacher"]
    code, said = run("teach", tmp_path / "cases.csv", *words)
    assert code == 0, said
    assert json.loads(said)["classes"] == 2
    out = tmp_path / "pairs.jsonl"
    code, said = run("prefer", tmp_path / "cases.csv", "--teacher", tmp_path / "teacher", "--chosen-k", 1,
                     "--rejected-q", 1, "--out", out, "--quiet")  # fmt: skip
    assert code == 0, said
    assert len(list(read_pairs(out))) == 24


def test_teach_leaves_out_what_cannot_be_learnt_and_lists_it(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (9, 90, 30)).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    rows = [f"case-{at},tall {at},good.png,{'A' if at % 2 else 'B'}" for at in range(12)]
    rows += ["cut,tall,cut.png,A", "bare,tall,good.png,"]
    (tmp_path / "cases.csv").write_text("id,note,image,label\n" + "\n".join(rows) + "\n")
    words = ["teach", tmp_path / "cases.csv", "--epochs", 1, "--batch-size", 18, "--out", tmp_path / "teacher"]
    code, said = run(*words)
    assert (code, "record bare: no label to learn" in said) == (2, True)
    code, said = run(*words, "--skip-bad")
    assert (code, "left out 2 in all" in said, "record cut: " in said) == (0, True, True)
    (tmp_path / "few.txt").write_text("A\nC\n")
    code, said = run(*words, "--skip-bad", "--classes", tmp_path / "few.txt")
    assert (code, "the teacher lacks 'B', of which there are cases" in said) == (2, True)


# ---- images -------------------------------------------------------------------------------------------------------

IMAGE_WORDS = ["--modality", "image", "--kind", "tissue", "--quiet"]


@pytest.fixture
def tissues(tmp_path: Path) -> Path:
    (tmp_path / "tissues.txt").write_text("\n".join(TISSUES))
    return tmp_path / "tissues.txt"


def lists_of(path: Path) -> list[list[str]]:
    """The classes of the chosen answer of each pair."""
    texts = [pair.chosen[0]["content"] for pair in read_pairs(path)]  # type: ignore[index]
    return [[line.partition(". ")[2] for line in str(text).splitlines()[1:]] for text in texts]


def test_clip_teaches_from_a_folder_of_pictures(clip: Path, tissues: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("Lung", "Lung", "Skin")):
        (tmp_path / "tiles" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 70), (40 * number, 90, 30)).save(tmp_path / "tiles" / name / f"{number}.png")
    words = ["prefer", tmp_path / "tiles", "--teacher", clip, *IMAGE_WORDS]
    code, said = run(*words, "--out", tmp_path / "pairs.jsonl")
    assert (code, "`prefer --classes FILE`" in said) == (2, True)
    words += ["--classes", tissues, "--cache", tmp_path / "cache"]
    assert run(*words, "--out", tmp_path / "pairs.jsonl")[0] == 0
    pairs = list(read_pairs(tmp_path / "pairs.jsonl"))
    assert [pair.id for pair in pairs] == ["Lung/0.png", "Lung/1.png", "Skin/2.png"]
    assert all(open_image(pair.image).size == (80, 70) for pair in pairs)
    assert list((tmp_path / "cache").rglob("*.npy"))
    (tmp_path / "said.txt").write_text("a {} thing\n{}\n")
    few = [{"id": "Lung/1.png", "candidates": ["Skin", "Lung"]}]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    words += ["--sentences", tmp_path / "said.txt", "--candidates", tmp_path / "few.jsonl", "--chosen-k", 1]
    assert run(*words, "--rejected-q", 1, "--out", tmp_path / "others.jsonl")[0] == 0
    encoder = load_encoder(clip, classes=TISSUES, templates=["a {} thing", "{}"])
    records = [Record(pair.id, image=pair.image) for pair in pairs]
    wanted = [[TISSUES[int(row)]] for row in encoder.scores(records).argmax(1)]
    found = lists_of(tmp_path / "others.jsonl")
    assert [found[0], found[2]] == [wanted[0], wanted[2]]
    assert found[1][0] in ("Skin", "Lung")


def test_a_table_with_names_of_its_own_is_read(clip: Path, tissues: Path, tmp_path: Path) -> None:
    (tmp_path / "tiles").mkdir()
    Image.new("RGB", (64, 64), (9, 90, 30)).save(tmp_path / "tiles" / "1.png")
    (tmp_path / "table.csv").write_text("file,tissue\n1.png,Lung\n")
    words = ["prefer", tmp_path / "table.csv", "--teacher", clip, "--classes", tissues, *IMAGE_WORDS]
    words += ["--out", tmp_path / "pairs.jsonl", "--image-folder", tmp_path / "tiles", "--columns"]
    assert run(*words, "id=file,image=file,label=tissue")[0] == 0
    assert [pair.id for pair in read_pairs(tmp_path / "pairs.jsonl")] == ["1.png"]
    code, said = run(*words, "id=file,tissue")
    assert (code, "wanted our name = the table's name" in said) == (2, True)


def test_of_pictures_that_lie_elsewhere_the_folder_to_give_is_told_once(
    clip: Path, tissues: Path, tmp_path: Path
) -> None:
    for number, name in enumerate(("Lung", "Skin")):
        (tmp_path / "my tiles" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), (40 * number, 90, 30)).save(tmp_path / "my tiles" / name / f"{number}.png")
    words = ["prefer", tmp_path / "my tiles", "--teacher", clip, "--classes", tissues, *IMAGE_WORDS[:-1], "--out"]
    beside, elsewhere = tmp_path / "pairs.jsonl", tmp_path / "elsewhere" / "pairs.jsonl"
    assert "--image-folder" not in run(*words, beside)[1]
    said = CliRunner().invoke(cli, [str(word) for word in (*words, elsewhere)]).stderr
    (told,) = (line for line in said.splitlines() if "--image-folder" in line)
    typed = shlex.split(told[told.index("align --pairs") :])
    assert typed == ["align", "--pairs", str(elsewhere), "--image-folder", str(tmp_path / "my tiles")]
    assert json.loads(elsewhere.read_text().splitlines()[0])["image"] == "../my tiles/Lung/0.png"
    assert len(list(read_pairs(beside))) == len(list(read_pairs(elsewhere, image_folders=[typed[-1]]))) == 2


@pytest.mark.skipif(not (REAL / "images").is_dir(), reason="real tiles are not here")
def test_real_tiles_become_pairs(clip: Path, tissues: Path, tmp_path: Path) -> None:
    columns = "id=file,image=file,label=tissue,group=group"
    words = ["prefer", REAL / "images" / "manifest.csv", "--columns", columns, "--teacher", clip, *IMAGE_WORDS]
    assert run(*words, "--classes", tissues, "--out", tmp_path / "pairs.jsonl")[0] == 0
    pairs = list(read_pairs(tmp_path / "pairs.jsonl", image_folders=[REAL / "images"]))
    assert len(pairs) == 225
    assert all(Path(str(pair.image)).is_file() for pair in pairs)


def most_held(encoder: ClipEncoder, picture: Path, count: int) -> int:
    """The most bytes that this process held while `count` cases with a large picture became pairs."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    records = (Record(str(number), image=str(picture)) for number in range(count))
    made = prefer(records, teacher=encoder, modality="image", kind="tissue")
    assert sum(1 for _ in made) == count
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


class Hoarding(ClipEncoder):
    """A teacher that opens all pictures before the first is scored."""

    def score_batches(self, records: Any, skipped: list[str] | None = None) -> Iterator[tuple[list[Record], Tensor]]:
        held: Sequence[Record] = [Record(record.id, image=open_image(record.image)) for record in records]
        yield from super().score_batches(held, skipped)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_does_not_grow_with_the_number_of_pictures(clip: Path, tmp_path: Path) -> None:
    Image.new("RGB", (1000, 1000), (9, 90, 30)).save(tmp_path / "large.jpg")  # 3 MB when it is open
    encoder = load_encoder(clip, classes=TISSUES)
    assert isinstance(encoder, ClipEncoder)
    encoder.batch_size = 4
    few = most_held(encoder, tmp_path / "large.jpg", 12)
    assert most_held(encoder, tmp_path / "large.jpg", 120) - few < 30e6
    encoder.__class__ = Hoarding
    assert most_held(encoder, tmp_path / "large.jpg", 120) - few > 250e6


def test_align_makes_its_pairs_of_cases_and_a_teacher_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [{"id": name, "note": f"thin {name}", "label": "red"} for name in "abc"] + [{"id": "d", "label": "red"}]
    scores = [{"id": case["id"], "scores": {"red": 3, "blue": 2, "wide": 1, "deep": 0}} for case in cases]
    for name, rows in (("cases", cases), ("scores", scores)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made: list[PreferencePair] = []
    inner = pipeline.token_pairs
    monkeypatch.setattr(pipeline, "token_pairs", lambda pairs, *rest: inner(made.extend(pairs) or made, *rest))
    words = ["align", str(tmp_path / "cases.jsonl"), "--teacher", str(tmp_path / "scores.jsonl"), "--steps", "1"]
    words += ["--model", str(write_student(tmp_path / "student")), "--out", str(tmp_path / "run"), "--skip-bad"]
    result = CliRunner().invoke(cli, [*words, "--chosen-k", "2", "--rejected-q", "1", "--rejected", "near"])
    assert result.exit_code == 0, result.stderr
    assert "left out: case 'd': the note is empty" in result.stderr
    assert [pair.id for pair in made] == ["a", "b", "c"]
    assert [line[3:] for line in made[0].chosen[0]["content"].splitlines()[1:]] == ["red", "blue"]
    assert made[0].rejected[0]["content"].splitlines()[1:] == ["1. wide"]
    assert (
        "--modality: the built-in task has its own" in CliRunner().invoke(cli, ["align", "--modality", "both"]).stderr
    )
