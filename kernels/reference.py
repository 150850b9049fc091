"""Every kernel in plain PyTorch: the path of the CPU, and the other half of the comparison in the tests.

Shapes: N rows, D width, V vocabulary, r rank of a LoRA on the head, t columns of a vocabulary tile, B answers.

`token_logprob` walks over the vocabulary in tiles and never holds the (N, V) logits. With l the label's logit and
o = logsumexp of all *other* logits,

    log p(label)       = -log(1 + exp(o - l))                       exact near p = 1, and never positive
    d log p / d hidden = (1 - p) (W[label] - sum_j q_j W[j]),       1 - p = sigmoid(o - l), q = softmax over the others

Both sides are known after one walk, so the forward pass keeps the direction (N, D) and backward is one multiplication.
A head that is trained needs the scale of each row first; it takes a second walk in backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .between import turn
from .products import product

LOG2_E = 1.4426950408889634


class Head(NamedTuple):
    """The output layer: logits = hidden weightᵀ + bias + low upᵀ."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    up: Tensor | None  # (V, r)

    def logits(self, hidden: Tensor, low: Tensor | None, columns: slice, out: Tensor | None = None) -> Tensor:
        """(N, D), (N, r) -> (N, t), in the dtype of `hidden`."""
        if self.bias is None:
            logits = product(hidden, self.weight[columns], out=out)
        else:  # -inf forbids a class, and a tile of nothing else must not give NaN
            bias = self.bias[columns].clamp(min=torch.finfo(hidden.dtype).min / 2)
            logits = torch.addmm(bias, hidden, self.weight[columns].T, out=out)
        return logits if low is None or self.up is None else logits.addmm_(low, self.up[columns].T)


class Walked(NamedTuple):
    """What a walk over the vocabulary knows at its end, in float32 at least; no directions unless they were wanted."""

    logp: Tensor  # (n,)
    label_logit: Tensor  # (n,)
    direction: Tensor | None  # (n, D) d logp / d hidden
    low_direction: Tensor | None  # (n, r) d logp / d low


class Walk:
    """Some rows on their walk, and what happens to them between the products; logprob.py does it in kernels.

    `rows` walk together and more walk in turn, so that memory stays bounded for any N; `elements` are the logits looked
    at together unless `tile` says otherwise: 16 MiB in float32, which a processor's cache can hold.
    """

    rows, elements = 4096, 1 << 22

    def __init__(
        self, hidden: Tensor, labels: Tensor, sums: Tensor | None, low_sums: Tensor | None, skip: float = 0.0
    ) -> None:
        exact, n = _exact(hidden), hidden.shape[0]
        self.labels, self.dtype, self.sums, self.low_sums, self.skip = labels, hidden.dtype, sums, low_sums, skip
        self.level = hidden.new_full((n,), torch.finfo(exact).min / 2, dtype=exact)
        self.total, self.left_out, self.label_logit = hidden.new_zeros(3, n, dtype=exact)
        self.room: Tensor | None = None
        for empty in (sums, low_sums):
            if empty is not None:
                empty.zero_()

    def fold(self, logits: Tensor, first: int) -> Tensor:
        """Take the label out of a tile (n, t) and add the rest to the logsumexp of the others, level + log(total).

        Returns exp(logits - level) of the tile; `before` weighs the sums so far.
        """
        rows = ((self.labels >= first) & (self.labels < first + logits.shape[1])).nonzero()[:, 0]
        columns = self.labels[rows] - first
        self.label_logit[rows] = logits[rows, columns].to(self.level.dtype)
        # finite: a tile that holds nothing else must not give NaN
        logits[rows, columns] = torch.finfo(logits.dtype).min / 2
        share = self._exact(logits)
        level = torch.maximum(self.level, share.amax(dim=1))
        share.sub_(level[:, None]).mul_(LOG2_E).exp2_()  # quicker than exp_
        self.before, mass = (self.level - level).exp(), share.sum(dim=1)
        self.level, self.total = level, self.total * self.before + mass
        self.kept = self.not_left_out(mass) if self.skip else None
        return share if self.sums is None or share is logits else logits.copy_(share)

    def not_left_out(self, mass: Tensor) -> Tensor:
        """The rows whose sums need this tile. In the others all that was left out so far, this tile too, has at most the
        share `skip` of the total so far, which only grows: with q of the classes left out, the direction is off by
        (1 - p) |sum q_j W[j]| <= skip (1 - p) max |W[j]|, and log p not at all."""
        left_out = self.left_out * self.before + mass
        small = left_out <= self.skip * self.total
        self.left_out = torch.where(small, left_out, left_out - mass)
        kept: Tensor = (~small).nonzero()[:, 0]
        return kept

    def _exact(self, logits: Tensor) -> Tensor:
        """The tile where its exponentials go: itself, or a copy in memory of a wider dtype that all tiles share."""
        if logits.dtype == self.level.dtype:
            return logits
        if self.room is None or self.room.numel() < logits.numel():
            self.room = logits.new_empty(logits.numel(), dtype=self.level.dtype)
        return self.room[: logits.numel()].view(logits.shape).copy_(logits)

    def gather(self, share: Tensor, weight: Tensor, up: Tensor | None) -> None:
        """Add the tile's shares of the rows of the head: (n, t) @ (t, D) and (n, t) @ (t, r)."""
        for sums, rows in ((self.sums, weight), (self.low_sums, up)):
            if sums is not None and rows is not None:
                sums.mul_(self.before[:, None])
                if self.kept is None:
                    sums.add_(product(share, rows.T))
                else:
                    sums.index_add_(0, self.kept, product(share[self.kept], rows.T).to(sums.dtype))

    def finish(self, head: Head) -> tuple[Tensor, Tensor]:
        """(log p(label), label logit); the sums become directions in place."""
        margin = self.label_logit - (self.level + self.total.log())
        unsure = torch.sigmoid(-margin)[:, None]
        for sums, weight in ((self.sums, head.weight), (self.low_sums, head.up)):
            if sums is not None and weight is not None:
                torch.sub(weight[self.labels], sums.div_(self.total[:, None]), out=sums).mul_(unsure)
        return F.logsigmoid(margin), self.label_logit

    @staticmethod
    def spread(logits: Tensor, first: int, labels: Tensor, logp: Tensor, label_logit: Tensor, grad: Tensor) -> Tensor:
        """d loss / d logits of a tile (n, t): grad (one-hot - p), in the logits' dtype; they may be overwritten."""
        p = (logits.to(grad.dtype) - (label_logit - logp)[:, None]).exp_()
        p.mul_(-grad[:, None])
        rows = ((labels >= first) & (labels < first + logits.shape[1])).nonzero()[:, 0]
        p[rows, labels[rows] - first] = grad[rows] * -torch.expm1(logp[rows])
        return p.to(logits.dtype)

    @staticmethod
    def scaled(direction: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """(n, D) times (n,), rounded once."""
        return (direction * grad[:, None]).to(dtype)

    @classmethod
    def width(cls, rows: int, vocabulary: int, tile: int | None) -> int:
        """Columns of a tile: as asked, or what keeps rows x columns near `elements`, a multiple of 64."""
        if tile is not None:
            if tile < 1:
                raise ValueError(f"tile is {tile}: give at least one column")
            return min(tile, max(vocabulary, 1))
        return min(max(cls.elements // max(rows, 1) // 64 * 64, 256), max(vocabulary, 1))

    @classmethod
    def over(
        cls, hidden: Tensor, low: Tensor | None, head: Head, labels: Tensor, tile: int | None, wanted: bool,
        skip: float = 0.0,
    ) -> Walked:  # fmt: skip
        """All rows over the whole vocabulary, `rows` of them together."""
        width = cls.width(min(hidden.shape[0], cls.rows), head.weight.shape[0], tile)
        sums, low_sums = (x.new_empty(x.shape, dtype=_exact(x)) if wanted and x is not None else None
                          for x in (hidden, low))  # fmt: skip
        ends = [(hidden.new_empty(0, dtype=_exact(hidden)),) * 2]
        for rows in slices(hidden.shape[0], cls.rows):
            its_low, its_sums, its_low_sums = (None if x is None else x[rows] for x in (low, sums, low_sums))
            walker = cls(hidden[rows], labels[rows], its_sums, its_low_sums, skip)
            ends.append(_together(walker, hidden[rows], its_low, head, width))
        logp, label_logit = (torch.cat(parts) for parts in zip(*ends, strict=True))
        return Walked(logp, label_logit, sums, low_sums)

    @classmethod
    def again(
        cls, hidden: Tensor, low: Tensor | None, head: Head, labels: Tensor, walked: Walked, grad: Tensor,
        tile: int | None, wants: list[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """The second walk, for a head that is trained: gradients of weight, bias and up, as `wants` says."""
        d_weight, d_bias, d_up = (torch.empty_like(x) if want and x is not None else None
                                  for want, x in zip(wants, head, strict=True))  # fmt: skip
        for columns in slices(head.weight.shape[0], cls.width(hidden.shape[0], head.weight.shape[0], tile)):
            logits = head.logits(hidden, low, columns)
            d_logits = cls.spread(logits, columns.start, labels, walked.logp, walked.label_logit, grad)
            if d_weight is not None:
                d_weight[columns] = d_logits.T @ hidden
            if d_bias is not None:
                d_bias[columns] = d_logits.sum(0, dtype=grad.dtype).to(d_bias.dtype)
            if d_up is not None and low is not None:
                d_up[columns] = d_logits.T @ low
        return d_weight, d_bias, d_up


WALK = Walk
"""What walks on the device of this module; logprob.py has another."""


def slices(length: int, width: int) -> Iterator[slice]:
    for first in range(0, length, width):
        yield slice(first, min(first + width, length))


def _together(rows: Walk, hidden: Tensor, low: Tensor | None, head: Head, width: int) -> tuple[Tensor, Tensor]:
    walk(rows, hidden, low, head, width)
    return rows.finish(head)


def walk(rows: Walk, hidden: Tensor, low: Tensor | None, head: Head, width: int) -> None:
    """Some rows over all columns of a head."""
    room = hidden.new_empty(hidden.shape[0], width)
    for columns in slices(head.weight.shape[0], width):
        logits = head.logits(hidden, low, columns, out=room[:, : columns.stop - columns.start])
        share = rows.fold(logits, columns.start)
        if rows.sums is not None:
            rows.gather(share, head.weight[columns], None if head.up is None else head.up[columns])


def _exact(tensor: Tensor) -> torch.dtype:
    """The dtype of sums: float32 at least."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


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
    if (
        labels.device.type == "cpu"
        and labels.numel()
        and not 0 <= int(labels.min()) <= int(labels.max()) < head.shape[0]
    ):
        found = f"{int(labels.min())}..{int(labels.max())}"
        raise ValueError(
            f"token_logprob: labels {found} outside 0..{head.shape[0] - 1}; drop the rows that have no label"
        )


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
    totals = [hidden.new_empty(0, dtype=_exact(hidden))]
    for rows in slices(hidden.shape[0], Walk.rows):
        part = hidden[rows]
        total = part.new_full((part.shape[0],), float("-inf"), dtype=_exact(part))
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
    logp = logp.to(_exact(logp))
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
    exact, group = _exact(q), q.shape[1] // k.shape[1]
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
    grouped = turn(q, cos, sin, 1).unflatten(
        1, (keys.shape[1], -1)
    )  # (B, K, G, d): the heads of a group are its queries
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen[:, None, None]).flatten(1, 2)
