"""Figures of predictions with numbers worked by hand, and their intervals."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from mint.commands import cli
from mint.errors import ConfigError, RecordError
from mint.evaluation import NOTHING, OUTSIDE, Outcome, judge, lists_of_pairs, measure, summarise
from mint.evaluation.bootstrap import interval, resampled_sums
from mint.labels import LabelSet
from mint.types import Prediction, PreferencePair, Record

ABCD = LabelSet(["A", "B", "C", "D"], {"Alpha": "A"})


def said(case: str, *labels: str, p: float | None = None) -> Prediction:
    ranking = [{"label": label} for label in labels]
    if p is not None:
        ranking[0]["probability"] = p  # type: ignore[assignment]
    return Prediction(id=case, ranking=tuple(ranking))


def true(case: str, label: str, **more: Any) -> Record:
    return Record(id=case, label=label, **more)


FOUR = [true("1", "A"), true("2", "B"), true("3", "C"), true("4", "D")]
ANSWERS = [said("1", "A", "B", "C"), said("2", "A", "B", "C"), said("3", "A", "B", "D"), said("4", "B", "C", "A", "D")]


def test_top_k_and_mean_reciprocal_rank_by_hand() -> None:
    metrics = measure(ANSWERS, FOUR, labels=ABCD, tops=(1, 2, 4)).metrics
    # The true label stands at place 1, at 2, nowhere, and at 4.
    assert metrics["top_1"] == 1 / 4
    assert metrics["top_2"] == 2 / 4
    assert metrics["top_4"] == 3 / 4
    assert metrics["mean_reciprocal_rank"] == (1 + 1 / 2 + 0 + 1 / 4) / 4
    assert metrics["outside_set"] == 0
    assert metrics["no_answer"] == 0
    assert metrics["cases"] == 4
    assert metrics["classes"] == 4


def test_the_order_of_the_predictions_does_not_matter() -> None:
    assert measure(ANSWERS[::-1], FOUR, labels=ABCD) == measure(ANSWERS, FOUR, labels=ABCD)


def test_spellings_and_aliases_count_as_the_label_and_repeats_once() -> None:
    (outcome,) = judge([said("1", "b", " B.", "ALPHA", "C")], [true("1", "alpha")], labels=ABCD, tops=(1, 2))
    assert outcome.truth == "A"
    assert outcome.figures["top_2"] == 1
    assert outcome.figures["mean_reciprocal_rank"] == 1 / 2


@pytest.mark.parametrize(("answer", "places"), [("ABA", "AB"), ("ABAB", "AB"), ("BBAACB", "BAC"), ("ABCA", "ABC")])
def test_a_name_that_an_answer_repeats_stands_at_its_first_place_however_often_it_comes(
    answer: str, places: str
) -> None:
    for place, label in enumerate(places, start=1):
        (outcome,) = judge([said("1", *answer)], [true("1", label)], labels=ABCD)
        assert outcome.first == places[0]
        assert outcome.figures["mean_reciprocal_rank"] == 1 / place


def test_names_outside_the_set_are_a_share_of_those_given() -> None:
    answers = [said("1", "A", "X", "Y", "B"), Prediction(id="2", text="1. Moon disease\n2. moon disease\n3. B")]
    outcomes = judge(answers, FOUR[:2], labels=ABCD, tops=(1, 4))
    assert [outcome.figures["outside_set"] for outcome in outcomes] == [2 / 4, 1 / 2]
    assert [outcome.first for outcome in outcomes] == ["A", OUTSIDE]
    report = summarise(outcomes)
    assert report.metrics["outside_set"] == 1 / 2
    assert ("B", OUTSIDE, 1) in report.confusion


def test_only_the_first_names_count_as_outside_the_set() -> None:
    (outcome,) = judge([said("1", "A", "X")], FOUR[:1], labels=ABCD, tops=(1,))
    assert outcome.figures["outside_set"] == 0


def test_an_empty_answer_is_wrong_and_counted_never_nan() -> None:
    report = measure([Prediction(id="1", text="")], FOUR[:1], labels=ABCD, lists={"1": (["A"], ["B"])})
    assert report.metrics["no_answer"] == 1
    assert report.metrics["top_10"] == 0
    assert (report.metrics["coverage"], report.metrics["avoidance"], report.metrics["car"]) == (0, 1, 0)
    assert report.confusion == [("A", NOTHING, 1)]
    assert all(math.isfinite(value) for value in report.metrics.values())


def test_any_of_several_true_labels_is_right() -> None:
    (outcome,) = judge([said("1", "C", "B")], [Record(id="1", labels=("B", "C"))], labels=ABCD)
    assert outcome.figures["top_1"] == 1


def test_a_similar_name_counts_only_on_request() -> None:
    known = LabelSet(["Kabuki syndrome", "Noonan syndrome"])
    answer, truth = [said("1", "Kabukii syndrom")], [true("1", "Kabuki syndrome")]
    assert measure(answer, truth, labels=known).metrics["top_1"] == 0
    assert measure(answer, truth, labels=known, similarity=0.8).metrics["top_1"] == 1


def test_coverage_avoidance_and_car_by_hand() -> None:
    known = LabelSet([f"c{i}" for i in range(12)])
    lists = {"1": ([f"c{i}" for i in range(4)], ["c10", "c11"])}
    answer = [said("1", "c0", "c1", "c5", "c10", "c2", "c11")]  # the first four: two of the teacher's, one rejected
    metrics = measure(answer, [true("1", "c0")], labels=known, lists=lists, car_weight=0.5).metrics
    assert metrics["coverage"] == 2 / 4
    assert metrics["avoidance"] == 1 - 1 / 2
    assert metrics["car"] == pytest.approx(1.5 * 0.5 * 0.5 / (0.5 * 0.5 + 0.5))
    evenly = measure(answer, [true("1", "c0")], labels=known, lists=lists, car_weight=1.0).metrics
    assert evenly["car"] == pytest.approx(2 * 0.5 * 0.5 / (0.5 + 0.5))


def test_a_short_answer_does_not_gain_coverage() -> None:
    lists = {"1": (["A", "B"], ["D"])}
    assert measure([said("1", "A")], FOUR[:1], labels=ABCD, lists=lists).metrics["coverage"] == 1 / 2


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(12)), st.permutations(range(12)))
def test_full_answers_of_k_equal_to_q_have_the_published_figures(answer: list[int], teacher: list[int]) -> None:
    known = LabelSet([f"c{i}" for i in range(12)])
    chosen, rejected, given_names = ([f"c{i}" for i in part] for part in (teacher[:5], teacher[-5:], answer[:5]))
    metrics = measure(
        [said("1", *given_names)], [true("1", "c0")], labels=known, lists={"1": (chosen, rejected)}
    ).metrics
    coverage = sum(name in chosen for name in given_names) / len(given_names)
    avoidance = 1 - sum(name in rejected for name in given_names) / len(given_names)
    below = 0.5 * coverage + avoidance
    assert metrics["coverage"] == pytest.approx(coverage)
    assert metrics["avoidance"] == pytest.approx(avoidance)
    assert metrics["car"] == pytest.approx(1.5 * coverage * avoidance / below if below else 0)


def test_the_lists_of_a_pair_are_the_names_of_its_two_answers() -> None:
    pair = PreferencePair(
        "1", [], [{"role": "assistant", "content": "1. A\n2. b"}], [{"role": "assistant", "content": "1. D"}]
    )
    lists = lists_of_pairs([pair], ABCD)
    assert lists == {"1": (["A", "b"], ["D"])}
    assert measure([said("1", "B", "D")], FOUR[:1], labels=ABCD, lists=lists).metrics["coverage"] == 1 / 2
    assert lists_of_pairs([PreferencePair("1", "x", "1. A", "1. C")], ABCD) == {"1": (["A"], ["C"])}
    with pytest.raises(RecordError, match="case '2': has no list"):
        measure(ANSWERS[:2], FOUR[:2], labels=ABCD, lists=lists)


def test_the_command_tells_coverage_avoidance_and_car_of_pairs_and_likeness_only_where_asked(tmp_path: Path) -> None:
    files = {
        "truth.jsonl": [{"id": "1", "note": "x", "label": "Kabuki syndrome"}, {"id": "2", "note": "y", "label": "B"}],
        "said.jsonl": [{"id": "1", "text": "1. Kabuki syndrom\n2. B"}, {"id": "2", "text": "1. B\n2. C"}],
        "pairs.jsonl": [
            {"id": i, "prompt": "p", "chosen": "1. B\n2. Kabuki syndrome", "rejected": "1. C"} for i in "12"
        ],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "labels.txt").write_text("Kabuki syndrome\nB\nC\n")
    words = [
        "evaluate",
        "said.jsonl",
        "--truth",
        "truth.jsonl",
        "--labels",
        "labels.txt",
        "--pairs",
        "pairs.jsonl",
        "--json",
    ]
    words = [str(tmp_path / word) if "." in word else word for word in words]
    found = json.loads(CliRunner().invoke(cli, words).output)
    assert (found["top_1"], found["coverage"], found["avoidance"]) == (0.5, 0.5, 0.5)
    assert found["car"] == pytest.approx((1.5 * 0.5 / (0.25 + 1)) / 2)
    alike = json.loads(CliRunner().invoke(cli, [*words, "--similarity", "0.9"]).output)
    assert (alike["top_1"], alike["coverage"]) == (1.0, 0.75)
    (tmp_path / "photo.png").write_bytes(b"x")
    (tmp_path / "inner").mkdir()
    shown = [{**row, "image": "../photo.png"} for row in files["pairs.jsonl"]]
    (tmp_path / "inner/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown))
    words[words.index("--pairs") + 1] = str(tmp_path / "inner/pairs.jsonl")
    refused = CliRunner().invoke(cli, words)
    assert (refused.exit_code, "inner/pairs.jsonl:1: image '../photo.png'" in refused.stderr) == (2, True)
    assert json.loads(CliRunner().invoke(cli, [*words, "--image-folder", str(tmp_path)]).output) == found


def test_calibration_error_by_hand() -> None:
    answers = [said("1", "A", p=0.95), said("2", "B", p=0.91), said("3", "A", p=0.15), said("4", "D", p=1.0)]
    report = measure(answers, FOUR, labels=ABCD, bins=10)
    # One case at .15, wrong: gap .15. Three from .9 up, all right: mean .9533, gap .0466.
    assert report.metrics["calibration_error"] == pytest.approx((0.15 + (0.05 + 0.09 + 0.0)) / 4)
    low, high = report.calibration
    assert (low["low"], low["count"], low["confidence"], low["accuracy"]) == (0.1, 1, 0.15, 0)
    assert (high["low"], high["high"], high["count"], high["accuracy"]) == (0.9, 1.0, 3, 1)
    assert report.intervals["calibration_error"][0] <= report.metrics["calibration_error"]


def test_right_and_wrong_answers_of_one_bin_weigh_each_other_out() -> None:
    answers = [said("1", "A", p=0.5), said("2", "A", p=0.5)]  # one right, one wrong, both at one half
    assert measure(answers, FOUR[:2], labels=ABCD).metrics["calibration_error"] == 0


def test_without_probabilities_there_is_no_calibration() -> None:
    report = measure(ANSWERS, FOUR, labels=ABCD)
    assert report.calibration == []
    assert "calibration_error" not in report.metrics


def test_the_table_of_classes_and_the_confusion_by_hand() -> None:
    cases = [true("1", "A"), true("2", "A"), true("3", "A"), true("4", "B")]
    answers = [said("1", "A", "B"), said("2", "A", "B"), said("3", "B", "A"), said("4", "A", "B")]
    report = measure(answers, cases, labels=ABCD, tops=(1, 2))
    first, second = report.per_class
    assert (first["label"], first["cases"], first["top_1"], first["top_2"]) == ("A", 3, 2 / 3, 1)
    assert (first["named_first"], first["precision"]) == (3, 2 / 3)
    assert (second["label"], second["top_1"], second["named_first"], second["precision"]) == ("B", 0, 1, 0)
    assert report.metrics["macro_top_1"] == pytest.approx((2 / 3 + 0) / 2)
    assert report.confusion == [("A", "A", 2), ("A", "B", 1), ("B", "A", 1)]


def test_an_interval_holds_its_mean_repeats_with_its_seed_and_narrows_with_cases() -> None:
    def report(copies: int, seed: int = 0) -> Any:
        cases = [true(str(i), "AB"[i % 2]) for i in range(20 * copies)]
        answers = [said(str(i), "A", "B") for i in range(20 * copies)]
        return measure(answers, cases, labels=ABCD, seed=seed)

    few, many = report(1), report(16)
    for some in (few, many):
        low, high = some.intervals["top_1"]
        assert low < some.metrics["top_1"] < high
    width = [high - low for low, high in (few.intervals["top_1"], many.intervals["top_1"])]
    assert 3 < width[0] / width[1] < 5.5  # sqrt(16) = 4
    assert report(1) == few
    assert report(1, seed=1).intervals != few.intervals


def test_the_interval_of_a_share_is_about_two_standard_errors() -> None:
    values = np.r_[np.ones(300), np.zeros(700)]
    sums = resampled_sums(np.stack([values, np.ones(1000)], axis=1), [str(case) for case in range(1000)], 2000, 0)
    low, high = interval(sums[:, 0] / sums[:, 1], 0.95)
    error = math.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - 1.96 * error, abs=0.003)
    assert high == pytest.approx(0.3 + 1.96 * error, abs=0.003)


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_a_share_of_none_or_of_all_is_no_certainty(right: float) -> None:
    """Of 20 groups all alike: a share of 1 - 0.025^(1/20) = 16.8 % of the others still shows none in one of 40 samples."""
    figures = {"top_1": right, "mean_reciprocal_rank": right, "outside_set": 0.0}
    found = summarise([Outcome(str(n), str(n // 2), "a", "a", figures) for n in range(40)]).intervals
    far = 1 - 0.025 ** (1 / 20)
    assert found["top_1"] == pytest.approx((0.0, far) if right == 0 else (1 - far, 1.0))
    assert found["outside_set"] == (0.0, 0.0)  # of a ranking it is 0 by its making
    assert (1 - far) ** 20 == pytest.approx(0.025)


def test_cases_of_one_group_are_drawn_together() -> None:
    cases = [true(str(i), "AB"[i < 50], group=f"publication {i // 10}") for i in range(100)]
    answers = [said(str(i), "A", "B") for i in range(100)]
    grouped = measure(answers, cases, labels=ABCD).intervals["top_1"]
    alone = measure(answers, [true(case.id, case.label or "") for case in cases], labels=ABCD).intervals["top_1"]
    assert grouped[1] - grouped[0] > 2 * (alone[1] - alone[0])
    copies = [[i // 10, 1.0] for i in range(100)]
    sums = resampled_sums(np.array(copies), [case.group or "" for case in cases], 50, 0)
    assert set(sums[:, 1]) == {100.0}  # ten groups of ten
    assert set(sums[:, 0] % 10) == {0.0}


def test_two_systems_meet_the_same_draws_so_their_difference_has_an_interval() -> None:
    first, second = np.array([[1.0], [0.0], [1.0], [1.0]]), np.array([[0.0], [0.0], [1.0], [0.0]])
    groups = ["a", "b", "c", "d"]
    drawn = resampled_sums(first, groups, 20, 3) - resampled_sums(second, groups, 20, 3)
    assert np.array_equal(drawn, resampled_sums(first - second, groups, 20, 3))


def test_many_cases_are_measured_quickly_and_in_pieces() -> None:
    begin = time.perf_counter()
    sums = resampled_sums(np.ones((20_000, 8)), [str(i) for i in range(20_000)], 300, 0)
    assert sums.shape == (300, 8)
    assert np.all(sums == 20_000)
    assert time.perf_counter() - begin < 10


def test_cases_missing_on_either_side_or_twice_are_refused_by_name() -> None:
    for answers, cases, words in (
        (ANSWERS[:1], FOUR, r"case '2' \(and 2 more\) has no prediction"),
        (ANSWERS, FOUR[:3], "case '4' has a prediction but no truth"),
        ([ANSWERS[0], ANSWERS[0]], FOUR[:1], "case '1' is predicted twice"),
        (ANSWERS[:1], [FOUR[0], FOUR[0]], "case '1' is true twice"),
        ([], [], "no cases to evaluate"),
        ([said("5", "A")], [Record(id="5")], "case '5': has no label"),
        ([said("5", "A")], [true("5", "Z")], "case '5': its label 'Z' is none of the 4 labels"),
    ):
        with pytest.raises(RecordError, match=words):
            measure(answers, cases, labels=ABCD)
    with pytest.raises(ConfigError, match="tops"):
        measure(ANSWERS, FOUR, labels=ABCD, tops=())
    with pytest.raises(ConfigError, match="resamples 0"):
        measure(ANSWERS, FOUR, labels=ABCD, resamples=0)


def test_without_a_closed_set_the_true_labels_are_the_names_and_nothing_is_outside() -> None:
    metrics = measure(ANSWERS, FOUR).metrics
    assert metrics["top_1"] == 1 / 4
    assert "outside_set" not in metrics


def test_the_command_prints_each_metric_with_its_interval(tmp_path: Path) -> None:
    (tmp_path / "truth.jsonl").write_text("".join(f'{{"id": "{at}", "label": "{at % 2}"}}\n' for at in range(8)))
    lines = (f'{{"id": "{at}", "ranking": [{{"label": "0"}}, {{"label": "1"}}]}}\n' for at in range(8))
    (tmp_path / "predictions.jsonl").write_text("".join(lines))
    words = ["evaluate", str(tmp_path / "predictions.jsonl"), "--truth", str(tmp_path / "truth.jsonl")]
    shown = CliRunner().invoke(cli, words).stdout.splitlines()
    told = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)
    low, high = told["intervals"]["top_1"]
    assert 0 < low < told["top_1"] == 0.5 < high < 1
    assert shown[0] == f"top_1: 0.5 ({low:g} to {high:g})"
    assert "cases: 8" in shown
