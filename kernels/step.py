"""Attention of one new token of each row to the columns of a cache, on a GPU: what a step of generation does.

Shapes: B rows, H heads, K key-value heads, G = H / K, d head width, S columns, P parts of a row's columns.

A few queries on many columns would keep few programs busy, so the columns are cut into parts of SPAN that are attended to
side by side; a second launch puts them together. Each part knows its sum of exponentials and their largest exponent, in
base 2 as in attention.py. Which columns a row sees, from its first to the one that is written now, lies on the device: a
part that has none of them ends at once, so one CUDA graph serves all steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import LOG2E
from .places import on_its_device

SPAN = 128
"""Columns of a part."""


@triton.jit
def _part_kernel(
    q, keys, values, first, now, sums, tops, totals, S, K, parts, scale,
    G: tl.constexpr, d: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The heads of one group of one row on one part of the columns."""
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, at = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mine = (rows[:, None] < G) & (at[None, :] < d)
    queries = tl.load(q + (group * G + rows[:, None]) * d + at[None, :], mask=mine, other=0.0)
    begin = tl.maximum(part * SPAN, tl.load(first + group // K).to(tl.int32))
    stop = tl.minimum(part * SPAN + SPAN, tl.load(now).to(tl.int32) + 1)
    top = tl.full([ROWS], -1e30, tl.float32)
    total, acc = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(begin, stop, STEP):
        columns = start + tl.arange(0, STEP)
        where = (group * S + columns[:, None]) * d + at[None, :]
        inside = (columns[:, None] < stop) & (at[None, :] < d)
        its_keys = tl.load(keys + where, mask=inside, other=0.0)
        x = tl.dot(queries, tl.trans(its_keys), input_precision=PRECISION) * scale
        x = tl.where(columns[None, :] < stop, x, float("-inf"))
        risen = tl.maximum(top, tl.max(x, 1))
        weights, before = tl.exp2(x - risen[:, None]), tl.exp2(top - risen)
        its_values = tl.load(values + where, mask=inside, other=0.0)
        total = total * before + tl.sum(weights, 1)
        acc = tl.dot(weights.to(its_values.dtype), its_values, acc * before[:, None], input_precision=PRECISION)
        top = risen
    own = (group * parts + part) * G + rows
    tl.store(tops + own, top, mask=rows < G)
    tl.store(totals + own, total, mask=rows < G)
    tl.store(sums + own[:, None] * d + at[None, :], acc, mask=mine)


@triton.jit
def _whole_kernel(
    sums, tops, totals, out, parts, G: tl.constexpr, d: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The parts of one head of one row, put together."""
    head, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    own = head // G * parts * G + head % G
    top, total, acc = -1e30, 0.0, tl.zeros([WIDTH], tl.float32)
    for part in range(parts):
        its_top = tl.load(tops + own + part * G)
        risen = tl.maximum(top, its_top)
        before, share = tl.exp2(top - risen), tl.exp2(its_top - risen)
        total = total * before + tl.load(totals + own + part * G) * share
        acc = acc * before + tl.load(sums + (own + part * G) * d + at, mask=at < d, other=0.0) * share
        top = risen
    tl.store(out + head * d + at, (acc / total).to(out.dtype.element_ty), mask=at < d)


@on_its_device
def step_attention(q: Tensor, keys: Tensor, values: Tensor, first: Tensor, now: Tensor) -> Tensor:
    """As in reference.py."""
    (B, H, d), (_, K, S, _) = q.shape, keys.shape
    parts, width = triton.cdiv(S, SPAN), max(triton.next_power_of_2(d), 16)
    precise = q.dtype == torch.float32  # its products take more registers
    sums = q.new_empty(B, K, parts, H // K, d, dtype=torch.float32)
    tops, totals = q.new_empty(2, B, K, parts, H // K, dtype=torch.float32)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _part_kernel[(B * K, parts)](
        q.contiguous(), keys.contiguous(), values.contiguous(), first, now, sums, tops, totals, S, K, parts,
        LOG2E * d**-0.5, G=H // K, d=d, ROWS=max(triton.next_power_of_2(H // K), 16), WIDTH=width, SPAN=SPAN,
        STEP=32 if precise else 64, PRECISION="tf32x3" if precise else "tf32", num_warps=4, num_stages=2,
    )  # fmt: skip
    _whole_kernel[(B * H,)](sums, tops, totals, out, parts, G=H // K, d=d, WIDTH=width, num_warps=2)
    return out
