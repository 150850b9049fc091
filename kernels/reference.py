"""Every kernel in plain PyTorch: the path of the CPU, and the other half of the comparison in the tests.

Shapes: N rows, D width, V vocabulary, r rank of a LoRA on the head, t columns of a vocabulary tile, B answers.

`token_logprob` walks over the vocabulary in tiles and never holds the (N, V) logits. With l the label's logit and
o = logsumexp of all *other* logits,

    log p(label)       = -log(1 + exp(o - l))                       exact near p = 1, and never positive
    d log p / d hidden = (1 - p) (W[label] - sum_j q_j W[j]),       q = softmax over the other classes, 1 - p = sigmoid(o - l)

Both sides are known after one walk, so the forward pass keeps the direction (N, D) and backward is one multiplication.
A head that is trained needs the scale of each row first; it takes a second walk in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_ELEMENTS = 1 << 22
"""Logits looked at together, unless `tile` says otherwise: 16 MiB in float32, which a processor's cache can hold."""

ROWS = 4096
"""Rows that walk over the vocabulary together; more rows walk in turn, so that memory stays bounded for any N."""


class Head(NamedTuple):
    """The output layer: logits = hidden weightᵀ + bias + low upᵀ."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    up: Tensor | None  # (V, r)

    def logits(self, hidden: Tensor, low: Tensor | None, columns: slice, out: Tensor | None = None) -> Tensor:
        """(N, D), (N, r) -> (N, t), in the dtype of `hidden`."""
        logits = torch.mm(hidden, self.weight[columns].T, out=out)
        if low is not None and self.up is not None:
            logits.addmm_(low, self.up[columns].T)
        return logits if self.bias is None else logits.add_(self.bias[columns])


Step = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], tuple[Tensor, Tensor, Tensor]]
"""(logits (n, t), labels, others, label_logit, first column, weights wanted) -> q of the tile, scale of the old sum, of q.

`others` and `label_logit` (n,) are updated in place."""


def plain_step(
    logits: Tensor, labels: Tensor, others: Tensor, label_logit: Tensor, first: int, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One tile of the walk: takes the label out of the tile, then folds the tile into the running logsumexp."""
    rows = ((labels >= first) & (labels < first + logits.shape[1])).nonzero()[:, 0]
    columns = labels[rows] - first
    label_logit[rows] = logits[rows, columns].to(label_logit.dtype)
    logits[rows, columns] = (
        torch.finfo(logits.dtype).min / 2
    )  # finite: a tile that holds nothing else must not give NaN
    top, at = logits.max(dim=1)
    share = torch.softmax(logits, dim=1, dtype=others.dtype)
    tile = (
        top.to(others.dtype) - share.gather(1, at[:, None])[:, 0].log()
    )  # logsumexp of the tile: softmax there is 1 / sum
    both = torch.logaddexp(others, tile)
    before, now = (others - both).exp(), (tile - both).exp()
    others.copy_(both)
    return (share.to(logits.dtype) if wanted else share), before, now


def tile_columns(rows: int, vocabulary: int, tile: int | None) -> int:
    """Columns of a tile: as asked, or what keeps rows x columns near TILE_ELEMENTS, a multiple of 64."""
    if tile is not None:
        if tile < 1:
            raise ValueError(f"tile is {tile}: give at least one column")
        return min(tile, vocabulary)
    return min(max(TILE_ELEMENTS // max(rows, 1) // 64 * 64, 256), vocabulary)


def tiles(vocabulary: int, width: int) -> Iterator[slice]:
    for first in range(0, vocabulary, width):
        yield slice(first, min(first + width, vocabulary))


def walk(
    hidden: Tensor, low: Tensor | None, head: Head, labels: Tensor, width: int, wanted: bool, step: Step
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One walk over the vocabulary: label logit (n,), logsumexp of the others (n,), and the directions if wanted."""
    exact = _exact(hidden)
    n, vocabulary = hidden.shape[0], head.weight.shape[0]
    others = hidden.new_full((n,), torch.finfo(exact).min / 2, dtype=exact)
    label_logit = hidden.new_zeros(n, dtype=exact)
    sum_d = torch.zeros_like(hidden, dtype=exact) if wanted else None
    sum_r = torch.zeros_like(low, dtype=exact) if wanted and low is not None else None
    room, product = hidden.new_empty(n * width), torch.empty_like(hidden)
    for columns in tiles(vocabulary, width):
        space = room[: n * (columns.stop - columns.start)].view(n, -1)
        logits = head.logits(hidden, low, columns, out=space)
        share, before, now = step(logits, labels, others, label_logit, columns.start, wanted)
        if sum_d is not None:
            torch.mm(share, head.weight[columns], out=product)
            sum_d.mul_(before[:, None]).addcmul_(product, now[:, None])
        if sum_r is not None and head.up is not None:
            sum_r.mul_(before[:, None]).addcmul_(share @ head.up[columns], now[:, None])
    unsure = torch.sigmoid(others - label_logit)[:, None]
    direction = None if sum_d is None else (head.weight[labels] - sum_d).mul_(unsure).to(hidden.dtype)
    low_direction = (
        None if sum_r is None or head.up is None else (head.up[labels] - sum_r).mul_(unsure).to(hidden.dtype)
    )
    return label_logit, others, direction, low_direction


def _exact(tensor: Tensor) -> torch.dtype:
    """The dtype of sums: float32 at least."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class TokenLogprob(torch.autograd.Function):
    """The walk with its gradient. `step` is what turns a tile of logits into shares: plain here, a kernel in logprob.py."""

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
        step: Step,
        recording: bool,
    ) -> Tensor:
        head, wanted = Head(weight, bias, up), recording and any(ctx.needs_input_grad)
        width = tile_columns(min(hidden.shape[0], ROWS), weight.shape[0], tile)
        parts = [
            walk(hidden[rows], None if low is None else low[rows], head, labels[rows], width, wanted, step)
            for rows in tiles(hidden.shape[0], ROWS)
        ]
        label_logit, others, direction, low_direction = (_join([part[i] for part in parts], hidden) for i in range(4))
        assert label_logit is not None
        assert others is not None
        if wanted:
            trained = any(ctx.needs_input_grad[i] for i in (1, 3, 5))
            rest = (hidden, low, weight, bias, up, labels, label_logit, others) if trained else (None,) * 8
            ctx.save_for_backward(direction, low_direction, *rest)
            ctx.tile = tile
        return F.logsigmoid(label_logit - others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0][:, None]
        direction, low_direction, *rest = ctx.saved_tensors
        d_hidden = (direction * scale).to(direction.dtype) if ctx.needs_input_grad[0] else None
        d_low = (low_direction * scale).to(low_direction.dtype) if ctx.needs_input_grad[4] else None
        d_weight, d_bias, d_up = _head_gradients(ctx, grads[0], *rest) if rest[0] is not None else (None, None, None)
        return d_hidden, d_weight, None, d_bias, d_low, d_up, None, None, None


def _join(parts: list[Tensor | None], like: Tensor) -> Tensor | None:
    if not parts:
        return like.new_zeros(0, dtype=_exact(like))
    return None if parts[0] is None else parts[0] if len(parts) == 1 else torch.cat([p for p in parts if p is not None])


def _head_gradients(
    ctx: Any,
    grad: Tensor,
    hidden: Tensor,
    low: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    labels: Tensor,
    label_logit: Tensor,
    others: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The second walk: d loss / d logits of a tile = grad (one-hot - p), times hidden, low or one."""
    wants = [ctx.needs_input_grad[i] for i in (1, 3, 5)]
    d_weight, d_bias, d_up = (torch.empty_like(x) if want and x is not None else None
                              for want, x in zip(wants, (weight, bias, up), strict=True))  # fmt: skip
    head, total = Head(weight, bias, up), torch.logaddexp(label_logit, others)
    width = tile_columns(hidden.shape[0], weight.shape[0], ctx.tile)
    for columns in tiles(weight.shape[0], width):
        p = (head.logits(hidden, low, columns).to(total.dtype) - total[:, None]).exp_()
        p.mul_(-grad[:, None])
        rows = ((labels >= columns.start) & (labels < columns.stop)).nonzero()[:, 0]
        p[rows, labels[rows] - columns.start] = grad[rows] * torch.sigmoid(others - label_logit)[rows]
        d_logits = p.to(hidden.dtype)
        if d_weight is not None:
            d_weight[columns] = d_logits.T @ hidden
        if d_bias is not None:
            d_bias[columns] = p.sum(0).to(d_bias.dtype)
        if d_up is not None and low is not None:
            d_up[columns] = d_logits.T @ low
    return d_weight, d_bias, d_up


def check(hidden: Tensor, head: Tensor, labels: Tensor) -> None:
    """Refuse shapes that do not fit; labels are checked where that needs no device sync."""
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
) -> Tensor:
    """log p(label) of each row: (N, D), (V, D), (N,) -> (N,) float32. See `mint.kernels.token_logprob`."""
    check(hidden, head, labels)
    out: Tensor = TokenLogprob.apply(hidden, head, labels, bias, low, up, tile, plain_step, torch.is_grad_enabled())
    return out


@torch.no_grad()
def row_logsumexp(hidden: Tensor, head: Tensor, *, tile: int | None = None) -> Tensor:
    """logsumexp of hidden headᵀ over the vocabulary: (N, D), (V, D) -> (N,) float32."""
    totals = []
    for rows in tiles(hidden.shape[0], ROWS):
        part = hidden[rows]
        total = part.new_full((part.shape[0],), float("-inf"), dtype=_exact(part))
        for columns in tiles(head.shape[0], tile_columns(part.shape[0], head.shape[0], tile)):
            logits = (part @ head[columns].T).to(total.dtype)
            total = torch.logaddexp(total, torch.logsumexp(logits, dim=1))
        totals.append(total)
    return torch.cat(totals) if totals else hidden.new_zeros(0, dtype=_exact(hidden))


class LogOddsRatio(torch.autograd.Function):
    """log odds(chosen) - log odds(rejected), with the analytic gradient ±1 / (1 - p), which no branch can turn into NaN."""

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
    """log(p / (1 - p)) and its slope 1 / (1 - p) from log p; at p = 1 those of the largest p below 1 that has a slope."""
    logp = logp.to(_exact(logp))
    logp = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    left = -torch.expm1(logp)  # 1 - p
    log_left = torch.where(logp > -0.6931, left.log(), torch.log1p(-logp.exp()))
    return logp - log_left, left.reciprocal()


def log_odds_ratio(chosen_logp: Tensor, rejected_logp: Tensor) -> Tensor:
    """ORPO equation 4 on mean log-probabilities: (B,), (B,) -> (B,). See `mint.kernels.log_odds_ratio`."""
    out: Tensor = LogOddsRatio.apply(chosen_logp, rejected_logp)
    return out
