"""The parts of an experiment that can be worked out by hand: splits, folds, the bootstrap over cases and seeds, choices."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mint.answers import answer_text, opening
from mint.builtin.cases import STUDENT, TEACHER
from mint.builtin.portraits import with_drawn_face
from mint.commands.experiment import experiment
from mint.config import AlignSettings
from mint.decoders import load_decoder
from mint.errors import ConfigError, RecordError
from mint.evaluation.bootstrap import crossed_means
from mint.experiment import Bench, arms, builtin_task, file_task, tasks
from mint.experiment.crossfit import bayes, crossfit, fusion
from mint.experiment.figures import case_figures, with_interval
from mint.experiment.splits import closed_set, fold_of, in_validation, sides
from mint.experiment.tellings import retold
from mint.experiment.variations import grid, parse_vary
from mint.jsonlines import read_json_lines, write_json_lines
from mint.records.notes import compose_note
from mint.scoring import Ranker
from mint.showcase import SETTINGS
from mint.types import Prediction, Record

CASES = [Record(f"c{n}", note="n", label="AB"[n % 2], terms=("yx"[n % 2],), group=f"PMID:{n // 3}") for n in range(60)]


def test_the_split_is_the_rule_of_the_publications() -> None:
    """A case is validation when the first 8 hex digits of sha256("mint-real-v1|pub|" + pmid), modulo 100, lie in 30..47."""
    for number in range(500):
        pmid = f"PMID:{number}"
        place = int(hashlib.sha256(b"mint-real-v1|pub|" + pmid.encode()).hexdigest()[:8], 16) % 100
        assert in_validation(pmid) == (place in range(30, 48)), pmid
    assert in_validation("PMID:35285020")
    assert not in_validation("PMID:36051692")
    learnt, judged = sides(CASES)
    assert {record.group for record in learnt}.isdisjoint(record.group for record in judged)
    assert len(learnt) + len(judged) == 60
    assert judged


def test_splits_that_the_cases_name_hold() -> None:
    named = [replace(case, split="test" if case.id == "c5" else "train", group=None) for case in CASES]
    learnt, judged = sides(named)
    assert [record.id for record in judged] == ["c5"]
    assert len(learnt) == 59


def test_the_closed_set_has_the_diseases_of_enough_cases() -> None:
    more = [*CASES, *(Record(f"r{n}", label="rare") for n in range(9))]
    assert closed_set(more, 10) == ("A", "B")
    assert closed_set(more, 9) == ("A", "B", "rare")
    with pytest.raises(RecordError, match="--min-cases"):
        closed_set(more, 1000)


def test_no_case_is_scored_by_a_teacher_that_has_learnt_from_its_publication(tmp_path: Path) -> None:
    met: list[tuple[set[str | None], set[str | None]]] = []

    def watched(learnt: Sequence[Record], others: Sequence[Record], classes: Sequence[str], folder: Path):  # type: ignore[no-untyped-def]
        met.append(({record.group for record in learnt}, {record.group for record in others}))
        return bayes(learnt, others, classes, folder)

    learnt, judged = sides(CASES)
    path = crossfit(learnt, judged, ("A", "B"), tmp_path, 3, watched)
    assert len(met) == 4
    assert all(taught.isdisjoint(scored) for taught, scored in met)
    assert {fold_of(record, 3) for record in learnt} == {0, 1, 2}
    rows = {row["id"]: row["scores"] for _, row in read_json_lines(path)}
    assert sorted(rows) == sorted(record.id for record in CASES)
    assert all(max(rows[record.id], key=rows[record.id].get) == record.label for record in CASES)
    assert crossfit(learnt, judged, ("A", "B"), tmp_path, 3, None) == path  # type: ignore[arg-type]  # nothing is done again
    with pytest.raises(ConfigError, match="--folds 1"):
        crossfit(learnt, judged, ("A", "B"), tmp_path / "other", 1, watched)


def test_a_fusion_encoder_is_cross_fitted_with_drawn_faces(tmp_path: Path) -> None:
    """A class that only one publication has is unknown to the teacher of its fold: it scores as the mean of the others."""
    cases = [
        with_drawn_face(Record(f"f{n}", note="Seizure", label=label, terms=("Ptosis",), group=group), size=32)
        for n, (label, group) in enumerate(
            [("A", "q0"), ("B", "q2"), ("A", "q1"), ("B", "q3"), ("C", "q4"), ("C", "q4")]
        )
    ]
    assert {fold_of(case, 2) for case in cases} == {0, 1}
    trains = fusion("cpu", base=TEACHER, epochs=1, batch_size=8, loss="cross_entropy")
    path = crossfit(cases, cases[:1], ("A", "B", "C"), tmp_path, 2, trains)
    rows = [row for _, row in read_json_lines(path)]
    assert sorted(row["id"] for row in rows) == ["f0", "f0", "f1", "f2", "f3", "f4", "f5"]
    unknown = next(row["scores"] for row in rows if row["id"] == "f4")
    assert unknown["C"] == pytest.approx((unknown["A"] + unknown["B"]) / 2)
    assert (tmp_path / "all" / "encoder" / "model.safetensors").is_file()


def test_runs_that_differ_by_the_seed_alone_vary_by_the_draw_of_seeds() -> None:
    """Two seeds, all cases 0 in the one and 1 in the other: the mean is 0, 1/2, 1 with chances 1/4, 1/2, 1/4."""
    means = crossed_means(np.array([[0.0] * 5, [1.0] * 5]), list("abcde"), 4000, 0)
    values, counts = np.unique(means, return_counts=True)
    assert values.tolist() == [0.0, 0.5, 1.0]
    assert counts / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def test_cases_of_a_group_are_drawn_together() -> None:
    """Groups of 3 cases (all right) and of 1 (wrong): both, or one of them twice."""
    means = crossed_means(np.array([[1.0, 1.0, 1.0, 0.0]] * 3), ["a", "a", "a", "b"], 2000, 0)
    values, counts = np.unique(means, return_counts=True)
    assert values.tolist() == [0.0, 0.75, 1.0]
    assert counts / 2000 == pytest.approx([0.25, 0.5, 0.25], abs=0.04)


def test_the_spread_over_cases_and_that_over_seeds_add_up() -> None:
    """Of values a_s + b_n the resampled means have the variance of a over S plus that of b over N."""
    random = np.random.default_rng(0)
    of_seed, of_case = random.normal(size=6), random.normal(size=50)
    means = crossed_means(of_seed[:, None] + of_case, [str(n) for n in range(50)], 20000, 1)
    assert means.mean() == pytest.approx(of_seed.mean() + of_case.mean(), abs=0.02)
    assert means.var() == pytest.approx(of_seed.var() / 6 + of_case.var() / 50, rel=0.05)


def test_a_system_without_a_seed_stands_for_each_and_differences_are_paired() -> None:
    records = [Record("one", label="A"), Record("two", label="B")]
    right = [Prediction("one", ({"label": "A"},)), Prediction("two", ({"label": "B"},))]
    wrong = [Prediction("one", ({"label": "B"}, {"label": "A"})), Prediction("two", ({"label": "B"},))]
    once = case_figures({0: wrong}, records, ("A", "B"), [0, 1, 2])
    assert once["top_1"].tolist() == [[0, 1]] * 3
    each = case_figures({0: wrong, 1: right, 2: right}, records, ("A", "B"), [0, 1, 2])
    assert (each["top_1"] - once["top_1"]).tolist() == [[0, 0], [1, 0], [1, 0]]
    told = with_interval(each["top_1"], ["one", "two"])
    assert told["seeds"] == [0.5, 1.0, 1.0]
    assert told["value"] == pytest.approx(5 / 6)
    assert each["mean_reciprocal_rank"][0].tolist() == [0.5, 1.0]
    none, never = each["top_1"] * 0, 1 - 0.025**0.5  # of two groups
    assert with_interval(none, ["one", "two"], share=True)["interval"] == pytest.approx([0, never])
    same = with_interval(each["top_1"] - each["top_1"], ["one", "two"])
    assert same["interval"] == [0.0, 0.0]


def test_what_is_varied_is_read_with_its_kind() -> None:
    assert parse_vary("chosen-k=1,5,10") == ("chosen-k", [1, 5, 10])
    assert parse_vary("beta=0.1, 1") == ("beta", [0.1, 1.0])
    assert parse_vary("batch-size=4") == ("batch-size", [4])
    assert parse_vary("rejected=near,random") == ("rejected", ["near", "random"])
    for wrong in ("chosen-k", "nothing=1", "model=a", "lr=fast", "lr="):
        with pytest.raises(ConfigError, match="--vary"):
            parse_vary(wrong)


def test_the_grid_is_the_same_few_points_around_the_settings() -> None:
    settings = AlignSettings(**{**SETTINGS, "lr": 1e-3, "epochs": 2.0})
    assert grid(settings, (), ()) == [(5e-4, 2.0), (1e-3, 2.0), (2e-3, 2.0)]
    assert grid(settings, (1.0,), (1.0, 3.0)) == [(1.0, 1.0), (1.0, 3.0)]


def test_dpo_takes_its_own_rate_unless_tuning_found_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    monkeypatch.setattr("mint.pipeline.align", lambda settings, *_, **__: rates.append(settings.lr))
    task = builtin_task(train=4, test=4)
    bench = Bench(task, AlignSettings(lr=0.5), tmp_path, dpo_lr=0.25, _pairs={0: []})
    for its in (bench, replace(bench, dpo_lr=None), replace(bench, own={"dpo": {"lr": 0.125}})):
        for name in ("orpo", "dpo"):
            arms._trained(its, name, 0)
    assert rates == [0.5, 0.25, 0.5, 0.5, 0.5, 0.125]


def test_a_case_is_told_in_parts_and_ranked_whole(tmp_path: Path) -> None:
    """Each telling has a part of the note's findings; the teacher's lists stay those of the whole case."""
    findings = [f"Finding {number}" for number in range(8)]
    rows = [
        {"id": f"c{n}", "label": "ABC"[n % 3], "terms": findings[n % 3 :], "sex": "male", "group": f"p{n}"}
        for n in range(40)
    ]
    write_json_lines(tmp_path / "cases.jsonl", rows)
    task = file_task(tmp_path / "cases.jsonl", folder=tmp_path, teacher="bayes", min_cases=5)
    bench = Bench(task, AlignSettings(), tmp_path, {"chosen_k": 2, "rejected_q": 1}, tellings=3)
    cases, pairs = bench.learnt(0), bench.pairs(0)
    assert len({pair.id for pair in pairs}) == len(pairs) == 3 * len(cases)
    assert pairs[: len(cases)] == replace(bench, tellings=1, _pairs={}).pairs(0)
    parts = set()
    for place, (pair, label) in enumerate(zip(pairs, arms._labelled(bench, 0), strict=True)):
        case, whole = cases[place % len(cases)], pairs[place % len(cases)]
        assert (pair.chosen, pair.rejected) == (whole.chosen, whole.rejected)
        assert label.chosen[0]["content"] == answer_text([case.label or ""], "disease")
        said = [finding for finding in findings if finding in str(pair.prompt)]
        assert said
        assert set(said) <= set(case.terms)
        parts.add(len(said) / len(case.terms))
    assert len(parts) > 5


def test_a_note_that_was_written_is_not_told_in_parts() -> None:
    bare = Record("c", terms=tuple(f"Finding {number}" for number in range(20)))
    case, written = replace(bare, note=compose_note(bare)), replace(bare, note="A boy with a long history.")
    assert retold(written, written.terms, "0:1") is written
    assert retold(case, (), "0:1") is case
    tellings = {retold(case, case.terms, f"0:{number}").note for number in range(20)}
    assert len(tellings) > 15
    assert tellings == {retold(case, case.terms, f"0:{number}").note for number in range(20)}


def test_a_label_alone_on_its_list_ends_with_the_turn() -> None:
    """As an answer of SFT on the true label is written, token for token."""
    decoder = load_decoder(STUDENT, device="cpu", dtype="float32")
    labels = ["Noonan syndrome", "Kabuki syndrome", "Noonan syndrome 2"]
    ranker = Ranker(decoder, labels, opening=opening("disease"), alone=True)
    prompt = [{"role": "user", "content": "Who is it?"}]
    (found,) = ranker.logp([ranker.prompt(prompt)])
    start = len(ranker.layout.opening)
    asked = decoder.tokenizer.chat_ids(prompt, generate=True)
    for label, logp in zip(labels, found.tolist(), strict=True):
        answer = decoder.tokenizer.answer_ids([{"role": "assistant", "content": answer_text([label], "disease")}])
        steps = decoder.logits([[*asked, *answer]])[0, len(asked) - 1 : -1].log_softmax(-1)
        each = steps[torch.arange(len(answer)), answer]
        assert logp == pytest.approx(float(each[start:].sum()), abs=1e-3)


def test_scores_in_a_file_are_numbers_of_each_class(tmp_path: Path) -> None:
    (row, *_) = bayes(CASES, CASES[:2], ("A", "B"), tmp_path)
    assert json.loads(json.dumps(row)) == row
    assert set(row["scores"]) == {"A", "B"}


def test_the_help_names_the_number_of_cases_that_a_seed_really_learns_from(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def draw(count: int, *_: object) -> list[Record]:
        drawn.append(count)
        return []

    monkeypatch.setattr(tasks, "draw_cases", draw)
    monkeypatch.setattr(tasks, "ceiling", lambda *_: {})
    monkeypatch.setattr(tasks, "reading_learnt_whole", lambda *_: {})
    builtin_task(device="cpu").learnt(0, None)
    said = next(option.help for option in experiment.params if option.name == "train")
    assert drawn[-1] == tasks.TRAIN
    assert f"[default: {tasks.TRAIN};" in said
