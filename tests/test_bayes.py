"""Naive Bayes against a case worked out by hand, and what it makes of what it has never counted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mint.bayes import NaiveBayes, words
from mint.errors import ConfigError

CASES = [({"x"}, "A"), ({"x", "y"}, "A"), ({"y"}, "B")]


def test_it_is_the_formula_worked_out_by_hand() -> None:
    """Everywhere: x and y 3/5. In A: x (2 + .6) / 3, y (1 + .6) / 3. In B: x .6 / 2, y 1.6 / 2. Priors 3/5 and 2/5."""
    model = NaiveBayes(CASES, ["A", "B"])
    joint = {"A": 0.6 * (2.6 / 3) * (1 - 1.6 / 3), "B": 0.4 * 0.3 * (1 - 0.8)}
    found = np.exp(model.log_posterior({"x"}))
    assert found == pytest.approx([joint["A"] / sum(joint.values()), joint["B"] / sum(joint.values())])
    nothing = {"A": 0.6 * (1 - 2.6 / 3) * (1 - 1.6 / 3), "B": 0.4 * 0.7 * 0.2}
    assert math.exp(model.log_posterior(())[0]) == pytest.approx(nothing["A"] / sum(nothing.values()))


def test_an_item_that_was_never_counted_says_nothing_and_one_given_twice_counts_once() -> None:
    model = NaiveBayes(CASES, ["A", "B"])
    assert model.log_posterior({"x", "new"}) == pytest.approx(model.log_posterior({"x"}))
    assert model.log_posterior(("y", "y")) == pytest.approx(model.log_posterior({"y"}))


def test_a_class_without_cases_is_possible_and_an_item_of_all_cases_is_not_certain() -> None:
    model = NaiveBayes([({"x"}, "A"), ({"x"}, "B")], ["A", "B", "C"])
    assert np.isfinite(model.log_posterior(())).all()
    assert math.exp(model.log_posterior({"x"})[2]) > 0.1


def test_the_same_cases_give_the_same_bits_in_any_order_of_their_items() -> None:
    names = [f"finding {number}" for number in range(60)]
    cases = [(names[number : number + 20], "ab"[number % 2]) for number in range(40)]
    turned = [(items[::-1], label) for items, label in cases]
    one, other = (NaiveBayes(told, "ab").log_posterior for told in (cases, turned))
    for start in range(30):
        assert one(names[start : start + 30]).tobytes() == other(names[start : start + 30][::-1]).tobytes()


def test_a_prediction_ranks_all_classes_by_shares_of_one() -> None:
    entries = NaiveBayes(CASES, ["A", "B"]).predict("one", {"y"}).ranking
    assert {entry["label"] for entry in entries} == {"A", "B"}
    assert sum(entry["probability"] for entry in entries) == pytest.approx(1)
    assert entries[0]["logprob"] >= entries[1]["logprob"]


def test_the_words_of_a_note_have_no_case_and_no_signs() -> None:
    assert words("Sex male. Age 3 years; Short-stature!") == {"sex", "male", "age", "3", "years", "short", "stature"}


def test_no_cases_are_refused() -> None:
    with pytest.raises(ConfigError, match="no cases"):
        NaiveBayes([], ["A"])
