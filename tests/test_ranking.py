"""Scores to rankings: order, ties, candidates, temperature, and what is refused by name."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mint.errors import ConfigError, RecordError
from mint.ranking import rank

CLASSES = ("Kabuki", "Noonan", "Williams")


def test_classes_come_best_first_with_their_scores() -> None:
    (ranking,) = rank(["case"], torch.tensor([[0.5, 2.0, 1.0]]), CLASSES)
    assert ranking.id == "case"
    assert ranking.labels == ("Noonan", "Williams", "Kabuki")
    assert ranking.scores == (2.0, 1.0, 0.5)


def test_equal_scores_keep_the_order_of_the_classes() -> None:
    classes = tuple(f"class {c}" for c in range(300))
    scores = torch.zeros(2, 300)
    scores[1, 150] = 1.0
    level, raised = rank(["a", "b"], scores, classes)
    assert level.labels == classes
    assert raised.labels == ("class 150", *classes[:150], *classes[151:])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([-3.0, 0.0, 0.25, 7.5]), min_size=1, max_size=12))
def test_a_ranking_is_what_a_stable_sort_gives(scores: list[float]) -> None:
    classes = [f"c{i}" for i in range(len(scores))]
    (ranking,) = rank(["x"], torch.tensor([scores]), classes)
    assert list(ranking.labels) == [classes[i] for i in sorted(range(len(scores)), key=lambda i: -scores[i])]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_is_refused_by_case_and_class(bad: float) -> None:
    scores = torch.zeros(2, 3)
    scores[1, 2] = bad
    with pytest.raises(RecordError, match=r"case 'second'.*'Williams'"):
        rank(["first", "second"], scores, CLASSES)


def test_candidates_narrow_one_case_and_leave_the_other_whole() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    narrow, whole = rank(["a", "b"], scores, CLASSES, candidates=[["Williams", "Noonan"], None])
    assert narrow.labels == ("Noonan", "Williams")
    assert narrow.scores == (2.0, 1.0)
    assert whole.labels == CLASSES


def test_a_candidate_that_the_teacher_lacks_is_refused_by_case() -> None:
    with pytest.raises(RecordError, match=r"case 'a'.*'Turner'"):
        rank(["a"], torch.zeros(1, 3), CLASSES, candidates=[["Turner"]])
    with pytest.raises(RecordError, match="case 'a': no candidates"):
        rank(["a"], torch.zeros(1, 3), CLASSES, candidates=[[]])


def test_a_temperature_turns_scores_into_log_probabilities_over_the_candidates() -> None:
    scores = torch.tensor([[math.log(9.0), 50.0, 0.0]])
    (sharp,) = rank(["a"], scores, CLASSES, candidates=[["Kabuki", "Williams"]], temperature=1.0)
    assert [math.exp(score) for score in sharp.scores] == pytest.approx([0.9, 0.1])
    (flat,) = rank(["a"], scores, CLASSES, candidates=[["Kabuki", "Williams"]], temperature=2.0)
    assert [math.exp(score) for score in flat.scores] == pytest.approx([0.75, 0.25])
    assert flat.labels == sharp.labels == ("Kabuki", "Williams")


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_above_zero_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        rank(["a"], torch.zeros(1, 3), CLASSES, temperature=temperature)


def test_low_precision_scores_on_a_graph_are_ranked_as_they_are() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.bfloat16, requires_grad=True)
    (ranking,) = rank(["a"], scores, CLASSES)
    assert ranking.labels == ("Noonan", "Williams", "Kabuki")


def test_wrong_shapes_and_repeated_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(1, 2\).*\(1, 3\)"):
        rank(["a"], torch.zeros(1, 2), CLASSES)
    with pytest.raises(ConfigError, match="'Kabuki' occurs twice"):
        rank(["a"], torch.zeros(1, 2), ("Kabuki", "Kabuki"))
    with pytest.raises(ConfigError, match="candidates for 2 cases"):
        rank(["a"], torch.zeros(1, 3), CLASSES, candidates=[None, None])
    assert rank([], torch.zeros(0, 3), CLASSES) == []
