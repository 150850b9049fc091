"""Every kernel in plain PyTorch: the path of the CPU, and the other half of the comparison in the tests.

Shapes: N rows, D width, V vocabulary, r rank of a LoRA on the head, t columns of a vocabulary tile, B answers.

`token_logprob` walks over the vocabulary in tiles (walk.py) and never holds the (N, V) logits. Value and direction of a
row's gradient are both known after one walk, so the forward pass keeps the direction (N, D) and backward is one
multiplication. A head that is trained needs the scale of each row first; it takes a second walk in backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .between import turn
from .walk import Head, Walk, Walked, slices, sum_dtype

WALK = Walk
"""What walks on the device of this module; logprob.py has another."""


class TokenLogprob(torch.autograd.Function):
    """The walk with its gradient: directions from the forward pass, a second walk only for a head that is trained."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        up: Tensor | None,
        tile: int | None,
        recording: bool,
        kind: type[Walk],
        skip: float = 0.0,
    ) -> Tensor:
        wanted = recording and (ctx.needs_input_grad[0] or ctx.needs_input_grad[4])
        walked = kind.over(hidden, low, Head(weight, bias, up), labels, tile, wanted, skip)
        if recording and any(ctx.needs_input_grad):
            trained = any(ctx.needs_input_grad[i] for i in (1, 3, 5))
            rest = (hidden, low, weight, bias, up, labels, walked.logp, walked.label_logit) if trained else (None,) * 8
            ctx.save_for_backward(walked.direction, walked.low_direction, *rest)
            ctx.tile, ctx.kind, ctx.dtype = tile, kind, hidden.dtype
        return walked.logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        direction, low_direction, hidden, low, weight, bias, up, labels, *ends = ctx.saved_tensors
        needs, grad, kind = ctx.needs_input_grad, grads[0], ctx.kind
        d_hidden = kind.scaled(direction, grad, ctx.dtype) if needs[0] else None
        d_low = kind.scaled(low_direction, grad, ctx.dtype) if needs[4] else None
        d_weight = d_bias = d_up = None
        if needs[1] or needs[3] or needs[5]:
            head, wants = Head(weight, bias, up), [needs[1], needs[3], needs[5]]
            walked = Walked(ends[0], ends[1], None, None)
            d_weight, d_bias, d_up = kind.again(hidden, low, head, labels, walked, grad, ctx.tile, wants)
        return d_hidden, d_weight, None, d_bias, d_low, d_up, None, None, None, None


def check(hidden: Tensor, head: Tensor, labels: Tensor, skip: float = 0.0) -> None:
    """Refuse shapes that do not fit; labels are checked where that needs no device sync."""
    if not 0 <= skip < 1:
        raise ValueError(f"token_logprob: skip is {skip}; it is a share of the probability, wanted 0 <= skip < 1")
    if hidden.ndim != 2 or head.ndim != 2 or labels.shape != hidden.shape[:1] or hidden.shape[1] != head.shape[1]:
        found = f"hidden {tuple(hidden.shape)}, head {tuple(head.shape)}, labels {tuple(labels.shape)}"
        raise ValueError(f"token_logprob takes hidden (N, D), head (V, D), labels (N,); found {found}")
    if labels.device.type == "cpu" and labels.numel():
        least, most = int(labels.min()), int(labels.max())
        if not 0 <= least <= most < head.shape[0]:
            found = f"labels {least}..{most} outside 0..{head.shape[0] - 1}"
            raise ValueError(f"token_logprob: {found}; drop the rows that have no label")


def token_logprob(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    tile: int | None = None,
    skip: float = 0.0,
) -> Tensor:
    """log p(label) of each row: (N, D), (V, D), (N,) -> (N,) float32. See `mint.kernels.token_logprob`."""
    check(hidden, head, labels, skip)
    out: Tensor = TokenLogprob.apply(hidden, head, labels, bias, low, up, tile, torch.is_grad_enabled(), Walk, skip)
    return out


@torch.no_grad()
def row_logsumexp(hidden: Tensor, head: Tensor, *, tile: int | None = None) -> Tensor:
    """logsumexp of hidden headᵀ over the vocabulary: (N, D), (V, D) -> (N,) float32. See `mint.kernels`."""
    totals = [hidden.new_empty(0, dtype=sum_dtype(hidden))]
    for rows in slices(hidden.shape[0], Walk.rows):
        part = hidden[rows]
        total = part.new_full((part.shape[0],), float("-inf"), dtype=sum_dtype(part))
        for columns in slices(head.shape[0], Walk.width(part.shape[0], head.shape[0], tile)):
            logits = (part @ head[columns].T).to(total.dtype)
            total = torch.logaddexp(total, torch.logsumexp(logits, dim=1))
        totals.append(total)
    return torch.cat(totals)


class LogOddsRatio(torch.autograd.Function):
    """log odds(chosen) - log odds(rejected), with the analytic gradient ±1 / (1 - p), which no branch can make NaN."""

    @staticmethod
    def forward(ctx: Any, chosen: Tensor, rejected: Tensor) -> Tensor:
        (odds_c, slope_c), (odds_r, slope_r) = _log_odds(chosen), _log_odds(rejected)
        ctx.save_for_backward(slope_c, slope_r)
        ctx.dtypes = chosen.dtype, rejected.dtype
        return odds_c - odds_r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        slope_c, slope_r = ctx.saved_tensors
        return (grads[0] * slope_c).to(ctx.dtypes[0]), (-grads[0] * slope_r).to(ctx.dtypes[1])


def _log_odds(logp: Tensor) -> tuple[Tensor, Tensor]:
    """log(p / (1 - p)) and its slope 1 / (1 - p) from log p; at p = 1 those of the largest p that has a slope."""
    logp = logp.to(sum_dtype(logp))
    logp = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    left = -torch.expm1(logp)  # 1 - p
    log_left = torch.where(logp > -0.6931, left.log(), torch.log1p(-logp.exp()))
    return logp - log_left, left.reciprocal()


def log_odds_ratio(chosen_logp: Tensor, rejected_logp: Tensor) -> Tensor:
    """ORPO equation 4 on mean log-probabilities: (B,), (B,) -> (B,). See `mint.kernels.log_odds_ratio`."""
    out: Tensor = LogOddsRatio.apply(chosen_logp, rejected_logp)
    return out


class PreferenceTerms(NamedTuple):
    """Of each pair, (B,): log sigmoid(log odds ratio), which alone carries a gradient, and what it came from."""

    term: Tensor
    log_odds: Tensor
    chosen: Tensor  # mean log-probability
    rejected: Tensor


def check_members(token_logp: Tensor, edges: Tensor, starts: Tensor) -> None:
    if token_logp.ndim != 1 or edges.ndim != 1 or starts.ndim != 1 or len(starts) % 2 == 0:
        found = f"token_logp {tuple(token_logp.shape)}, edges {tuple(edges.shape)}, starts {tuple(starts.shape)}"
        raise ValueError(f"preference_terms takes token_logp (E,), edges (M,), starts (2 B + 1,); found {found}")


def preference_terms(token_logp: Tensor, edges: Tensor, starts: Tensor) -> PreferenceTerms:
    """ORPO's terms from token log-probabilities: (E,), (M,), (2 B + 1,) -> (B,) each. See `mint.kernels`."""
    check_members(token_logp, edges, starts)
    lengths = starts.diff()
    owners = torch.repeat_interleave(lengths)
    sums = token_logp.new_zeros(len(lengths)).index_add(0, owners, token_logp[edges])
    chosen, rejected = (sums / lengths.clamp(min=1)).view(-1, 2).unbind(1)
    log_odds, full = log_odds_ratio(chosen, rejected), (lengths > 0).view(-1, 2).all(1)
    term = torch.where(full, F.logsigmoid(log_odds), 0.0)
    return PreferenceTerms(term, log_odds.detach(), chosen.detach(), rejected.detach())


def tree_attention(q: Tensor, k: Tensor, v: Tensor, end: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v with the whole mask: q (T, H, d), k and v (T, K, d), end (T,) -> (T, H, d).

    Token i sees token j exactly when j <= i < end[j]. The oracle of attention.py and blocks.py: T² of everything.
    """
    exact, group = sum_dtype(q), q.shape[1] // k.shape[1]
    keys, values = (x.to(exact).repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    scores = q.to(exact).transpose(0, 1) @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
    at = torch.arange(len(q), device=q.device)
    seen = (at <= at[:, None]) & (at[:, None] < end)
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    return (weights @ values).transpose(0, 1).to(q.dtype)


def step_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, first: Tensor, now: Tensor
) -> Tensor:
    """See `mint.kernels.step_attention`: (B, H, d), (B, K, d) twice, (B, 1, d / 2) twice, (B, K, S, d) twice, (B,), (1,)."""
    keys.index_copy_(2, now, turn(k, cos, sin, 1)[:, :, None])
    values.index_copy_(2, now, v[:, :, None])
    column = torch.arange(keys.shape[2], device=q.device)
    seen = (column >= first[:, None]) & (column <= now)
    grouped = turn(q, cos, sin, 1).unflatten(1, (keys.shape[1], -1))  # (B, K, G, d): a group's heads are its queries
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen[:, None, None]).flatten(1, 2)
