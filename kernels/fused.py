"""What stands between the products of a block on a GPU: norm, rotation and SwiGLU, one launch each way.

Shapes: N tokens, D width, H heads, d head width, F feed-forward width. Each value is read once, computed in float32 and
rounded once; between.py has the plain twins and the Functions that call these.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import _exact

LARGEST = 8192
"""Columns that one program of a norm holds; a wider row is crossed in steps."""

PIECE = 1024
"""Elements, or pairs of them, of a program that knows no rows."""


@triton.jit
def _norm_kernel(x, weight, out, scale, D, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """A row: out = (x * factor) rounded, times the weight."""
    row = tl.program_id(0).to(tl.int64)
    exact = scale.dtype.element_ty
    x, out, at = x + row * D, out + row * D, tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], exact)
    for start in range(0, D, BLOCK):
        value = tl.load(x + start + at, mask=start + at < D, other=0.0).to(exact)
        squares += value * value
    factor = 1.0 / tl.sqrt(tl.sum(squares) / D + EPS)
    tl.store(scale + row, factor)
    for start in range(0, D, BLOCK):
        inside = start + at < D
        normal = tl.load(x + start + at, mask=inside, other=0.0).to(exact) * factor
        normal = normal.to(out.dtype.element_ty).to(exact) * tl.load(weight + start + at, mask=inside).to(exact)
        tl.store(out + start + at, normal.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_back_kernel(grad, x, weight, scale, out, D, BLOCK: tl.constexpr):
    """A row: out = factor (g - normal mean(g normal)) with g = grad * weight and normal = factor x."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(scale + row)
    exact = scale.dtype.element_ty
    grad, x, out, at = grad + row * D, x + row * D, out + row * D, tl.arange(0, BLOCK)
    products = tl.zeros([BLOCK], exact)
    for start in range(0, D, BLOCK):
        inside = start + at < D
        normal = tl.load(x + start + at, mask=inside, other=0.0).to(exact) * factor
        g = tl.load(grad + start + at, mask=inside, other=0.0).to(exact)
        products += g * tl.load(weight + start + at, mask=inside, other=0.0).to(exact) * normal
    mean = tl.sum(products) / D
    for start in range(0, D, BLOCK):
        inside = start + at < D
        normal = tl.load(x + start + at, mask=inside, other=0.0).to(exact) * factor
        g = tl.load(grad + start + at, mask=inside, other=0.0).to(exact)
        g *= tl.load(weight + start + at, mask=inside, other=0.0).to(exact)
        tl.store(out + start + at, ((g - normal * mean) * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _wide(x):
    """The dtype to compute in."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, small) / (1.0 + small)


@triton.jit
def _gate_kernel(gates, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g, u = _wide(tl.load(gates + at, mask=inside)), _wide(tl.load(up + at, mask=inside))
    tl.store(out + at, (g * _sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


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
def _turn_kernel(x, cos, sin, out, pairs, HALF: tl.constexpr, WAY: tl.constexpr, BLOCK: tl.constexpr):
    """Some pairs (left, right) of a token: pair i of its H d / 2 is number i % HALF of head i // HALF."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, within = at < pairs, at % HALF
    left = token * 2 * pairs + at // HALF * 2 * HALF + within
    c = _wide(tl.load(cos + token * HALF + within, mask=inside))
    s = _wide(tl.load(sin + token * HALF + within, mask=inside)) * WAY
    one, other = _wide(tl.load(x + left, mask=inside)), _wide(tl.load(x + left + HALF, mask=inside))
    tl.store(out + left, (one * c - other * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + left + HALF, (other * c + one * s).to(out.dtype.element_ty), mask=inside)


def _block(width: int) -> dict[str, int]:
    """BLOCK, warps and registers of a program for a row: 8 elements a thread."""
    size = min(triton.next_power_of_2(width), LARGEST)
    return {"BLOCK": size, "num_warps": min(max(size // 256, 1), 16), "maxnreg": 128}


def normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out, scale = torch.empty_like(x), x.new_empty(len(x), 1, dtype=_exact(x))
    _norm_kernel[(len(x),)](x, weight, out, scale, x.shape[1], EPS=eps, **_block(x.shape[1]))
    return out, scale


def normalise_back(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    _norm_back_kernel[(len(x),)](grad, x, weight, scale, out, x.shape[1], **_block(x.shape[1]))
    return out


def gate(gates: Tensor, up: Tensor) -> Tensor:
    gates, up = gates.contiguous(), up.contiguous()
    out = torch.empty_like(gates)
    _gate_kernel[(triton.cdiv(out.numel(), PIECE),)](gates, up, out, out.numel(), BLOCK=PIECE)
    return out


def gate_back(grad: Tensor, gates: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad, gates, up = (x.contiguous() for x in (grad, gates, up))
    d_gates, d_up = torch.empty_like(gates), torch.empty_like(up)
    grid = (triton.cdiv(grad.numel(), PIECE),)
    _gate_back_kernel[grid](grad, gates, up, d_gates, d_up, grad.numel(), BLOCK=PIECE)
    return d_gates, d_up


def turn(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    pairs, half = x[0].numel() // 2 if len(x) else 0, x.shape[2] // 2
    size = min(triton.next_power_of_2(max(pairs, 1)), PIECE)
    grid = (len(x), triton.cdiv(pairs, size))
    _turn_kernel[grid](x, cos.contiguous(), sin.contiguous(), out, pairs, HALF=half, WAY=way, BLOCK=size)
    return out
