"""Attention on a forest of tokens, on a processor: exact, block by block, with only the keys that a block can see.

Shapes: T tokens, H heads, K key-value heads, G = H / K, d head width, n queries of a block, m keys of a block.

Token i sees token j exactly when j <= i < end[j]. In depth-first order the tokens that a block of queries [a, b) can see
are the ancestors of token a and the block itself, so a branch never meets its siblings, a packed row never meets its
neighbours, and a plain causal row meets only what lies before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES = 64
"""Queries of a block: enough to keep a product busy, few enough that little of the masked corner is computed."""


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

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add (K, m, d) onto the rows of (K, T, d) that it came from."""
        at = 0
        for run in self.runs:
            width = run.stop - run.start
            total[:, run] += part[:, at : at + width]
            at += width


def tree_layout(end: Tensor) -> tuple[Block, ...]:
    """The blocks of a forest: end (T,) -> blocks that cover all queries once."""
    ends: list[int] = end.tolist()
    blocks: list[Block] = []
    path: list[int] = []  # the ancestors of the token at `first`
    first = 0
    while first < len(ends):
        while path and ends[path[-1]] <= first:
            path.pop()
        stop = _stop(ends, first)
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


def _stop(ends: list[int], first: int) -> int:
    """Where the block that begins at `first` stops: after QUERIES tokens, or where a long branch does."""
    stop = min(first + QUERIES, len(ends))
    for token in range(first, stop):
        if first + QUERIES // 2 <= ends[token] < stop:
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

    All of it is computed in float32 at least: bfloat16 scores, or their gradients, would cost digits of the softmax.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: tuple[Block, ...]) -> Tensor:
        queries, keys, values = _split(q, k.shape[1]), _heads(k), _heads(v)
        queries *= q.shape[-1] ** -0.5
        out = torch.empty_like(queries)
        for block in blocks:
            weights = _scores(queries, keys, block).softmax(dim=-1)
            out[:, :, block.first : block.stop] = _product(weights, block.keys(values))
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v)
            ctx.blocks = blocks
        return _join(out, q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        queries, keys, values = _split(q, k.shape[1]), _heads(k), _heads(v)
        grad, scale = _split(grads[0], k.shape[1]), q.shape[-1] ** -0.5
        queries *= scale
        d_q, d_k, d_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for block in ctx.blocks:
            rows = slice(block.first, block.stop)
            weights = _scores(queries, keys, block).softmax(dim=-1)
            block.add(d_v, _across(weights, grad[:, :, rows]))
            d_weights = _product(grad[:, :, rows], block.keys(values).transpose(1, 2))
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            block.add(d_k, _across(d_scores, queries[:, :, rows]))
            d_q[:, :, rows] = _product(d_scores, block.keys(keys))
        d_q *= scale
        return _join(d_q, q.dtype), d_k.transpose(0, 1).to(k.dtype), d_v.transpose(0, 1).to(v.dtype), None


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _split(x: Tensor, groups: int) -> Tensor:
    """(T, H, d) -> a copy (K, G, T, d) in float32 at least: head h belongs to key-value head h // G."""
    grouped: Tensor = x.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
    return torch.empty(grouped.shape, dtype=_exact(x), device=x.device).copy_(grouped)


def _join(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(K, G, T, d) -> (T, H, d)."""
    return x.permute(2, 0, 1, 3).to(dtype).flatten(1, 2)


def _heads(x: Tensor) -> Tensor:
    """(T, K, d) -> (K, T, d), in float32 at least."""
    return x.transpose(0, 1).to(_exact(x)).contiguous()


def _scores(q: Tensor, k: Tensor, block: Block) -> Tensor:
    """Masked scores (K, G, n, m)."""
    scores = _product(q[:, :, block.first : block.stop], block.keys(k).transpose(1, 2))
    scores[..., scores.shape[-1] - block.mask.shape[1] :] += block.mask
    return scores


def _product(x: Tensor, y: Tensor) -> Tensor:
    """(K, G, n, a) @ (K, a, b) -> (K, G, n, b), all heads of a group in one product."""
    out: Tensor = torch.bmm(x.flatten(1, 2), y).unflatten(1, x.shape[1:3])
    return out


def _across(x: Tensor, y: Tensor) -> Tensor:
    """Sum over the queries of a group: (K, G, n, a), (K, G, n, b) -> (K, a, b)."""
    return torch.bmm(x.flatten(1, 2).transpose(1, 2), y.flatten(1, 2))


def tree_attention(q: Tensor, k: Tensor, v: Tensor, layout: tuple[Block, ...]) -> Tensor:
    """q (T, H, d), k and v (T, K, d) -> (T, H, d)."""
    out: Tensor = TreeAttention.apply(q, k, v, layout)
    return out
