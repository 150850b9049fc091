"""Objectives as pure functions of log-probabilities; a new one is ten lines.

Every `*_logp` is (B,). ORPO (arXiv 2403.07691), SimPO and IPO take the *mean* log-probability of an answer's tokens, DPO
the *sum*; `nll` is a scalar, the negative log-likelihood pooled over the tokens of the whole step. Each function
returns a scalar, the mean over the pairs (plus `nll` where the objective has one).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .kernels import log_odds_ratio


def orpo_loss(chosen_logp: Tensor, rejected_logp: Tensor, nll: Tensor, beta: float) -> Tensor:
    """L = L_SFT + beta E[-log sigmoid(log odds(chosen)/odds(rejected))] (ORPO eq. 6 and 7), from mean log-probabilities.

    Both answers at p = 1/2 have odds 1, a ratio of 1, so the second term is beta log 2.
    """
    ratio = log_odds_ratio(chosen_logp, rejected_logp)  # eq. 4 and 5
    return nll - beta * F.logsigmoid(ratio).mean()


def dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    reference_chosen_logp: Tensor,
    reference_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    """L = E[-log sigmoid(beta (log pi/ref(chosen) - log pi/ref(rejected)))] (DPO eq. 7), from summed log-probabilities.

    A policy equal to its reference has margin 0, so L = log 2.
    """
    margin = (chosen_logp - reference_chosen_logp) - (rejected_logp - reference_rejected_logp)
    return -F.logsigmoid(beta * margin).mean()


def sft_loss(nll: Tensor) -> Tensor:
    """L = nll: maximum likelihood of the chosen answer."""
    return nll


def simpo_loss(chosen_logp: Tensor, rejected_logp: Tensor, beta: float, margin: float = 0.0) -> Tensor:
    """L = E[-log sigmoid(beta (chosen - rejected) - margin)] (SimPO eq. 6), from mean log-probabilities; no reference.

    Equal answers and no margin: log 2.
    """
    return -F.logsigmoid(beta * (chosen_logp - rejected_logp) - margin).mean()


def ipo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    reference_chosen_logp: Tensor,
    reference_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    """L = E[(margin - 1 / (2 beta))^2] (IPO eq. 17), from mean log-probabilities: those that its results were made with, since
    the margin of sums grows with the length of the answers while its target does not.

    A policy equal to its reference has margin 0; with beta = 1/2 the target is 1, so L = 1.
    """
    margin = (chosen_logp - reference_chosen_logp) - (rejected_logp - reference_rejected_logp)
    return (margin - 1 / (2 * beta)).square().mean()


@dataclass(frozen=True, slots=True)
class Answers:
    """What an objective may look at, per pair: (B,) each; `reference_…` are sums. `nll` is a scalar."""

    nll: Tensor
    chosen_sum: Tensor
    rejected_sum: Tensor
    chosen_mean: Tensor
    rejected_mean: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor


@dataclass(frozen=True, slots=True)
class Objective:
    """An objective by name: its loss, and what of the data it needs."""

    loss: Callable[[Answers, float], Tensor]
    preference: bool = True
    likelihood: bool = False
    reference: bool = False


OBJECTIVES = {
    "orpo": Objective(lambda a, beta: orpo_loss(a.chosen_mean, a.rejected_mean, a.nll, beta), likelihood=True),
    "dpo": Objective(
        lambda a, beta: dpo_loss(a.chosen_sum, a.rejected_sum, a.reference_chosen, a.reference_rejected, beta),
        reference=True,
    ),
    "sft": Objective(lambda a, _: sft_loss(a.nll), preference=False, likelihood=True),
    "simpo": Objective(lambda a, beta: simpo_loss(a.chosen_mean, a.rejected_mean, beta)),
    "ipo": Objective(
        lambda a, beta: ipo_loss(
            a.chosen_sum / a.chosen_tokens,
            a.rejected_sum / a.rejected_tokens,
            a.reference_chosen / a.chosen_tokens,
            a.reference_rejected / a.rejected_tokens,
            beta,
        ),
        reference=True,
    ),
}
"""What `align --objective` takes."""
