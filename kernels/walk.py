"""The walk over tokens and vocabulary, tile by tile: what `token_logprob` knows of each row without its logits.

Shapes: N rows, D width, V vocabulary, r rank of a LoRA on the head, t columns of a vocabulary tile. With l the label's logit
and o = logsumexp of all *other* logits,

    log p(label)       = -log(1 + exp(o - l))                       exact near p = 1, and never positive
    d log p / d hidden = (1 - p) (W[label] - sum_j q_j W[j]),       1 - p = sigmoid(o - l), q = softmax over the others

Both sides are known after one walk. This one is plain PyTorch; that of logprob.py has the same form with Triton in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
    at together unless `tile` says otherwise, and `near` of them are raised together: 2 MiB in float32, for the cache.
    """

    rows, elements, near = 4096, 1 << 22, 1 << 19

    def __init__(
        self, hidden: Tensor, labels: Tensor, sums: Tensor | None, low_sums: Tensor | None, skip: float = 0.0
    ) -> None:
        exact, n = sum_dtype(hidden), hidden.shape[0]
        self.labels, self.dtype, self.sums, self.low_sums, self.skip = labels, hidden.dtype, sums, low_sums, skip
        self.level = hidden.new_full((n,), torch.finfo(exact).min / 2, dtype=exact)
        self.total, self.left_out, self.label_logit = hidden.new_zeros(3, n, dtype=exact)
        self.room: Tensor | None = None
        for empty in (sums, low_sums):
            if empty is not None:
                empty.zero_()

    def fold(self, logits: Tensor, first: int) -> Tensor:
        """Take the label out of a tile (n, t) and add the rest to the logsumexp of the others, level + log(total).

        The tile becomes exp(logits - level) if there are sums to gather; `before` weighs those so far.
        """
        rows = ((self.labels >= first) & (self.labels < first + logits.shape[1])).nonzero()[:, 0]
        columns = self.labels[rows] - first
        self.label_logit[rows] = logits[rows, columns].to(self.level.dtype)
        logits[rows, columns] = torch.finfo(logits.dtype).min / 2  # finite: a tile of nothing else must not give NaN
        level, mass = self.level.clone(), torch.empty_like(self.level)
        for near in slices(len(logits), max(self.near // logits.shape[1], 1)):
            self.raise_(logits[near], level[near], mass[near])
        self.before = (self.level - level).exp()
        self.level, self.total = level, self.total * self.before + mass
        self.kept = self.not_left_out(mass) if self.skip else None
        return logits

    def raise_(self, logits: Tensor, level: Tensor, mass: Tensor) -> None:
        """exp(logits - level) of some rows, after their level has risen to the highest, and its sum: (n, t), (n,), (n,)."""
        share = self._exact(logits)
        torch.maximum(level, share.amax(dim=1), out=level)
        share.sub_(level[:, None]).mul_(LOG2_E).exp2_()  # quicker than exp_
        torch.sum(share, dim=1, out=mass)
        if self.sums is not None and share is not logits:
            logits.copy_(share)

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
        """Logits where their exponentials go: themselves, or a copy in memory of a wider dtype that all rows share."""
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
        sums, low_sums = (x.new_empty(x.shape, dtype=sum_dtype(x)) if wanted and x is not None else None
                          for x in (hidden, low))  # fmt: skip
        ends = [(hidden.new_empty(0, dtype=sum_dtype(hidden)),) * 2]
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


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of sums: float32 at least."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
