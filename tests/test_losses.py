"""The objectives, with numbers worked by hand, and finite whatever the log-probabilities are."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mint.kernels import token_logprob
from mint.losses import OBJECTIVES, Answers, dpo_loss, ipo_loss, orpo_loss, sft_loss, simpo_loss

LOG2 = math.log(2)


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_orpo_of_two_answers_at_one_half_is_nll_plus_beta_log_2():
    """Odds 1 and 1, ratio 1, sigmoid of log 1 is 1/2."""
    assert orpo_loss(logs(0.5), logs(0.5), torch.tensor(3.0), 0.1).item() == pytest.approx(3 + 0.1 * LOG2)


def test_orpo_of_odds_three_to_one_third_is_the_logarithm_of_ten_ninths():
    """p = 3/4 has odds 3, p = 1/4 has odds 1/3: ratio 9, sigmoid(log 9) = 9/10. The second pair is reversed."""
    assert orpo_loss(logs(0.75), logs(0.25), torch.tensor(0.0), 1.0).item() == pytest.approx(math.log(10 / 9))
    both = orpo_loss(logs(0.75, 0.25), logs(0.25, 0.75), torch.tensor(1.0), 2.0).item()
    assert both == pytest.approx(1 + 2 * (math.log(10 / 9) + math.log(10)) / 2)


def test_dpo_of_a_policy_equal_to_its_reference_is_log_2():
    x, y = torch.tensor([-3.0, -4.0]), torch.tensor([-5.0, -1.0])
    assert dpo_loss(x, y, x, y, 0.1).item() == pytest.approx(LOG2)


def test_dpo_with_beta_one_and_margin_log_3_is_the_logarithm_of_four_thirds():
    """The chosen answer became three times as likely, the rejected one stayed: sigmoid(log 3) = 3/4."""
    reference = torch.tensor([-2.0])
    loss = dpo_loss(reference + math.log(3), reference, reference, reference, 1.0)
    assert loss.item() == pytest.approx(math.log(4 / 3))


def test_simpo_takes_its_margin_off():
    """beta (chosen - rejected) = 2 x 1 = 2, less a margin of 2: sigmoid(0) = 1/2."""
    assert simpo_loss(torch.tensor([-1.0]), torch.tensor([-2.0]), 2.0, 2.0).item() == pytest.approx(LOG2)


def test_ipo_wants_a_margin_of_one_over_two_beta():
    """beta = 1/2 wants 1: margin 0 costs 1, margin 1 costs 0, margin 3 costs 4; the mean of the three is 5/3."""
    zero = torch.zeros(3)
    assert ipo_loss(torch.tensor([0.0, 1.0, 3.0]), zero, zero, zero, 0.5).item() == pytest.approx(5 / 3)


def test_sft_is_the_negative_log_likelihood():
    assert sft_loss(torch.tensor(2.5)).item() == 2.5


def answers(chosen: torch.Tensor, rejected: torch.Tensor) -> Answers:
    constant = torch.tensor([-1.0])
    tokens = torch.tensor([3.0])
    return Answers(-chosen.mean(), chosen * 3, rejected * 3, chosen, rejected, constant, constant, tokens, tokens)


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_are_finite_from_zero_to_minus_ten_thousand(name, dtype):
    values = [0.0, -1e-38, -1e-9, -2e-8, -1e-3, -LOG2, -1.0, -20.0, -90.0, -110.0, -1e3, -1e4]
    for c, r in itertools.product(values, values):
        chosen, rejected = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in (c, r))
        loss = OBJECTIVES[name].loss(answers(chosen, rejected), 0.1)
        loss.backward()
        for what in (loss, *(x.grad for x in (chosen, rejected) if x.grad is not None)):
            assert torch.isfinite(what).all(), (c, r, what)


def test_each_preference_objective_falls_when_the_chosen_answer_gains_and_rises_when_the_rejected_does():
    for name, objective in OBJECTIVES.items():
        chosen, rejected = (torch.tensor([-1.5], requires_grad=True) for _ in range(2))
        objective.loss(answers(chosen, rejected), 0.1).backward()
        assert chosen.grad.item() < 0, name
        assert not objective.preference or rejected.grad.item() > 0, name


def test_the_slope_of_the_orpo_term_is_what_a_child_gets_from_the_formula():
    """Both at 1/2: d loss / d chosen = -beta (1 - sigmoid(0)) / (1 - 1/2) = -beta; rejected the opposite."""
    chosen, rejected = logs(0.5).requires_grad_(), logs(0.5).requires_grad_()
    orpo_loss(chosen, rejected, torch.tensor(0.0), 0.25).backward()
    assert chosen.grad.item() == pytest.approx(-0.25)
    assert rejected.grad.item() == pytest.approx(0.25)


@pytest.mark.parametrize("logit", [0.0, 40.0, 200.0, -200.0, 1e4])
def test_the_whole_way_from_logits_to_loss_stays_finite_for_certain_and_impossible_answers(logit):
    hidden = torch.tensor([[logit], [-logit]], requires_grad=True)
    logp = token_logprob(hidden, torch.tensor([[1.0], [0.0]]), torch.tensor([0, 0]))
    for chosen, rejected in ((0, 1), (1, 0), (0, 0)):
        hidden.grad = None
        loss = orpo_loss(logp[chosen : chosen + 1], logp[rejected : rejected + 1], -logp.mean(), 0.1)
        loss.backward(retain_graph=True)
        assert torch.isfinite(loss)
        assert torch.isfinite(hidden.grad).all()
