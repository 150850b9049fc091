"""Attention on a forest of tokens on a GPU: flash attention that skips the blocks that the tree forbids.

Shapes: T tokens, H heads, K key-value heads, G = H / K, d head width, n queries and m keys of a block.

Token i sees token j exactly when j <= i < end[j]. A block of keys can meet a block of queries only if it begins before
the last query and the largest `end` in it lies behind the first query; if its last key lies before the first query and
its smallest `end` behind the last query, it needs no mask. `tree_layout` sorts this out once for all layers: for each
block of queries the keys to visit, the unmasked ones first, and for each block of keys the queries.
Scores are kept in base 2, softmax(x) = 2^(x log2 e - total), and summed in float32. What a program knows of each query,
its total above all, has P >= T places, whole blocks, so that the places are loaded without a check; those past T have the
total infinity, and so weights of 0. T is not compiled in: one program serves all trees.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .places import FUSED, on_its_device

LOG2E = 1.4426950408889634
QUERIES, KEYS = 128, 64
"""Queries and keys of a block where a program owns queries; where it owns keys the two change places."""


class Visits(NamedTuple):
    """What each of n blocks visits: `order[i, :full[i]]` without a mask, `order[i, full[i]:some[i]]` with one."""

    order: Tensor  # (n, m) int32
    full: Tensor  # (n,) int32
    some: Tensor  # (n,) int32


class Layout(NamedTuple):
    end: Tensor  # (T,) int32
    of_queries: Visits
    of_keys: Visits


def tree_layout(end: Tensor) -> Layout:
    """The blocks of a forest: end (T,) -> what visits what. Nothing here waits for the device."""
    of_queries = _visits(_kinds(end, QUERIES, KEYS))
    return Layout(end.int(), of_queries, _visits(_kinds(end, KEYS, QUERIES).T))


def _kinds(end: Tensor, queries: int, keys: int) -> Tensor:
    """(query blocks, key blocks): 0 every query sees every key, 1 some may, 2 none does."""
    at = torch.arange(0, len(end), 1, device=end.device)
    first_query, first_key = at[::queries, None], at[::keys]
    last_query, last_key = first_query + queries - 1, first_key + keys - 1
    padded = torch.nn.functional.pad(end, (0, -len(end) % keys), value=0).view(-1, keys)
    highest = padded.amax(dim=1)
    lowest = torch.where(padded > 0, padded, len(end)).amin(dim=1)
    some = (first_key <= last_query) & (highest > first_query)
    full = (last_key <= first_query) & (lowest > last_query.clamp(max=len(end) - 1))
    return 2 - some.int() - (some & full).int()


def _visits(kinds: Tensor) -> Visits:
    order = kinds.argsort(dim=1, stable=True).int().contiguous()
    return Visits(order, (kinds == 0).sum(dim=1, dtype=torch.int32), (kinds < 2).sum(dim=1, dtype=torch.int32))


@triton.jit
def _rows(base, rows, stride, T, at, d, CHECK: tl.constexpr):
    """A tile (rows, width) of a (T, d) matrix, 0 outside; the width is checked where it was padded to a power of 2."""
    where = base + rows[:, None].to(tl.int64) * stride + at[None, :]
    if at.shape[0] != d:
        return tl.load(where, mask=(rows[:, None] < T) & (at[None, :] < d), other=0.0)
    elif CHECK:
        return tl.load(where, mask=rows[:, None] < T, other=0.0)
    else:
        return tl.load(where)


@triton.jit
def _seen(queries, keys, ends):
    """Whether a query sees a key, for any pair of shapes that broadcast."""
    return (keys <= queries) & (queries < ends)


@triton.jit
def _visited(order, index, SIDE: tl.constexpr, STEP: tl.constexpr):
    """The tokens of a step: a visited block of SIDE tokens is crossed in steps of STEP."""
    parts: tl.constexpr = SIDE // STEP
    return tl.load(order + index // parts) * SIDE + index % parts * STEP + tl.arange(0, STEP)


@triton.jit
def _attend(
    q, k, v, k_stride, v_stride, end, order, start, stop, rows, top, total, acc, T, scale,
    d: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Visit the key blocks order[start:stop] and fold them into the running softmax."""
    at = tl.arange(0, WIDTH)
    for index in range(start * (SIDE // STEP), stop * (SIDE // STEP)):
        keys = _visited(order, index, SIDE, STEP)
        x = tl.dot(q, tl.trans(_rows(k, keys, k_stride, T, at, d, MASKED)), input_precision=PRECISION) * scale
        if MASKED:
            ends = tl.load(end + keys, mask=keys < T, other=0)
            x = tl.where(_seen(rows[:, None], keys[None, :], ends[None, :]), x, float("-inf"))
        risen = tl.maximum(top, tl.max(x, 1))
        weights = tl.exp2(x - risen[:, None])
        before = tl.exp2(top - risen)
        total = total * before + tl.sum(weights, 1)
        values = _rows(v, keys, v_stride, T, at, d, MASKED)
        acc = tl.dot(weights.to(values.dtype), values, acc * before[:, None], input_precision=PRECISION)
        top = risen
    return top, total, acc


@triton.jit(do_not_specialize=["visits", "T"])
def _forward_kernel(
    q, k, v, out, totals, end, order, full, some, q_stride, k_stride, v_stride, visits, T, P, H, G, scale,
    d: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; the tiles that see most come first."""
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    rows, at = tile * TILE + tl.arange(0, TILE), tl.arange(0, WIDTH)
    queries = _rows(q + head * d, rows, q_stride, T, at, d, True)
    k += head // G * d
    v += head // G * d
    block = tile // (BLOCK // TILE)
    order += block * visits
    n_full, n_some = tl.load(full + block), tl.load(some + block)
    top = tl.full([TILE], -1e30, tl.float32)  # finite: a row whose block hides everything must not give NaN
    total, acc = tl.zeros([TILE], tl.float32), tl.zeros([TILE, WIDTH], tl.float32)
    top, total, acc = _attend(queries, k, v, k_stride, v_stride, end, order, 0, n_full, rows, top, total, acc, T, scale,
                              d, SIDE, STEP, WIDTH, False, PRECISION)  # fmt: skip
    top, total, acc = _attend(queries, k, v, k_stride, v_stride, end, order, n_full, n_some, rows, top, total, acc, T,
                              scale, d, SIDE, STEP, WIDTH, True, PRECISION)  # fmt: skip
    total = tl.where(rows < T, total, 1.0)
    where = out + (rows[:, None].to(tl.int64) * H + head) * d + at[None, :]
    tl.store(where, (acc / total[:, None]).to(out.dtype.element_ty), mask=(rows[:, None] < T) & (at[None, :] < d))
    tl.store(totals + head * P + rows, tl.where(rows < T, top + tl.log2(total), float("inf")))


@triton.jit(do_not_specialize=["T"])
def _inner_kernel(out, grad, inner, T, P, H, d: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """inner (H, P) = sum over d of out * grad, both (T, H, d)."""
    head = tl.program_id(1)
    rows, at = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    x = _rows(out + head * d, rows, H * d, T, at, d, True).to(tl.float32)
    y = _rows(grad + head * d, rows, H * d, T, at, d, True).to(tl.float32)
    tl.store(inner + head * P + rows, tl.sum(x * y, 1))


@triton.jit
def _queries_backward(
    queries, grads, totals, inner, k, v, k_stride, v_stride, end, order, start, stop, rows, acc, T, scale,
    d: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, WIDTH)
    for index in range(start * (SIDE // STEP), stop * (SIDE // STEP)):
        columns = _visited(order, index, SIDE, STEP)
        keys = _rows(k, columns, k_stride, T, at, d, MASKED)
        x = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        weights = tl.exp2(x - totals[:, None])
        if MASKED:
            ends = tl.load(end + columns, mask=columns < T, other=0)
            weights = tl.where(_seen(rows[:, None], columns[None, :], ends[None, :]), weights, 0.0)
        values = _rows(v, columns, v_stride, T, at, d, MASKED)
        d_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        d_x = (weights * (d_weights - inner[:, None])).to(keys.dtype)
        acc = tl.dot(d_x, keys, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["visits", "T"])
def _backward_queries_kernel(
    q, k, v, grad, totals, inner, d_q, end, order, full, some, q_stride, k_stride, v_stride, visits, T, P, H, G,
    scale, factor, d: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d loss / d q of one tile of queries of one head."""
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    rows, at = tile * TILE + tl.arange(0, TILE), tl.arange(0, WIDTH)
    queries = _rows(q + head * d, rows, q_stride, T, at, d, True)
    grads = _rows(grad + head * d, rows, H * d, T, at, d, True)
    its_total, its_inner = tl.load(totals + head * P + rows), tl.load(inner + head * P + rows)
    k += head // G * d
    v += head // G * d
    block = tile // (BLOCK // TILE)
    order += block * visits
    n_full, n_some = tl.load(full + block), tl.load(some + block)
    acc = tl.zeros([TILE, WIDTH], tl.float32)
    acc = _queries_backward(queries, grads, its_total, its_inner, k, v, k_stride, v_stride, end, order, 0, n_full,
                            rows, acc, T, scale, d, SIDE, STEP, WIDTH, False, PRECISION)  # fmt: skip
    acc = _queries_backward(queries, grads, its_total, its_inner, k, v, k_stride, v_stride, end, order, n_full, n_some,
                            rows, acc, T, scale, d, SIDE, STEP, WIDTH, True, PRECISION)  # fmt: skip
    where = d_q + (rows[:, None].to(tl.int64) * H + head) * d + at[None, :]
    tl.store(where, (acc * factor).to(d_q.dtype.element_ty), mask=(rows[:, None] < T) & (at[None, :] < d))


@triton.jit
def _keys_backward(
    keys, values, ends, columns, q, grad, totals, inner, q_stride, grad_stride, order, start, stop, d_k, d_v, T, scale,
    d: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, WIDTH)
    for index in range(start * (SIDE // STEP), stop * (SIDE // STEP)):
        rows = _visited(order, index, SIDE, STEP)
        queries = _rows(q, rows, q_stride, T, at, d, True)
        x = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
        weights = tl.exp2(x - tl.load(totals + rows)[None, :])
        if MASKED:
            weights = tl.where(_seen(rows[None, :], columns[:, None], ends[:, None]), weights, 0.0)
        grads = _rows(grad, rows, grad_stride, T, at, d, True)
        d_v = tl.dot(weights.to(grads.dtype), grads, d_v, input_precision=PRECISION)
        d_weights = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        d_x = weights * (d_weights - tl.load(inner + rows)[None, :])
        d_k = tl.dot(d_x.to(queries.dtype), queries, d_k, input_precision=PRECISION)
    return d_k, d_v


@triton.jit(do_not_specialize=["visits", "T"])
def _backward_keys_kernel(
    q, k, v, grad, totals, inner, d_k, d_v, end, order, full, some, q_stride, k_stride, v_stride, visits, T, P, H, G,
    scale, factor, d: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d loss / d k and v of one tile of keys of one key-value head, summed over the heads of its group in place."""
    tile, head = tl.program_id(0), tl.program_id(1)
    columns, at = tile * TILE + tl.arange(0, TILE), tl.arange(0, WIDTH)
    keys = _rows(k + head * d, columns, k_stride, T, at, d, True)
    values = _rows(v + head * d, columns, v_stride, T, at, d, True)
    ends = tl.load(end + columns, mask=columns < T, other=0)
    block = tile // (BLOCK // TILE)
    order += block * visits
    n_full, n_some = tl.load(full + block), tl.load(some + block)
    its_k, its_v = tl.zeros([TILE, WIDTH], tl.float32), tl.zeros([TILE, WIDTH], tl.float32)
    for one in range(head * G, head * G + G):
        its_k, its_v = _keys_backward(keys, values, ends, columns, q + one * d, grad + one * d, totals + one * P,
                                      inner + one * P, q_stride, H * d, order, 0, n_full, its_k, its_v, T, scale,
                                      d, SIDE, STEP, WIDTH, False, PRECISION)  # fmt: skip
        its_k, its_v = _keys_backward(keys, values, ends, columns, q + one * d, grad + one * d, totals + one * P,
                                      inner + one * P, q_stride, H * d, order, n_full, n_some, its_k, its_v, T, scale,
                                      d, SIDE, STEP, WIDTH, True, PRECISION)  # fmt: skip
    where = (columns[:, None].to(tl.int64) * (H // G) + head) * d + at[None, :]
    inside = (columns[:, None] < T) & (at[None, :] < d)
    tl.store(d_k + where, (its_k * factor).to(d_k.dtype.element_ty), mask=inside)
    tl.store(d_v + where, its_v.to(d_v.dtype.element_ty), mask=inside)


class TreeAttention(torch.autograd.Function):
    """The forward pass keeps one number per query and head, from which backward computes the weights again."""

    @staticmethod
    @on_its_device
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        q, k, v = (heads_together(x) for x in (q, k, v))
        T, H, d = q.shape
        out, totals = q.new_empty(T, H, d), q.new_empty(H, triton.cdiv(T, QUERIES) * QUERIES, dtype=torch.float32)
        launch = _launch(q)
        _forward_kernel[(totals.shape[1] // launch["TILE"], H)](
            q, k, v, out, totals, layout.end, *layout.of_queries, *_sizes(q, k, v, layout.of_queries, totals),
            LOG2E * d**-0.5, **launch,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, totals)
        ctx.layout = layout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (q, k, v, out, totals), layout, grad = ctx.saved_tensors, ctx.layout, grads[0].contiguous()
        T, H, d = q.shape
        inner, P = torch.empty_like(totals), totals.shape[1]
        width = triton.next_power_of_2(d)
        _inner_kernel[(P // 64, H)](out, grad, inner, T, P, H, d=d, ROWS=64, WIDTH=width, **FUSED)
        d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
        scales, given = (LOG2E * d**-0.5, d**-0.5), (q, k, v, grad, totals, inner)
        launch = _launch(q, backward=True)
        _backward_queries_kernel[(triton.cdiv(T, launch["TILE"]), H)](
            *given, d_q, layout.end, *layout.of_queries, *_sizes(q, k, v, layout.of_queries, totals), *scales,
            **launch,
        )  # fmt: skip
        _backward_keys_kernel[(triton.cdiv(T, launch["TILE"]), k.shape[1])](
            *given, d_k, d_v, layout.end, *layout.of_keys, *_sizes(q, k, v, layout.of_keys, totals), *scales,
            **launch,
        )  # fmt: skip
        return d_q, d_k, d_v, None


def heads_together(x: Tensor) -> Tensor:
    """(T, heads, d) with the heads side by side; the rows may lie apart, as in a slice of one product of all three."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _sizes(q: Tensor, k: Tensor, v: Tensor, visits: Visits, totals: Tensor) -> tuple[int, ...]:
    (T, H, _), P = q.shape, totals.shape[1]
    return q.stride(0), k.stride(0), v.stride(0), visits.order.shape[1], T, P, H, H // k.shape[1]


def _launch(q: Tensor, backward: bool = False) -> dict[str, Any]:
    """Tile, step and warps, found by compiling ahead of time: the largest that spill no register (README.md)."""
    width, precise = max(triton.next_power_of_2(q.shape[2]), 16), q.dtype == torch.float32
    padded = width > q.shape[2]  # the checks at its edge take registers too
    if precise:
        tile, step, warps = (16, 32, 8) if width > 64 else (32, 32, 8 if backward else 4)
    elif capability(q.device) >= (9, 0):
        tile, step, warps = 128, 32 if backward and padded else 64, 8
    else:
        tile, step, warps = 64, 32 if backward and width <= 64 else 64, 8 if backward or padded else 4
    sizes = {"d": q.shape[2], "BLOCK": QUERIES, "TILE": tile, "SIDE": KEYS, "STEP": step, "WIDTH": width}
    return {**sizes, **FUSED, "num_warps": warps, "num_stages": 2, "PRECISION": "tf32x3" if precise else "tf32"}


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter and the ahead-of-time compiler have no device to ask."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def tree_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """q (T, H, d), k and v (T, K, d) -> (T, H, d); see `mint.kernels.tree_attention`."""
    return TreeAttention.apply(q, k, v, layout)
