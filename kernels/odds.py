"""The log odds ratio of ORPO on a GPU: one launch gives the value and both slopes, or goes from token log-probabilities
to loss terms and their gradients.

Shapes: B pairs, E edges (scored tokens), P = 2 B answers, M members (edges counted in an answer).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .exact import log1p, log_sigmoid, one_minus_exp
from .places import FUSED, on_its_device
from .reference import PreferenceTerms, check_members

BLOCK = 256


@triton.jit
def _log_odds(logp, TINY: tl.constexpr):
    """log(p / (1 - p)) and its slope 1 / (1 - p)."""
    logp = tl.minimum(logp, -TINY)
    left = one_minus_exp(logp)
    near = logp > -0.6931
    log_left = tl.where(near, tl.log(left), log1p(tl.where(near, 0.0, -tl.exp(logp))))
    return logp - log_left, 1.0 / left


@triton.jit
def _ratio_kernel(chosen, rejected, ratio, slope_c, slope_r, B, TINY: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exact = ratio.dtype.element_ty
    odds_c, its_c = _log_odds(tl.load(chosen + at, mask=at < B, other=-1.0).to(exact), TINY)
    odds_r, its_r = _log_odds(tl.load(rejected + at, mask=at < B, other=-1.0).to(exact), TINY)
    tl.store(ratio + at, odds_c - odds_r, mask=at < B)
    tl.store(slope_c + at, its_c, mask=at < B)
    tl.store(slope_r + at, its_r, mask=at < B)


@triton.jit
def _mean(token_logp, edges, first, stop, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], token_logp.dtype.element_ty)
    for start in range(first, stop, BLOCK):
        inside = start + at < stop
        edge = tl.load(edges + start + at, mask=inside, other=0)
        total += tl.load(token_logp + edge, mask=inside, other=0.0)
    return tl.sum(total) / tl.maximum(stop - first, 1)


@triton.jit
def _terms_kernel(
    token_logp, edges, starts, terms, log_odds, means_c, means_r, slopes, owners,
    TINY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pair: means, log odds ratio, its log-sigmoid, and d term / d token_logp of each member."""
    pair = tl.program_id(0)
    first, middle, stop = tl.load(starts + 2 * pair), tl.load(starts + 2 * pair + 1), tl.load(starts + 2 * pair + 2)
    chosen = _mean(token_logp, edges, first, middle, BLOCK)
    rejected = _mean(token_logp, edges, middle, stop, BLOCK)
    odds_c, slope_c = _log_odds(chosen, TINY)
    odds_r, slope_r = _log_odds(rejected, TINY)
    term, slope = log_sigmoid(odds_c - odds_r)
    full = (middle > first) & (stop > middle)  # an empty answer has no odds: the pair adds nothing
    tl.store(terms + pair, tl.where(full, term, 0.0))
    tl.store(log_odds + pair, odds_c - odds_r)
    tl.store(means_c + pair, chosen)
    tl.store(means_r + pair, rejected)
    slope = tl.where(full, slope, 0.0)
    at = tl.arange(0, BLOCK)
    for start in range(first, stop, BLOCK):
        here = start + at
        its_c, its_r = slope_c / tl.maximum(middle - first, 1), -slope_r / tl.maximum(stop - middle, 1)
        tl.store(slopes + here, slope * tl.where(here < middle, its_c, its_r), mask=here < stop)
        tl.store(owners + here, tl.zeros([BLOCK], tl.int64) + pair, mask=here < stop)


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class LogOddsRatio(torch.autograd.Function):
    """The ratio with its analytic gradient, both from one launch."""

    @staticmethod
    @on_its_device
    def forward(ctx: Any, chosen: Tensor, rejected: Tensor) -> Tensor:
        exact = torch.promote_types(_exact(chosen), _exact(rejected))
        ratio, slope_c, slope_r = chosen.new_empty(3, len(chosen), dtype=exact)
        _ratio_kernel[(triton.cdiv(len(chosen), BLOCK),)](
            chosen.contiguous(), rejected.contiguous(), ratio, slope_c, slope_r, len(chosen),
            TINY=torch.finfo(exact).tiny, BLOCK=BLOCK, **FUSED,
        )  # fmt: skip
        ctx.save_for_backward(slope_c, slope_r)
        ctx.dtypes = chosen.dtype, rejected.dtype
        return ratio

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        slope_c, slope_r = ctx.saved_tensors
        return (grads[0] * slope_c).to(ctx.dtypes[0]), (-grads[0] * slope_r).to(ctx.dtypes[1])


class Terms(torch.autograd.Function):
    """Everything from one launch; backward scales what is known and adds it up per edge."""

    @staticmethod
    @on_its_device
    def forward(ctx: Any, token_logp: Tensor, edges: Tensor, starts: Tensor) -> tuple[Tensor, ...]:
        pairs = (len(starts) - 1) // 2
        terms = tuple(token_logp.new_empty(pairs) for _ in range(4))
        slopes, owners = token_logp.new_empty(len(edges)), torch.empty_like(edges)
        if pairs:
            _terms_kernel[(pairs,)](
                token_logp.contiguous(), edges, starts, *terms, slopes, owners,
                TINY=torch.finfo(token_logp.dtype).tiny, BLOCK=BLOCK, **FUSED,
            )  # fmt: skip
        ctx.save_for_backward(edges, slopes, owners)
        ctx.edges = len(token_logp)
        ctx.mark_non_differentiable(*terms[1:])
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        edges, slopes, owners = ctx.saved_tensors
        d_logp = slopes.new_zeros(ctx.edges)
        return d_logp.index_add_(0, edges, slopes * grads[0][owners]), None, None


def log_odds_ratio(chosen_logp: Tensor, rejected_logp: Tensor) -> Tensor:
    """ORPO equation 4 on mean log-probabilities: (B,), (B,) -> (B,)."""
    return LogOddsRatio.apply(chosen_logp, rejected_logp)


def preference_terms(token_logp: Tensor, edges: Tensor, starts: Tensor) -> PreferenceTerms:
    """As in reference.py."""
    check_members(token_logp, edges, starts)
    return PreferenceTerms(*Terms.apply(token_logp, edges, starts))
