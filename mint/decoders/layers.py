"""The pieces of a Llama decoder: norm, rotary positions, attention, feed-forward, block.

Shapes: N tokens of all rows in one line, D width, H heads, K key-value heads, d head width, F feed-forward width.
Every layer works on (N, D): which token belongs to which text is known to `attend` alone, so packed rows, trees and
cached steps all go through the same code. Parameter names are those of the official checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import parallel
from ..kernels import add_rms_norm, products, rms_norm, rotate, swiglu
from ..transfer import sent

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q (N, H, d), k (N, K, d), v (N, K, d)) -> (N, H, d): who sees whom."""

Angles = tuple[Tensor, Tensor]
"""cos and sin of each token, (N, 1, d / 2)."""


@dataclass(frozen=True, slots=True)
class Turning:
    """An `Attend` that takes q and k as their products leave them, and turns them itself."""

    attend: Callable[[int, Tensor, Tensor, Tensor, Angles], Tensor]


def quick_product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ that no gradient flows through, by the packed weight while there is one (see packing.py). On a processor float32
    goes through oneDNN, as bfloat16 does anyway. An adapted layer takes it in training too, adapter on or off, so that a
    fresh adapter and DPO's reference agree bit for bit."""
    return products.product(x, weight, getattr(weight, "packed", None))


class Linear(nn.Linear):
    """x Wᵀ without a bias."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = parallel.local(self.weight)
        return quick_product(x, weight) if torch.is_inference_mode_enabled() else F.linear(x, weight)


class Head(Linear):
    """The product with the vocabulary, whose rows may be spread over the ranks."""

    def forward(self, x: Tensor) -> Tensor:
        return parallel.logits(x, self.weight) if parallel.is_part(self.weight) else super().forward(x)


class Embedding(nn.Embedding):
    """A table whose numbers come from a checkpoint. On the meta device torch imports its compiler to draw the first ones,
    which takes seconds, so none are drawn."""

    def reset_parameters(self) -> None:
        """Left as it is."""

    def forward(self, ids: Tensor) -> Tensor:
        """(N,) -> (N, D), from all ranks where the table is spread over them."""
        return parallel.looked_up(ids, self.weight) if parallel.is_part(self.weight) else super().forward(ids)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, cast to the dtype of x, and only then times the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """x + added, and its norm."""
        return add_rms_norm(x, added, self.weight, self.eps)


class Rope:
    """Rotary positions with Llama 3.1's stretched low frequencies."""

    def __init__(self, head_width: int, theta: float, scaling: dict[str, float] | None) -> None:
        self.inverse = inverse_frequencies(head_width, theta, scaling)  # (d / 2,) float32

    def __call__(self, position: Tensor, dtype: torch.dtype) -> Angles:
        """Angles of each token: (N,) -> cos and sin, each (N, 1, d / 2); computed in float32, then cast."""
        self.inverse = sent(self.inverse, position.device)
        angles = position[:, None, None] * self.inverse
        return angles.cos().to(dtype), angles.sin().to(dtype)


def inverse_frequencies(head_width: int, theta: float, scaling: dict[str, float] | None) -> Tensor:
    """theta^(-2i/d); with `scaling`, wavelengths past original / low_freq_factor are divided by `factor`, those short of
    original / high_freq_factor are kept, and between the two the change is linear in original / wavelength."""
    inverse = 1.0 / theta ** (torch.arange(0, head_width, 2, dtype=torch.float32, device="cpu") / head_width)
    if scaling is None:
        return inverse
    original, low, high = (
        scaling[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    turns = original * inverse / (2 * math.pi)  # original / wavelength
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inverse / scaling["factor"] + smooth * inverse


class Together(nn.Module):
    """Has some linear layers of the same input. While their weights are packed as one, so are their products."""

    names: ClassVar[tuple[str, ...]]
    packed: Tensor | None = None  # the weights of all, one below the other, in blocks or as they lie (see packing.py)

    def layers(self) -> list[nn.Linear]:
        return [getattr(self, name) for name in self.names]

    def products(self, x: Tensor) -> Sequence[Tensor]:
        """What each of the layers makes of x: (N, D) -> (N, out)."""
        layers = self.layers()
        if self.packed is None or not torch.is_inference_mode_enabled():
            return [layer(x) for layer in layers]
        whole = products.product(x, self.packed)
        return whole.split_with_sizes([layer.out_features for layer in layers], dim=-1)


class Attention(Together):
    """Grouped-query attention with rotary positions."""

    names = ("q_proj", "k_proj", "v_proj")

    def __init__(self, width: int, heads: int, kv_heads: int, head_width: int, layer: int) -> None:
        super().__init__()
        self.head_width, self.layer = head_width, layer
        self.q_proj = Linear(width, heads * head_width)
        self.k_proj = Linear(width, kv_heads * head_width)
        self.v_proj = Linear(width, kv_heads * head_width)
        self.o_proj = Linear(heads * head_width, width)

    def forward(self, x: Tensor, angles: Angles, attend: Attend | Turning) -> Tensor:
        q, k, v = (heads.unflatten(-1, (-1, self.head_width)) for heads in self.products(x))
        if isinstance(attend, Turning):
            seen = attend.attend(self.layer, q, k, v, angles)
        else:
            seen = attend(self.layer, rotate(q, *angles), rotate(k, *angles), v)
        out: Tensor = self.o_proj(seen.flatten(1))
        return out


class FeedForward(Together):
    """down(silu(gate(x)) * up(x))."""

    names = ("gate_proj", "up_proj")

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner)
        self.up_proj = Linear(width, inner)
        self.down_proj = Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(swiglu(*self.products(x)))
        return out

    def added_to(self, total: Tensor, x: Tensor) -> Tensor:
        """total + forward(x). While weights lie together (see packing.py) the last product adds to `total`, which nobody
        else has."""
        lie_together = self.packed is not None and not self.packed.is_mkldnn and torch.is_inference_mode_enabled()
        if lie_together and isinstance(self.down_proj, Linear):
            return total.addmm_(swiglu(*self.products(x)), self.down_proj.weight.T)
        out: Tensor = total + self(x)
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(
        self, width: int, inner: int, heads: int, kv_heads: int, head_width: int, eps: float, layer: int
    ) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, kv_heads, head_width, layer)
        self.mlp = FeedForward(width, inner)
        self.input_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)

    def forward(self, x: Tensor, angles: Angles, attend: Attend | Turning) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), angles, attend)
        x, normal = self.post_attention_layernorm.of_sum(x, attended)
        return self.mlp.added_to(x, normal)
