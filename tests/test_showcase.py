"""The story of `align` without arguments: its files, its figures, and what `predict` finds afterwards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mint import pipeline, showcase
from mint.answers import answer_text, opening
from mint.builtin.cases import STUDENT, TEACHER, cases, is_builtin
from mint.builtin.rare_disease import classes, draw_cases, posterior
from mint.commands import cli
from mint.config import AlignSettings
from mint.decoders import load_decoder
from mint.encoders import load_encoder
from mint.errors import ConfigError
from mint.prompts import prompt_messages
from mint.scoring import Ranker
from mint.types import Record


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> showcase.Told:
    """A very short story: it is whole, but the student learns next to nothing."""
    out = tmp_path_factory.mktemp("runs") / "rare-disease"
    settings = AlignSettings(**{**showcase.SETTINGS, "out": str(out), "epochs": 1.0, "device": "cpu"})
    return showcase.tell(settings, train=16, test=12, split="validation")


def test_the_story_leaves_a_whole_run(told: showcase.Told) -> None:
    for name in ("run.json", "pairs.jsonl", "metrics.jsonl", "labels.txt", "adapter/adapter_model.safetensors"):
        assert (told.folder / name).is_file(), name
    rows = [json.loads(line) for line in (told.folder / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert all(sorted(entry["label"] for entry in row["ranking"]) == sorted(classes()) for row in rows)


def test_its_table_has_every_system_and_both_ceilings(told: showcase.Told) -> None:
    shown = str(told)
    names = (showcase.BASE, showcase.ALIGNED, showcase.TAUGHT, showcase.NOTE_CEILING, showcase.BOTH_CEILING)
    assert all(f"\n{name}  " in shown for name in names)
    assert "top-1, %" in shown
    assert "top-10, %" in shown
    assert f"adapter:     {told.folder / 'adapter'}" in shown
    assert "95 % intervals" in shown
    assert "photos are simulated" in shown
    assert shown.splitlines()[-1].startswith("next:        python cli.py predict --note ")


def test_its_report_shows_the_same_figures_and_says_that_patients_are_simulated(told: showcase.Told) -> None:
    page = (told.folder / "report.html").read_text()
    assert "simulated" in page
    assert f"{100 * told.reports[showcase.ALIGNED].metrics['top_10']:.1f}" in page
    assert page.count("<img ") >= 10


def test_its_ceilings_are_those_of_the_judging_patients(told: showcase.Told) -> None:
    judged = list(draw_cases(12, 0, "validation"))
    best = [max(posterior(record, "note")) for record in judged]
    mean = sum(float(torch.tensor(value).exp()) for value in best) / 12
    assert told.ceilings[showcase.NOTE_CEILING]["top_1"] == pytest.approx(mean, abs=1e-9)
    assert told.ceilings[showcase.BOTH_CEILING]["top_1"] > told.ceilings[showcase.NOTE_CEILING]["top_1"]


def test_the_student_is_never_shown_the_photo_nor_the_label(told: showcase.Told) -> None:
    for line in (told.folder / "pairs.jsonl").read_text().splitlines():
        pair = json.loads(line)
        assert "image" not in pair
        assert not any(name in pair["prompt"][0]["content"] for name in classes())


def test_the_share_of_the_way_is_none_for_the_base_and_all_at_the_ceiling(told: showcase.Told) -> None:
    base, best = told.reports[showcase.BASE].metrics, told.ceilings[showcase.NOTE_CEILING]
    aligned = told.reports[showcase.ALIGNED].metrics
    wanted = (aligned["top_10"] - base["top_10"]) / (best["top_10"] - base["top_10"])
    assert told.gap_closed()["top_10"] == pytest.approx(wanted)


def test_the_newest_run_is_found_with_its_adapter_and_its_closed_set(told: showcase.Told) -> None:
    found = showcase.newest(told.folder.parent)
    assert found["adapter"] == str(told.folder / "adapter")
    assert Path(found["labels"]).read_text().splitlines() == list(classes())
    assert showcase.new_folder(told.folder.parent) == told.folder.with_name("rare-disease-2")


def test_without_a_run_the_shipped_base_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(cli, ["predict", "--note", "Short stature, webbed neck.", "--top", "3"])
    assert said.exit_code == 0, said.output
    assert sum(name in said.output for name in classes()) >= 3
    assert "not aligned" in said.output


def test_a_label_after_an_opening_is_scored_as_the_first_line_of_a_list() -> None:
    decoder = load_decoder(STUDENT, device="cpu", dtype="float32")
    labels = [classes()[3], classes()[4], classes()[40]]
    (record,) = draw_cases(1, 5, "validation")
    ranker = Ranker(decoder, labels, opening=opening("disease"))
    prompt = ranker.prompt(prompt_messages(record))
    begun = ranker.layout.opening
    (found,) = ranker.logp([prompt])
    assert begun
    assert opening("disease").startswith(decoder.tokenizer.decode(list(begun)))
    for label, logp in zip(labels, found.tolist(), strict=True):
        answer = decoder.tokenizer.encode(answer_text([label], "disease") + "\n")
        assert tuple(answer[: len(begun)]) == begun
        answer = answer[len(begun) :]
        steps = decoder.logits([[*prompt, *answer]])[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert logp == pytest.approx(float(steps[torch.arange(len(answer)), answer].sum()), abs=1e-3)


def test_the_aligned_list_has_the_tokens_that_are_scored() -> None:
    """Nothing merges across the end of the first line, so that what is scored is how a list really begins."""
    tokenizer = load_decoder(STUDENT, device="cpu").tokenizer
    for label in classes():
        first = tokenizer.encode(f"{opening('disease')}{label}\n")
        assert tokenizer.encode(answer_text([label, classes()[0]], "disease"))[: len(first)] == first


def test_the_teacher_s_predictions_are_shares_of_one() -> None:
    records: Sequence[Record] = list(draw_cases(3, 0, "validation", showcase.SIDE))
    for prediction in showcase.teacher_predictions(load_encoder(TEACHER, device="cpu"), records):
        assert sum(entry["probability"] for entry in prediction.ranking) == pytest.approx(1, abs=1e-5)


def test_builtin_names_stand_where_a_file_of_cases_may() -> None:
    assert is_builtin("builtin:rare-disease")
    assert not is_builtin("cases.csv")
    assert not is_builtin([Record("a")])
    assert [record.id for record in cases("builtin:rare-disease", "test", 2)] == ["rare-test-0-0", "rare-test-0-1"]
    assert next(cases("builtin:tissue", "test", 1)).label is not None
    with pytest.raises(ConfigError, match="builtin:rare-disease, builtin:tissue"):
        cases("builtin:nothing")
    asked = {"model": STUDENT, "labels": classes(), "device": "cpu"}
    assert next(pipeline.predict("builtin:rare-disease", **asked)).id.startswith("rare-")


@pytest.mark.parametrize("words", [["cases.csv"], ["--teacher", "there", "--pairs", "p.jsonl"], ["--dry-run"]])
def test_half_of_what_is_needed_is_refused_in_one_line(words: list[str]) -> None:
    said = CliRunner().invoke(cli, ["align", *words])
    assert said.exit_code == 2
    assert "wanted --pairs FILE, or CASES with --teacher, or none of them" in said.output
