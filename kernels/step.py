"""Attention of one new token of each row to the columns of a cache, on a GPU: what a step of generation does.

Shapes: B rows, H heads, K key-value heads, G = H / K, d head width, S columns, P parts of a row's columns.

A few queries on many columns would keep few programs busy, so the columns are cut into parts of SPAN that are attended to
side by side; a second launch puts them together. Each part knows its sum of exponentials and their largest exponent, in
base 2 as in attention.py. Which columns a row sees, from its first to the one that is written now, lies on the device: a
part that has none of them ends at once, so one CUDA graph serves all steps. How many columns and parts there are is not
compiled in, so one program serves all texts.

Every part turns its queries itself. The part in which the new column lies turns the new key too, writes key and value into
the cache and begins its sums with them, so no program reads what another one writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import LOG2E, heads_together
from .places import FUSED, on_its_device

SPAN = 128
"""Columns of a part."""


@triton.jit
def _turned(x, at, inside, cos, sin, d: tl.constexpr):
    """The elements `at` of heads that begin at x: left cos - right sin and right cos + left sin, in float32."""
    own = tl.load(x + at, mask=inside, other=0.0)
    other = tl.load(x + (at + d // 2) % d, mask=inside, other=0.0).to(tl.float32)
    return (own.to(tl.float32) * cos + other * tl.where(at < d // 2, -sin, sin)).to(own.dtype)


@triton.jit(do_not_specialize=["S", "parts"])
def _part_kernel(
    q, k, v, cos, sin, keys, values, first, now, sums, tops, totals, q_stride, k_stride, v_stride, S, K, parts, scale,
    G: tl.constexpr, d: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The heads of one group of one row on one part of the columns."""
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head, new = group // K, group % K, tl.load(now).to(tl.int32)
    heads, at = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    wide, mine = at < d, (heads[:, None] < G) & (at[None, :] < d)
    angle = row * (d // 2) + at % (d // 2)
    turn = tl.load(cos + angle, mask=wide, other=0.0).to(tl.float32)
    lean = tl.load(sin + angle, mask=wide, other=0.0).to(tl.float32)
    its_heads = q + row * q_stride + (head * G + heads[:, None]) * d
    queries = _turned(its_heads, at[None, :], mine, turn[None, :], lean[None, :], d)
    begin = tl.maximum(part * SPAN, tl.load(first + row).to(tl.int32))
    stop = tl.minimum(part * SPAN + SPAN, new)
    here = (new >= part * SPAN) & (new < part * SPAN + SPAN)  # the new column is one of this part
    its = at < tl.where(here, d, 0)
    key = _turned(k + row * k_stride + head * d, at, its, turn, lean, d)
    value = tl.load(v + row * v_stride + head * d + at, mask=its, other=0.0)
    tl.store(keys + (group * S + new) * d + at, key, mask=its)
    tl.store(values + (group * S + new) * d + at, value, mask=its)
    alone = tl.sum(queries.to(tl.float32) * key[None, :].to(tl.float32), 1) * scale
    top = tl.where(here, alone, -1e30)
    total = tl.zeros([ROWS], tl.float32) + here.to(tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32) + value[None, :].to(tl.float32)
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
    own = (group * parts + part) * G + heads
    tl.store(tops + own, top, mask=heads < G)
    tl.store(totals + own, total, mask=heads < G)
    tl.store(sums + own[:, None] * d + at[None, :], acc, mask=mine)


@triton.jit(do_not_specialize=["parts"])
def _whole_kernel(
    sums, tops, totals, out, parts, G: tl.constexpr, d: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr
):  # fmt: skip
    """The parts of one head of one row, put together, SIDE of them at a time."""
    head, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    first = head // G * parts * G + head % G
    top, total, acc = -1e30, 0.0, tl.zeros([WIDTH], tl.float32)
    for start in range(0, parts, SIDE):
        part = start + tl.arange(0, SIDE)
        own, inside = first + part * G, (part[:, None] < parts) & (at[None, :] < d)
        its_tops = tl.load(tops + own, mask=part < parts, other=-1e30)
        its_totals = tl.load(totals + own, mask=part < parts, other=0.0)
        its_sums = tl.load(sums + own[:, None] * d + at[None, :], mask=inside, other=0.0)
        risen = tl.maximum(top, tl.max(its_tops))
        before, shares = tl.exp2(top - risen), tl.exp2(its_tops - risen)
        total = total * before + tl.sum(its_totals * shares)
        acc = acc * before + tl.sum(its_sums * shares[:, None], 0)
        top = risen
    tl.store(out + head * d + at, (acc / total).to(out.dtype.element_ty), mask=at < d)


@on_its_device
def step_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, first: Tensor, now: Tensor
) -> Tensor:
    """As in reference.py."""
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(
            "step_attention writes into keys and values (B, K, S, d) where they lie; wanted them contiguous"
        )
    q, k, v = (heads_together(x) for x in (q, k, v))
    (B, H, d), (_, K, S, _) = q.shape, keys.shape
    parts, width = triton.cdiv(S, SPAN), max(triton.next_power_of_2(d), 16)
    precise = q.dtype == torch.float32  # its products take more registers
    sums = q.new_empty(B, K, parts, H // K, d, dtype=torch.float32)
    tops, totals = q.new_empty(2, B, K, parts, H // K, dtype=torch.float32)
    out = q.new_empty(q.shape)
    _part_kernel[(B * K, parts)](
        q, k, v, cos.contiguous(), sin.contiguous(), keys, values, first, now, sums, tops, totals, q.stride(0),
        k.stride(0), v.stride(0), S, K, parts, LOG2E * d**-0.5, G=H // K, d=d,
        ROWS=max(triton.next_power_of_2(H // K), 16), WIDTH=width, SPAN=SPAN, STEP=32 if precise else 64,
        PRECISION="tf32x3" if precise else "tf32", num_warps=4, num_stages=2, **FUSED,
    )  # fmt: skip
    _whole_kernel[(B * H,)](sums, tops, totals, out, parts, G=H // K, d=d, WIDTH=width, SIDE=8, num_warps=2, **FUSED)
    return out
