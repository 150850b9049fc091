"""What stands between the products of a block on a GPU: norm (and the sum before it), rotation and SwiGLU, one
launch each way.

Shapes: N tokens, D width, H heads, d head width, F feed-forward width. Each value is read once, computed in float32 and
rounded once; between.py has the plain twins and the Functions that call these.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import heads_together
from .places import FUSED, on_its_device
from .walk import sum_dtype

LARGEST = 8192
"""Columns that one program of a norm holds; a wider row is crossed in steps, twice."""

PIECE = 1024
"""Elements, or pairs of them, of a program that knows no rows."""


@triton.jit
def _value(x, added, where, inside, out, exact: tl.constexpr):
    """What is normed: x, or x + added as rounded to the dtype of `out`."""
    value = tl.load(x + where, mask=inside, other=0.0).to(exact)
    if added is not None:
        value = (value + tl.load(added + where, mask=inside, other=0.0).to(exact)).to(out.dtype.element_ty).to(exact)
    return value


@triton.jit
def _norm_kernel(x, added, weight, total, out, scale, D, EPS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """A row: out = (value * factor) rounded, times the weight; with `added` the value x + added goes to `total`."""
    row = tl.program_id(0).to(tl.int64)
    exact: tl.constexpr = scale.dtype.element_ty
    at = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], exact)
    value, gain = squares, tl.load(weight + at, mask=at < D, other=0.0).to(exact)
    for start in range(0, BLOCK if WHOLE else D, BLOCK):
        where, inside = row * D + start + at, start + at < D
        value = _value(x, added, where, inside, out, exact)
        squares += value * value
        if added is not None:
            tl.store(total + where, value.to(total.dtype.element_ty), mask=inside)
    factor = 1.0 / tl.sqrt(tl.sum(squares) / D + EPS)
    tl.store(scale + row, factor)
    for start in range(0, BLOCK if WHOLE else D, BLOCK):
        where, inside = row * D + start + at, start + at < D
        if not WHOLE:
            value = _value(x, added, where, inside, out, exact)
            gain = tl.load(weight + start + at, mask=inside, other=0.0).to(exact)
        normal = (value * factor).to(out.dtype.element_ty).to(exact) * gain
        tl.store(out + where, normal.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _pair(grad, x, weight, at, inside, factor, exact: tl.constexpr):
    """normal = factor x, and g = grad * weight."""
    normal = tl.load(x + at, mask=inside, other=0.0).to(exact) * factor
    g = tl.load(grad + at, mask=inside, other=0.0).to(exact)
    return normal, g * tl.load(weight + at, mask=inside, other=0.0).to(exact)


@triton.jit
def _norm_back_kernel(grad, x, weight, scale, beside, out, D, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """A row: out = factor (g - normal mean(g normal)), plus `beside`."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(scale + row)
    exact: tl.constexpr = scale.dtype.element_ty
    grad, x, at = grad + row * D, x + row * D, tl.arange(0, BLOCK)
    products = tl.zeros([BLOCK], exact)
    normal, g = products, products
    for start in range(0, BLOCK if WHOLE else D, BLOCK):
        normal, g = _pair(grad, x, weight, start + at, start + at < D, factor, exact)
        products += g * normal
    mean = tl.sum(products) / D
    for start in range(0, BLOCK if WHOLE else D, BLOCK):
        where, inside = row * D + start + at, start + at < D
        if not WHOLE:
            normal, g = _pair(grad, x, weight, start + at, inside, factor, exact)
        found = (g - normal * mean) * factor
        if beside is not None:
            found += tl.load(beside + where, mask=inside, other=0.0).to(exact)
        tl.store(out + where, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _wide(x):
    """The dtype to compute in."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, small) / (1.0 + small)


@triton.jit
def _gate_kernel(gates, up, out, gates_stride, up_stride, F, BLOCK: tl.constexpr):
    """A piece of a row; rows of gates and up may lie apart."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < F
    g = _wide(tl.load(gates + row * gates_stride + at, mask=inside))
    u = _wide(tl.load(up + row * up_stride + at, mask=inside))
    tl.store(out + row * F + at, (g * _sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_back_kernel(grad, gates, up, d_gates, d_up, count, BLOCK: tl.constexpr):
    """silu' = s (1 + g (1 - s)) with s = sigmoid(g)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g, u = _wide(tl.load(gates + at, mask=inside)), _wide(tl.load(up + at, mask=inside))
    back, s = _wide(tl.load(grad + at, mask=inside)), _sigmoid(g)
    tl.store(d_up + at, (back * g * s).to(d_up.dtype.element_ty), mask=inside)
    tl.store(d_gates + at, (back * u * s * (1.0 + g * (1.0 - s))).to(d_gates.dtype.element_ty), mask=inside)


@triton.jit
def _turn_kernel(x, cos, sin, out, stride, pairs, HALF: tl.constexpr, WAY: tl.constexpr, BLOCK: tl.constexpr):
    """Some pairs (left, right) of a token: pair i of its H d / 2 is number i % HALF of head i // HALF."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, within = at < pairs, at % HALF
    left = at // HALF * 2 * HALF + within
    x += token * stride
    out += token * 2 * pairs
    c = _wide(tl.load(cos + token * HALF + within, mask=inside))
    s = _wide(tl.load(sin + token * HALF + within, mask=inside)) * WAY
    one, other = _wide(tl.load(x + left, mask=inside)), _wide(tl.load(x + left + HALF, mask=inside))
    tl.store(out + left, (one * c - other * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + left + HALF, (other * c + one * s).to(out.dtype.element_ty), mask=inside)


def _block(width: int) -> dict[str, int]:
    """BLOCK, warps and registers of a program for a row: 8 elements a thread. A row that it holds WHOLE is read once."""
    size = min(triton.next_power_of_2(width), LARGEST)
    warps = min(max(size // 256, 1), 16)
    return {"WHOLE": width <= size, "BLOCK": size, "num_warps": warps, "maxnreg": 128, **FUSED}


@on_its_device
def normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out, scale = torch.empty_like(x), x.new_empty(len(x), 1, dtype=sum_dtype(x))
    _norm_kernel[(len(x),)](x, None, weight, None, out, scale, x.shape[1], EPS=eps, **_block(x.shape[1]))
    return out, scale


@on_its_device
def add_normalise(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, added = x.contiguous(), added.contiguous()
    total, out, scale = torch.empty_like(x), torch.empty_like(x), x.new_empty(len(x), 1, dtype=sum_dtype(x))
    _norm_kernel[(len(x),)](x, added, weight, total, out, scale, x.shape[1], EPS=eps, **_block(x.shape[1]))
    return total, out, scale


@on_its_device
def normalise_back(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, beside: Tensor | None = None) -> Tensor:
    grad, x, beside = grad.contiguous(), x.contiguous(), None if beside is None else beside.contiguous()
    out = torch.empty_like(x)
    _norm_back_kernel[(len(x),)](grad, x, weight, scale, beside, out, x.shape[1], **_block(x.shape[1]))
    return out


@on_its_device
def gate(gates: Tensor, up: Tensor) -> Tensor:
    gates, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gates, up))
    (rows, width), out = gates.shape, gates.new_empty(gates.shape)
    grid = (rows, triton.cdiv(width, PIECE))
    _gate_kernel[grid](gates, up, out, gates.stride(0), up.stride(0), width, BLOCK=PIECE, **FUSED)
    return out


@on_its_device
def gate_back(grad: Tensor, gates: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad, gates, up = (x.contiguous() for x in (grad, gates, up))
    d_gates, d_up = torch.empty_like(gates), torch.empty_like(up)
    grid = (triton.cdiv(grad.numel(), PIECE),)
    _gate_back_kernel[grid](grad, gates, up, d_gates, d_up, grad.numel(), BLOCK=PIECE, **FUSED)
    return d_gates, d_up


@on_its_device
def turn(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    x, out = heads_together(x), x.new_empty(x.shape)
    pairs, half = x[0].numel() // 2 if len(x) else 0, x.shape[2] // 2
    size = min(triton.next_power_of_2(max(pairs, 1)), PIECE)
    grid = (len(x), triton.cdiv(pairs, size))
    launch = {"HALF": half, "WAY": way, "BLOCK": size, **FUSED}
    _turn_kernel[grid](x, cos.contiguous(), sin.contiguous(), out, x.stride(0), pairs, **launch)
    return out
