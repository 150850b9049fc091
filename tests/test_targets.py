"""Losses, class weights, ranks and learning rates, with numbers that are worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mint.schedules import scheduled
from mint.teaching.targets import class_weights, losses, ranks
from mint.types import Record


def test_losses_with_numbers_worked_by_hand() -> None:
    logits, targets = torch.zeros(1, 4), torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(losses(logits, targets, "bce"), torch.tensor([4 * math.log(2)]))
    torch.testing.assert_close(losses(logits, targets, "cross_entropy"), torch.tensor([math.log(4)]))
    two = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    uneven = torch.tensor([[math.log(3), 0.0, 0.0, 0.0]])  # probabilities 1/2, 1/6, 1/6, 1/6
    torch.testing.assert_close(losses(uneven, two, "cross_entropy"), torch.tensor([(math.log(2) + math.log(6)) / 2]))


def test_class_weights_are_one_on_average_and_lift_the_rare() -> None:
    records = [Record(str(n), note="x", label="often" if n < 9 else "rare") for n in range(10)]
    assert class_weights(records, ("often", "rare", "never"), "none") == [1.0, 1.0, 0.0]
    often, rare, never = class_weights(records, ("often", "rare", "never"), "balanced")
    assert (round(often, 6), round(rare, 6), never) == (round(10 / 18, 6), 5.0, 0.0)
    assert class_weights(records, ("often", "rare"), "root")[1] == pytest.approx(2.5)


def test_the_rank_of_the_best_label_counts_ties_by_place() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [1.0, 1.0, 1.0], [0.1, 0.2, 0.3]])
    assert ranks(scores, [[2], [1], [0, 1]]).tolist() == [1, 1, 1]


def test_the_rate_goes_up_then_down() -> None:
    assert [scheduled(step, 6, "linear", 2) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert [scheduled(step, 4, "constant") for step in range(4)] == [1.0] * 4
    assert scheduled(2, 4, "cosine") == pytest.approx(0.5)
