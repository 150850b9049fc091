"""What stands between the products of a block, in plain PyTorch, with gradients that keep little: norm, rotation, SwiGLU.

Shapes: N tokens, D width, H heads, d head width, F feed-forward width.

The Functions are those of a GPU too; they compute with `pieces`, which is this module or fused.py, where each piece is one
launch.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PLAIN = sys.modules[__name__]


def normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) in float32, cast to the dtype of x, and only then times the weight; and the factor of each
    row: (N, D), (D,) -> (N, D), (N, 1)."""
    exact = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(exact.square().mean(dim=-1, keepdim=True).add_(eps))
    return torch.mul(exact, scale, out=torch.empty_like(x)).mul_(weight), scale


def add_normalise(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + added, and `normalise` of that: (N, D), (N, D), (D,) -> (N, D), (N, D), (N, 1)."""
    total = x + added
    return total, *normalise(total, weight, eps)


def normalise_back(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, beside: Tensor | None = None) -> Tensor:
    """The gradient of x, plus one that it has `beside` that."""
    normal, exact = x * scale, (grad * weight).to(scale.dtype)
    inner = (exact * normal).mean(dim=-1, keepdim=True)
    found = exact.sub_(normal.mul_(inner)).mul_(scale).to(x.dtype)
    return found if beside is None else found.add_(beside)


def gate(gates: Tensor, up: Tensor) -> Tensor:
    """silu(gates) * up: (N, F), (N, F) -> (N, F)."""
    return F.silu(gates).mul_(up)


def gate_back(grad: Tensor, gates: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of both; silu is computed again instead of being kept."""
    d_up, d_gates = F.silu(gates).mul_(grad), grad * up
    return torch.ops.aten.silu_backward.grad_input(d_gates, gates, grad_input=d_gates), d_up


def turn(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    """x cos + rotate_half(x) sin on the halves of each head, as stored (not interleaved), or back if `way` is -1: x
    (N, H, d); cos and sin (N, 1, d / 2), since each half of a head has the same angles."""
    left, right = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    new_left, new_right = out.chunk(2, dim=-1)
    torch.mul(left, cos, out=new_left).addcmul_(right, sin, value=-way)
    torch.mul(right, cos, out=new_right).addcmul_(left, sin, value=way)
    return out


class Normalise(torch.autograd.Function):
    """RMSNorm that keeps its input and one number per token for backward, instead of three copies of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, pieces: Any = PLAIN) -> Tensor:
        made: tuple[Tensor, Tensor] = pieces.normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, made[1])
        ctx.pieces = pieces
        return made[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_weight = (grads[0] * (x * scale)).sum(dim=0).to(weight.dtype) if needs[1] else None
        return ctx.pieces.normalise_back(grads[0], x, weight, scale) if needs[0] else None, d_weight, None, None


class AddNormalise(torch.autograd.Function):
    """A sum and its RMSNorm, which keep the sum and one number per token; the gradient of both terms is one tensor."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor, weight: Tensor, eps: float, pieces: Any = PLAIN
    ) -> tuple[Tensor, Tensor]:
        total, normal, scale = pieces.add_normalise(x, added, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        ctx.pieces = pieces
        return total, normal

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (total, weight, scale), (beside, grad) = ctx.saved_tensors, grads
        d_weight = (grad * (total * scale)).sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        both = ctx.pieces.normalise_back(grad, total, weight, scale, beside)
        return both, both, d_weight, None, None


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, up: Tensor, pieces: Any = PLAIN) -> Tensor:
        ctx.save_for_backward(gates, up)
        ctx.pieces = pieces
        out: Tensor = pieces.gate(gates, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.pieces.gate_back(grads[0], *ctx.saved_tensors), None


class Rotation(torch.autograd.Function):
    """Its gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, pieces: Any = PLAIN) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.pieces = pieces
        out: Tensor = pieces.turn(x, cos, sin, 1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.pieces.turn(grads[0], *ctx.saved_tensors, -1), None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, pieces: Any = PLAIN) -> Tensor:
    """See `mint.kernels.rms_norm`. Nothing is recorded where no gradient is wanted: for a short row that would cost more than
    the row itself; so it is with the other two."""
    record = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    out: Tensor = Normalise.apply(x, weight, eps, pieces) if record else pieces.normalise(x, weight, eps)[0]
    return out


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float, pieces: Any = PLAIN) -> tuple[Tensor, Tensor]:
    """See `mint.kernels.add_rms_norm`."""
    if torch.is_grad_enabled() and (x.requires_grad or added.requires_grad or weight.requires_grad):
        out: tuple[Tensor, Tensor] = AddNormalise.apply(x, added, weight, eps, pieces)
        return out
    total, normal, _ = pieces.add_normalise(x, added, weight, eps)
    return total, normal


def swiglu(gates: Tensor, up: Tensor, pieces: Any = PLAIN) -> Tensor:
    """See `mint.kernels.swiglu`."""
    out: Tensor = SwiGLU.apply(gates, up, pieces) if torch.is_grad_enabled() else pieces.gate(gates, up)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pieces: Any = PLAIN) -> Tensor:
    """See `mint.kernels.rotate`."""
    out: Tensor = Rotation.apply(x, cos, sin, pieces) if torch.is_grad_enabled() else pieces.turn(x, cos, sin, 1)
    return out
