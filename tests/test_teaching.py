"""Teaching: what is learnt, from what, how it is kept, and that a run that was stopped goes on bit for bit."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from mint.encoders import load_encoder
from mint.encoders.fusion import FusionEncoder
from mint.errors import CheckpointError, ConfigError, RecordError, WorkError
from mint.records import read_records
from mint.teaching import Taught, _with_rare, lessons, teach
from mint.teaching.lessons import Lessons
from mint.teaching.snapshots import read_snapshot
from mint.teaching.targets import losses
from mint.types import Record
from mint.weights.states import save_state

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 16,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
LEARNER = TINY | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
LEARN = {"epochs": 8, "lr": 5e-3, "batch_size": 12, "warmup": 0.2, "network": LEARNER}
TERMS = {"red": ["ptosis", "short stature"], "green": ["long face"], "blue": ["cleft palate", "seizures"]}
COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


def opened(path: Any) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Patients of three classes that show in the photo's colour and in the note's terms."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    made = []
    for number in range(24):
        label = list(COLOURS)[number % 3]
        size = ((32, 48), (40, 32), (36, 36))[number // 3 % 3]
        pixels = rng.integers(-20, 21, (*size, 3)) + np.array(COLOURS[label])
        path = folder / f"{number}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
        note = f"Sex male Age {number} years " + " ".join(TERMS[label])
        made.append(Record(f"p{number}", note=note, image=str(path), label=label))
    return made


def run(cases: Sequence[Record], out: Path, **more: Any) -> Taught:
    options = {"epochs": 2, "batch_size": 8, "network": TINY, "device": "cpu", "save_every": 3, "log_every": 2}
    return teach(cases, out=out, **(options | more))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("step_seconds", "records_per_second")} for line in lines]


@pytest.fixture(scope="module")
def taught(cases: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Taught:
    out = tmp_path_factory.mktemp("taught") / "teacher"
    return run(cases, out, validation=cases[:6], **LEARN)


def test_a_teacher_from_nothing_learns_its_cases(taught: Taught) -> None:
    assert taught.classes == ("blue", "green", "red")
    assert taught.top1 == 1.0
    assert taught.top10 == 1.0
    losses = [line["loss"] for line in logged(taught.folder) if "loss" in line]
    assert len(losses) == taught.steps == 8 * 6
    assert sum(losses[-6:]) < 0.2 * sum(losses[:6])


def test_each_of_the_views_is_learnt(taught: Taught, cases: list[Record]) -> None:
    encoder = load_encoder(taught.folder)
    for shown in (
        cases,
        [Record(r.id, image=r.image) for r in cases],
        [Record(r.id, note=r.note, image=cases[n - 1].image) for n, r in enumerate(cases)],
    ):
        top = [encoder.classes[row] for row in encoder.scores(shown).argmax(1)]
        assert sum(name == r.label for name, r in zip(top, cases, strict=True)) >= 22


def test_the_teacher_opens_in_transformers_with_equal_logits(taught: Taught, cases: list[Record]) -> None:
    theirs = transformers.ViltForQuestionAnswering.from_pretrained(taught.folder).eval()
    assert tuple(theirs.config.id2label.values()) == taught.classes
    assert theirs.config.label2id == {"blue": 0, "green": 1, "red": 2}
    processor = transformers.ViltProcessor.from_pretrained(taught.folder, use_fast=False)
    pictures = [opened(r.image) for r in cases[:5]]
    inputs = processor(
        pictures, [r.note for r in cases[:5]], padding=True, truncation=True, max_length=40, return_tensors="pt"
    )
    with torch.no_grad():
        wanted = theirs(**inputs).logits
    found = load_encoder(taught.folder).scores(cases[:5])
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4


def test_the_loss_is_transformers_own(taught: Taught, cases: list[Record]) -> None:
    theirs = transformers.ViltForQuestionAnswering.from_pretrained(taught.folder).eval()
    encoder = load_encoder(taught.folder)
    assert isinstance(encoder, FusionEncoder)
    inputs = encoder.inputs(cases[:4])
    targets = torch.eye(3)[[2, 1, 0, 2]]
    names = ("input_ids", "attention_mask", "pixel_values", "pixel_mask")
    with torch.no_grad():
        wanted = theirs(**dict(zip(names, inputs, strict=True)), labels=targets).loss
        torch.testing.assert_close(losses(encoder.network(*inputs), targets, "bce").mean(), wanted)


@pytest.fixture(scope="module")
def whole(cases: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stops."""
    return run(cases, tmp_path_factory.mktemp("whole") / "t", validation=cases[:6]).folder


def test_the_same_seed_gives_the_same_teacher(whole: Path, cases: list[Record], tmp_path: Path) -> None:
    run(cases, tmp_path / "same", validation=cases[:6])
    run(cases, tmp_path / "other", validation=cases[:6], seed=1)
    assert weights(whole) == weights(tmp_path / "same")
    assert logged(whole) == logged(tmp_path / "same")
    assert weights(whole) != weights(tmp_path / "other")


class Stopped(Exception):  # noqa: N818
    """Pulls the plug."""


@pytest.mark.parametrize("after", [1, 3, 8, 11])
def test_a_stopped_run_goes_on_bit_for_bit(
    after: int, whole: Path, cases: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of an epoch, just before its end, and in the next one."""
    true = Lessons._learn

    def learn(self: Lessons, batch: Any) -> tuple[Tensor, Tensor]:
        if self.step == after:
            raise Stopped
        return true(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Lessons, "_learn", learn)
        with pytest.raises(Stopped):
            run(cases, tmp_path / "parts", validation=cases[:6])
    facts = read_snapshot(tmp_path / "parts" / "checkpoint")
    assert (facts["step"] if facts else 0) == max(step for step in (0, 3, 6, 9, 12, 15) if step <= after)
    torch.manual_seed(after)  # whatever else drew random numbers in between
    run(cases, tmp_path / "parts", validation=cases[:6], resume=True)
    assert weights(tmp_path / "parts") == weights(whole)
    states = [folder / "checkpoint" / "rank-0.safetensors" for folder in (whole, tmp_path / "parts")]
    assert states[0].read_bytes() == states[1].read_bytes()
    assert logged(tmp_path / "parts") == logged(whole)


def test_resume_needs_the_same_run(cases: list[Record], tmp_path: Path) -> None:
    taught = run(cases, tmp_path / "a", epochs=1)
    before = {path.name: path.read_bytes() for path in taught.folder.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match="epochs: was 1, is 3; resume with the same"):
        run(cases, tmp_path / "a", epochs=3, resume=True)
    with pytest.raises(ConfigError, match="cases: was "):
        run(cases[:-3], tmp_path / "a", epochs=1, resume=True)
    assert run(cases, tmp_path / "a", epochs=1, resume=True) == taught
    assert before == {path.name: path.read_bytes() for path in taught.folder.iterdir() if path.is_file()}


def test_a_state_of_another_work_is_refused(cases: list[Record], tmp_path: Path) -> None:
    run(cases[:6], tmp_path / "a", epochs=1, held_out=0.0)
    save_state(tmp_path / "a/checkpoint", {}, {"step": 1, "best": None, "pairs": "x"})
    with pytest.raises(CheckpointError, match="checkpoint: not the state of a teacher's training; start anew without"):
        run(cases[:6], tmp_path / "a", epochs=1, held_out=0.0, resume=True)


def test_the_callers_random_numbers_are_left_alone(cases: list[Record], tmp_path: Path) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    run(cases[:6], tmp_path / "a", epochs=1, held_out=0.0)
    assert torch.equal(torch.rand(2), wanted)


def test_the_best_teacher_is_kept(cases: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second epoch of four ranks best: its weights are what the folder holds at the end."""
    marks = iter([5, 0, 2, 1])  # classes above the label
    held: list[bytes] = []
    monkeypatch.setattr(lessons, "ranks", lambda _, rows: torch.full((len(rows),), mark[0]))
    mark = [0]
    true = Lessons._judge

    def judge(self: Lessons, epoch: int) -> None:
        mark[0] = next(marks)
        true(self, epoch)
        held.append(weights(tmp_path / "t"))

    monkeypatch.setattr(Lessons, "_judge", judge)
    result = run(cases, tmp_path / "t", epochs=4, validation=cases[:6])
    assert held[0] != held[1] == held[2] == held[3]
    assert (result.top1, result.top10) == (1.0, 1.0)


def test_held_out_cases_are_those_that_say_so_or_a_share(cases: list[Record], tmp_path: Path) -> None:
    marked = [replace(r, split=("val", "test")[n % 2] if n < 6 else "train") for n, r in enumerate(cases)]
    run(marked, tmp_path / "a", epochs=1, batch_size=64)
    assert len(logged(tmp_path / "a")) == 2
    facts = json.loads((tmp_path / "a" / "run.json").read_text())
    run(cases[6:], tmp_path / "b", epochs=1, batch_size=64, held_out=0.0)
    assert facts["cases"] == json.loads((tmp_path / "b" / "run.json").read_text())["cases"]


def test_a_class_with_one_case_is_learnt_not_judged(cases: list[Record], tmp_path: Path) -> None:
    """Whatever side the hash puts it on; its whole group goes along, and a case that names its split stays."""
    lonely = Record("l", note="n", label="violet", group="g")
    sibling = Record("m", note="n", label="red", group="g")
    train, judged = _with_rare(cases[:9], [lonely, sibling, *cases[9:12]])
    assert [record.id for record in train[9:]] == ["l", "m"]
    assert judged == cases[9:12]
    assert _with_rare(cases[:9], [replace(lonely, split="val")])[1] == [replace(lonely, split="val")]
    each = [Record(f"e{n}", note=f"word{n}", label=f"c{n}") for n in range(12)]
    assert len(run(each, tmp_path / "t", epochs=1, held_out=0.5).classes) == 12


def test_teaching_goes_on_from_a_teacher_and_keeps_its_classes(
    taught: Taught, cases: list[Record], tmp_path: Path
) -> None:
    some = [r for r in cases if r.label != "green"]
    more = teach(some, out=tmp_path / "more", base=taught.folder, epochs=1, lr=1e-5, device="cpu")
    assert more.classes == taught.classes
    before, after = (load_encoder(folder).scores(cases) for folder in (taught.folder, tmp_path / "more"))
    assert not torch.equal(before, after)
    assert float((before - after).abs().max()) < 0.5
    assert sorted(path.name for path in (tmp_path / "more").iterdir() if path.is_file()) == [
        ".lock",
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "preprocessor_config.json",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]


def test_another_class_set_gets_a_new_classifier_on_the_old_body(
    taught: Taught, cases: list[Record], tmp_path: Path
) -> None:
    two = [Record(r.id, note=r.note, label="warm" if r.label == "red" else "cold") for r in cases]
    result = teach(
        two, out=tmp_path / "two", base=taught.folder, classes=["warm", "cold"], epochs=1, lr=1e-9, device="cpu"
    )
    assert result.classes == ("warm", "cold")
    old, new = (transformers.ViltForQuestionAnswering.from_pretrained(f) for f in (taught.folder, tmp_path / "two"))
    torch.testing.assert_close(old.vilt.pooler.dense.weight, new.vilt.pooler.dense.weight)
    assert new.classifier[3].weight.shape == (2, 64)


def test_classes_and_cases_that_do_not_meet_are_named(taught: Taught, cases: list[Record], tmp_path: Path) -> None:
    stray = [*cases, Record("x", note="n", label="violet")]
    with pytest.raises(ConfigError, match="the teacher lacks 'violet'"):
        teach(stray, out=tmp_path / "a", base=taught.folder, validation=[])
    with pytest.raises(ConfigError, match="the teacher lacks 'violet'"):
        run(stray, tmp_path / "a", classes=["red", "green", "blue"], validation=[])
    with pytest.raises(ConfigError, match="no case of 'pink' to learn from"):
        run(cases, tmp_path / "a", classes=["red", "green", "blue", "pink"], validation=[])
    with pytest.raises(ConfigError, match="validation: 'violet' is a class of no training case"):
        run(cases, tmp_path / "a", validation=stray[-1:])
    with pytest.raises(RecordError, match="record y: no label to learn"):
        run([*cases, Record("y", note="n")], tmp_path / "b")


def test_settings_out_of_range_are_named(cases: list[Record], tmp_path: Path) -> None:
    for name, value in {"loss": "hinge", "epochs": 0, "held_out": 1.0, "lr": -1.0, "dtype": "int8"}.items():
        with pytest.raises(ConfigError, match=f"^{name}: "):
            run(cases, tmp_path / "a", **{name: value})
    with pytest.raises(ConfigError, match="network: the base has a size of its own"):
        run(cases, tmp_path / "a", base="somewhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"exists and holds no run.json"):
        run(cases, tmp_path / "full")


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_teacher(
    cases: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(cases, tmp_path / "t", epochs=1)
    before = weights(tmp_path / "t")
    monkeypatch.setattr(lessons, "losses", lambda logits, *_: logits.sum(1) * math.nan)
    with pytest.raises(WorkError, match="step 1: the loss is nan"):
        run(cases, tmp_path / "t", epochs=1)
    assert weights(tmp_path / "t") == before


@pytest.mark.parametrize(("loss", "dtype"), [("cross_entropy", "float32"), ("bce", "bfloat16")])
def test_either_loss_and_half_precision_learn(loss: str, dtype: str, cases: list[Record], tmp_path: Path) -> None:
    options = LEARN | {"epochs": 5, "loss": loss, "dtype": dtype, "class_weights": "balanced", "validation": cases}
    result = run(cases, tmp_path / "t", **options)
    assert result.top1 is not None
    assert result.top1 > 0.6
    states = load_encoder(result.folder)
    assert isinstance(states, FusionEncoder)
    assert next(states.network.parameters()).dtype == torch.float32


def test_a_base_without_pixel_settings_gets_them_written(taught: Taught, cases: list[Record], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(taught.folder, base, ignore=shutil.ignore_patterns("preprocessor_config.json", "checkpoint"))
    teach(cases[:6], out=tmp_path / "t", base=base, epochs=1, held_out=0.0, device="cpu", batch_size=64)
    assert transformers.ViltImageProcessorPil.from_pretrained(tmp_path / "t").size["shortest_edge"] == 384


REAL = Path(os.environ.get("MINT_REAL", Path(__file__).parents[2] / "shared" / "real"))


@pytest.mark.skipif(not (REAL / "cases_open.jsonl.gz").is_file(), reason="real cases are not here")
def test_real_cases_teach_a_teacher(tmp_path: Path) -> None:
    """Notes of published cases, five diseases of many: far above the fifth that guessing gets."""
    records = list(islice(read_records(REAL / "cases_open.jsonl.gz"), 3000))
    common = [name for name, _ in Counter(r.label for r in records).most_common(5)]
    some = [r for r in records if r.label in common][:200]
    result = run(some, tmp_path / "t", epochs=8, lr=5e-3, batch_size=32, network=LEARNER, held_out=0.2)
    assert set(result.classes) == set(common)
    assert result.top1 is not None
    assert result.top1 > 0.6
