"""Attention on a forest of tokens, on a processor: exact, block by block, with only the keys that a block can see.

Shapes: T tokens, H heads, K key-value heads, G = H / K, d head width, n queries of a block, m keys of a block.

Token i sees token j exactly when j <= i < end[j]. In depth-first order the tokens that a block of queries [a, b) can see
are the ancestors of token a and the block itself, so a branch never meets its siblings, a packed row never meets its
neighbours, and a plain causal row meets only what lies before it. A forest of plain rows alone goes to torch's own causal
attention where that is as quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES = 48
"""Queries of a block: enough to keep a product busy, few enough that little of the masked corner is computed."""
ON_GPU = 512
"""Queries of a block on a GPU, where what counts is how many products are launched."""
LONG = 1024
"""bfloat16 rows of so many tokens are left to torch, which multiplies its larger tiles in bfloat16; float32 rows all are."""


@dataclass(frozen=True, slots=True)
class Block:
    """Queries [first, stop) and the runs of keys they can see; `mask` is added to the last columns of the scores."""

    first: int
    stop: int
    runs: tuple[slice, ...]
    mask: Tensor  # (n, columns), 0 or -inf

    def keys(self, x: Tensor) -> Tensor:
        """(K, T, d) -> (K, m, d)."""
        return x[:, self.runs[0]] if len(self.runs) == 1 else torch.cat([x[:, run] for run in self.runs], dim=1)

    def add(self, total: Tensor, weights: Tensor, rows: Tensor) -> None:
        """Add weightsᵀ rows, (K, n G, m) and (K, n G, d), onto the rows of (K, T, d) that the keys came from."""
        at = 0
        for run in self.runs:
            width = run.stop - run.start
            total[:, run].baddbmm_(weights[..., at : at + width].transpose(1, 2), rows)
            at += width


@dataclass(frozen=True, slots=True)
class Rows:
    """Plain causal rows one after the other, and their blocks."""

    rows: tuple[slice, ...]
    blocks: tuple[Block, ...]

    def suit_torch(self, dtype: torch.dtype) -> bool:
        """Whether torch's own causal attention is at least as quick."""
        return dtype.itemsize > 2 or all(row.stop - row.start >= LONG for row in self.rows)


Layout = Rows | tuple[Block, ...]


def tree_layout(end: Tensor) -> Layout:
    """How a forest is attended to: end (T,) -> plain rows, or blocks."""
    ends: list[int] = end.tolist()
    rows, first = [], 0
    while first < len(ends):
        rows.append(slice(first, ends[first]))
        first = ends[first]
    plain = bool(rows) and all(set(ends[row]) == {row.stop} for row in rows)
    return Rows(tuple(rows), tree_blocks(end)) if plain else tree_blocks(end)


def tree_blocks(end: Tensor, queries: int = QUERIES) -> tuple[Block, ...]:
    """The blocks of a forest: end (T,) -> blocks of about so many queries that cover all of them once."""
    ends: list[int] = end.tolist()
    blocks: list[Block] = []
    path: list[int] = []  # the ancestors of the token at `first`
    first = 0
    while first < len(ends):
        while path and ends[path[-1]] <= first:
            path.pop()
        stop = _stop(ends, first, queries)
        runs = _runs([*path, *range(first, stop)])
        blocks.append(Block(first, stop, runs, _mask(end, runs, first, stop)))
        for token in range(first, stop):
            while path and ends[path[-1]] <= token:
                path.pop()
            path.append(token)
        first = stop
    return tuple(blocks)


def moved(layout: tuple[Block, ...], before: Sequence[slice], keys: int, queries: int) -> tuple[Block, ...]:
    """The blocks of a forest that stands elsewhere: its tokens see the earlier keys `before` too, its own keys begin at
    `keys`, and its queries at `queries`."""

    def shifted(block: Block) -> Block:
        own = (slice(run.start + keys, run.stop + keys) for run in block.runs)
        return Block(block.first + queries, block.stop + queries, (*before, *own), block.mask)

    return tuple(map(shifted, layout))


def masked(seen: Tensor) -> tuple[Block, ...]:
    """One block of all queries on all keys: seen (n, m) says which query sees which key."""
    plain = int(seen.all(dim=0).cumprod(0).sum())  # leading keys that all queries see
    mask = torch.zeros(seen[:, plain:].shape, device=seen.device).masked_fill_(~seen[:, plain:], float("-inf"))
    return (Block(0, seen.shape[0], (slice(0, seen.shape[1]),), mask),)


def _stop(ends: list[int], first: int, queries: int) -> int:
    """Where the block that begins at `first` stops: after so many tokens, or where a long branch does."""
    stop = min(first + queries, len(ends))
    for token in range(first, stop):
        if first + queries // 2 <= ends[token] < stop:
            stop = ends[token]
    return stop


def _runs(tokens: list[int]) -> tuple[slice, ...]:
    runs: list[slice] = []
    for token in tokens:
        if runs and runs[-1].stop == token:
            runs[-1] = slice(runs[-1].start, token + 1)
        else:
            runs.append(slice(token, token + 1))
    return tuple(runs)


def _mask(end: Tensor, runs: tuple[slice, ...], first: int, stop: int) -> Tensor:
    """(n, columns) of 0 where a query sees a key and -inf elsewhere, without the leading keys that all queries see."""
    keys = torch.cat([torch.arange(run.start, run.stop) for run in runs])
    ends = end.cpu()[keys]
    plain = int(((keys <= first) & (ends >= stop)).cumprod(0).sum())
    keys, ends, queries = keys[plain:], ends[plain:], torch.arange(first, stop)[:, None]
    seen = (keys <= queries) & (queries < ends)
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")).to(end.device)


class TreeAttention(torch.autograd.Function):
    """softmax(q kᵀ / sqrt(d)) v under the tree's mask; backward computes the scores again instead of keeping them.

    All of it is computed in float32 at least: bfloat16 scores, or their gradients, would cost digits of the softmax. The
    heads of a group stand beside each other at each token, so a block of queries is one matrix (n G, d) in place.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: tuple[Block, ...]) -> Tensor:
        group = q.shape[1] // k.shape[1]
        queries, keys, values = _split(q, group), _split(k, 1), _split(v, 1)
        queries *= q.shape[-1] ** -0.5
        out = torch.empty_like(queries)
        for block in blocks:
            rows = slice(group * block.first, group * block.stop)
            weights = _weights(queries[:, rows], block.keys(keys), block.mask)
            torch.bmm(weights, block.keys(values), out=out[:, rows])
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v)
            ctx.blocks = blocks
        return _join(out, group, q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
        queries, keys, values, grad = _split(q, group), _split(k, 1), _split(v, 1), _split(grads[0], group)
        queries *= scale
        d_q, d_k, d_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for block in ctx.blocks:
            rows = slice(group * block.first, group * block.stop)
            its_keys, its_queries, its_grad = block.keys(keys), queries[:, rows], grad[:, rows]
            weights = _weights(its_queries, its_keys, block.mask)
            block.add(d_v, weights, its_grad)
            d_weights = torch.bmm(its_grad, block.keys(values).transpose(1, 2))
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            block.add(d_k, d_scores, its_queries)
            torch.bmm(d_scores, its_keys, out=d_q[:, rows])
        d_q *= scale
        return _join(d_q, group, q.dtype), _join(d_k, 1, k.dtype), _join(d_v, 1, v.dtype), None


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _split(x: Tensor, group: int) -> Tensor:
    """(T, K G, d) -> a copy (K, T G, d) in float32 at least: head h belongs to key-value head h // G."""
    grouped = x.unflatten(1, (x.shape[1] // group, group)).transpose(0, 1)
    return torch.empty(grouped.shape, dtype=_exact(x), device=x.device).copy_(grouped).flatten(1, 2)


def _join(x: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """(K, T G, d) -> (T, K G, d)."""
    out: Tensor = x.unflatten(1, (x.shape[1] // group, group)).transpose(0, 1).to(dtype).flatten(1, 2)
    return out


def _weights(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """Masked softmax of the scores: (K, n G, d), (K, m, d) -> (K, n G, m)."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    of_a_token = scores.unflatten(1, (len(mask), -1))
    of_a_token[..., scores.shape[-1] - mask.shape[1] :].add_(mask[:, None])
    return scores.softmax(dim=-1)


def branch_attention(q: Tensor, k: Tensor, v: Tensor, layout: tuple[Block, ...]) -> Tensor:
    """Block by block through torch's own attention, in the dtype of q and without a gradient: for a GPU, where products in
    float32 are slow."""
    out, group = torch.empty_like(q), q.shape[1] // k.shape[1]
    queries, keys, values = (x.transpose(0, 1) for x in (q, k, v))
    for block in layout:
        rows = slice(block.first, block.stop)
        its_keys, its_values = (block.keys(x).repeat_interleave(group, dim=0)[None] for x in (keys, values))
        mask = F.pad(block.mask.to(q.dtype), (its_keys.shape[2] - block.mask.shape[1], 0))  # the leading ones are open
        found = F.scaled_dot_product_attention(queries[None, :, rows], its_keys, its_values, attn_mask=mask)
        out[rows] = found[0].transpose(0, 1)
    return out


def _row_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one plain row."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def tree_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """q (T, H, d), k and v (T, K, d) -> (T, H, d)."""
    if isinstance(layout, Rows) and layout.suit_torch(q.dtype):
        parts = [_row_attention(q[row], k[row], v[row]) for row in layout.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    out: Tensor = TreeAttention.apply(q, k, v, layout.blocks if isinstance(layout, Rows) else layout)
    return out
