"""From the log-probabilities of a batch's edges to the loss of its share of a step, and to the metrics of that step.

Shapes: E scored edges, b pairs of a batch, B pairs of the whole step.

The likelihood term is pooled over the tokens of the whole step and every other term is a mean over its B pairs, so the
pieces of a step, on one rank or on several, add up to exactly what one long batch gives. What is left between them is the
network's: in float32 it rounds the same text a little differently in another batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import AlignSettings
from ..kernels import log_odds_ratio
from ..losses import OBJECTIVES, Answers
from .batches import CHOSEN, FIRST, PATHS, PROMPT, REJECTED, Batch, TokenPair, batch

METRICS = (
    "loss",
    "nll_loss",
    "log_odds_ratio",
    "log_odds_chosen",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
"""Under TRL's names: `log_odds_ratio` is the mean log sigmoid of the log odds ratio, `log_odds_chosen` its mean."""


def objective_batch(pairs: Sequence[TokenPair], settings: AlignSettings) -> Batch:
    """A batch with the parts that the objective looks at."""
    preference = OBJECTIVES[settings.objective].preference
    return batch(
        pairs,
        with_prompt=settings.scope == "prompt+chosen",
        with_rejected=preference,
        with_first=settings.first_weight != 1,
    )


def likelihood_tokens(pairs: Sequence[TokenPair], settings: AlignSettings) -> float:
    """Tokens that the likelihood of a step is pooled over; those up to the first name count `first_weight` times."""
    chosen = sum(len(pair.chosen) - pair.chosen_first for pair in pairs)
    first = sum(pair.first_stop - pair.chosen_first for pair in pairs)
    prompts = sum(pair.chosen_first - 1 - (pair.image is not None) for pair in pairs)  # an image is not predicted
    return chosen + (settings.first_weight - 1) * first + (prompts if settings.scope == "prompt+chosen" else 0)


def batch_loss(
    token_logp: Tensor,
    part: Batch,
    settings: AlignSettings,
    tokens: float,
    pairs: int,
    reference: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The batch's share of the loss of a step with so many likelihood tokens and pairs, and its share of METRICS.

    token_logp (E,); reference (b, 2) holds the summed log-probabilities of the reference model.
    """
    share = len(part.pairs) / pairs
    answers = _answers(token_logp, part, settings, tokens * share, reference)
    loss = OBJECTIVES[settings.objective].loss(answers, settings.beta) * share
    with torch.no_grad():
        return loss, _metrics(answers, settings, loss, share)


def _answers(
    token_logp: Tensor, part: Batch, settings: AlignSettings, tokens: float, reference: Tensor | None
) -> Answers:
    """What objectives look at. Sums of tens of tokens are made in float64: objectives look at differences of them, which
    float32 would leave with five digits.

    Each loss is a mean over the pairs of the batch plus the likelihood, whose `tokens` are this batch's share of the step's:
    the share that is then taken of the loss leaves it whole.
    """
    sums = part.tree.path_sums(token_logp.double()).view(-1, PATHS)
    lengths = part.tree.path_lengths().clamp(min=1).view(-1, PATHS)
    means = (sums / lengths).to(token_logp.dtype)
    likelihood = sums[:, CHOSEN] + (settings.first_weight - 1) * sums[:, FIRST]
    likelihood = likelihood + sums[:, PROMPT] if settings.scope == "prompt+chosen" else likelihood
    held = torch.zeros_like(sums[:, :2]) if reference is None else reference
    return Answers(
        nll=-likelihood.sum() / tokens,
        chosen_sum=sums[:, CHOSEN],
        rejected_sum=sums[:, REJECTED],
        chosen_mean=means[:, CHOSEN],
        rejected_mean=means[:, REJECTED],
        reference_chosen=held[:, 0],
        reference_rejected=held[:, 1],
        chosen_tokens=lengths[:, CHOSEN],
        rejected_tokens=lengths[:, REJECTED],
    )


def _metrics(answers: Answers, settings: AlignSettings, loss: Tensor, share: float) -> Tensor:
    """(len(METRICS),), to be summed over the batches of a step; left on the device, read once a step."""
    objective = OBJECTIVES[settings.objective]
    odds = log_odds_ratio(answers.chosen_mean, answers.rejected_mean)
    if objective.reference:
        chosen = answers.chosen_sum - answers.reference_chosen
        rejected = answers.rejected_sum - answers.reference_rejected
        logps = answers.chosen_sum, answers.rejected_sum
    else:
        chosen, rejected = logps = answers.chosen_mean, answers.rejected_mean
    better = (chosen > rejected).float()
    terms = [
        F.logsigmoid(odds),
        odds,
        settings.beta * chosen,
        settings.beta * rejected,
        better,
        settings.beta * (chosen - rejected),
        *logps,
    ]
    return torch.stack([loss.detach(), answers.nll * share, *(term.mean() * share for term in terms)])
