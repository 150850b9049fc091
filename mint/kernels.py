"""The one door to `kernels/`: picks the Triton kernel or its plain twin for the tensors at hand; both have one signature.

The folder `kernels/` lies at the top of the repository and inside the installed package; this module names it as its own
`__path__`, so `mint.kernels.reference` imports from either place (kernels/README.md says why it is built so).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

_inside, _beside = (Path(__file__).resolve().parents[up] / "kernels" for up in (0, 1))
# Never both: beside an installed mint lies whatever else is called `kernels` in site-packages.
__path__ = [str(_inside if _inside.is_dir() else _beside)]

if TYPE_CHECKING:
    from kernels import between, blocks, parts, products, reference
else:
    from mint.kernels import between, blocks, parts, products, reference

__all__ = [
    "add_rms_norm",
    "blocks",
    "branch_attention",
    "log_odds_ratio",
    "part_gradient",
    "part_walk",
    "preference_terms",
    "products",
    "rms_norm",
    "rotate",
    "row_logsumexp",
    "step_attention",
    "swiglu",
    "token_logprob",
    "tree_attention",
    "tree_layout",
]


def _backend(tensor: Tensor, name: str, plain: Any = reference) -> Any:
    """The module that computes on this tensor's device; Triton is imported only when a CUDA tensor or its interpreter asks."""
    if tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        from importlib import import_module

        return import_module(f"mint.kernels.{name}")
    return plain


def token_logprob(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    tile: int | None = None,
    skip: float = 0.0,
) -> Tensor:
    """log p(label) of each row: hidden (N, D), head (V, D), labels (N,) -> (N,) float32; the (N, V) logits never exist whole.

    logits = hidden headᵀ + bias + low upᵀ, where low (N, r) and up (V, r) carry a LoRA on the head. Differentiable, once, in
    every float argument; all of them have one dtype. `tile` is the number of vocabulary columns looked at together. Labels
    lie in 0..V-1.

    With `skip` the gradients of hidden and low may leave out classes that together have at most this share of a row's
    probability beside its label's: they are off by at most skip (1 - p) max |head[j]| (or up[j]) times the gradient of
    log p, which itself stays exact. A processor leaves them out tile by tile; a GPU leaves out nothing.
    """
    _check_kinds(labels, hidden=hidden, head=head, bias=bias, low=low, up=up)
    module = _backend(hidden, "logprob")
    out: Tensor = module.token_logprob(hidden, head, labels, bias=bias, low=low, up=up, tile=tile, skip=skip)
    return out


def _check_kinds(labels: Tensor, **given: Tensor | None) -> None:
    """Refuse what the products or the indexing would get wrong, or say in words that help nobody."""
    if (given["low"] is None) != (given["up"] is None):
        raise ValueError("token_logprob: low and up are the two halves of an adapter; give both or none")
    kinds = {name: str(one.dtype).removeprefix("torch.") for name, one in given.items() if one is not None}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise ValueError(f"token_logprob takes one dtype; found {found}; cast them, like head.to(hidden.dtype)")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"token_logprob: labels are {labels.dtype}; wanted int64")


def log_odds_ratio(chosen_logp: Tensor, rejected_logp: Tensor) -> Tensor:
    """log(odds(chosen) / odds(rejected)), ORPO equation 4, of mean log-probabilities (B,), (B,) -> (B,); differentiable."""
    if chosen_logp.ndim > 1 or chosen_logp.shape != rejected_logp.shape:
        found = f"chosen {tuple(chosen_logp.shape)} and rejected {tuple(rejected_logp.shape)}"
        raise ValueError(f"log_odds_ratio takes log-probabilities (B,) and (B,), one of each for a pair; found {found}")
    out: Tensor = _backend(chosen_logp, "odds").log_odds_ratio(chosen_logp, rejected_logp)
    return out


def preference_terms(token_logp: Tensor, edges: Tensor, starts: Tensor) -> reference.PreferenceTerms:
    """log sigmoid(log odds ratio) of each pair from token log-probabilities (E,), with the gradient of that term.

    Answer a has the edges `edges[starts[a]:starts[a + 1]]`; answers 2 b and 2 b + 1 are chosen and rejected of pair b.
    A pair with an empty answer has no odds: its term is 0 and has no gradient.
    """
    out: reference.PreferenceTerms = _backend(token_logp, "odds").preference_terms(token_logp, edges, starts)
    return out


def row_logsumexp(hidden: Tensor, head: Tensor, *, tile: int | None = None) -> Tensor:
    """logsumexp over the vocabulary of each row: hidden (N, D), head (V, D) -> (N,) float32; for scoring, no gradient."""
    return reference.row_logsumexp(hidden, head, tile=tile)


def part_walk(
    hidden: Tensor, head: Tensor, labels: Tensor, wanted: bool, low: Tensor | None = None, up: Tensor | None = None
) -> parts.PartWalk:
    """What some rows of a head (v, D) know of log p(label): see `kernels.parts`."""
    return parts.part_walk(hidden, head, labels, wanted, low, up, _backend(hidden, "logprob").WALK)


def part_gradient(
    hidden: Tensor,
    head: Tensor,
    low: Tensor,
    up: Tensor,
    labels: Tensor,
    logp: Tensor,
    label_logit: Tensor,
    grad: Tensor,
) -> Tensor:
    """The gradient of some rows of the adapter of a head: see `kernels.parts`."""
    kind = _backend(hidden, "logprob").WALK
    return parts.part_gradient(hidden, head, low, up, labels, logp, label_logit, grad, kind)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) of each row, rounded to its dtype, times the weight: (N, D), (D,) -> (N, D); differentiable."""
    return between.rms_norm(x, weight, eps, _backend(x, "fused", between))


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added, and `rms_norm` of that: (N, D), (N, D), (D,) -> (N, D) each; differentiable."""
    return between.add_rms_norm(x, added, weight, eps, _backend(x, "fused", between))


def swiglu(gates: Tensor, up: Tensor) -> Tensor:
    """silu(gates) * up: (N, F), (N, F) -> (N, F); differentiable."""
    return between.swiglu(gates, up, _backend(gates, "fused", between))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (N, H, d) turned by its position's angles, cos and sin (N, 1, d / 2): (N, H, d); differentiable in x."""
    return between.rotate(x, cos, sin, _backend(x, "fused", between))


def tree_layout(end: Tensor) -> Any:
    """What attention precomputes of a forest, once for all layers: end (T,), see `TokenTree`."""
    return _backend(end, "attention", blocks).tree_layout(end)


def tree_attention(q: Tensor, k: Tensor, v: Tensor, layout: Any) -> Tensor:
    """Attention under the rule j <= i < end[j]: q (T, H, d), k and v (T, K, d) -> (T, H, d); differentiable."""
    out: Tensor = _backend(q, "attention", blocks).tree_attention(q, k, v, layout)
    return out


def branch_attention(q: Tensor, k: Tensor, v: Tensor, layout: Any) -> Tensor:
    """Attention of new tokens to what stands before them and to themselves: q (n, H, d), k and v (m, K, d) -> (n, H, d).

    `layout` is made by `blocks.tree_blocks`, `blocks.moved` and `blocks.masked`.
    """
    out: Tensor = (blocks.branch_attention if q.is_cuda else blocks.tree_attention)(q, k, v, layout)
    return out


def step_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, first: Tensor, now: Tensor
) -> Tensor:
    """Attention of one new token of each row to the columns first..now of its cache; no gradient.

    q (B, H, d) and k (B, K, d) are turned here, by cos and sin (B, 1, d / 2); k and v (B, K, d) are written into column
    `now` of keys and values (B, K, S, d), in place. first (B,) and now (1,) lie on the device, and may change between
    two replays of a CUDA graph -> (B, H, d).
    """
    out: Tensor = _backend(q, "step").step_attention(q, k, v, cos, sin, keys, values, first, now)
    return out
