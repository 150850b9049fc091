"""What the kernels must give, in float64 from logits that are written out whole; and how far something is from it."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

Arguments = dict[str, Tensor]


def arguments(
    n: int, d: int, v: int, *, r: int = 0, bias: bool = False, dtype: torch.dtype = torch.float32, scale: float = 1.0,
    seed: int = 0,
) -> Arguments:  # fmt: skip
    """Random arguments of token_logprob whose logits have a standard deviation of about 4 x scale."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    made = {"hidden": normal(n, d) * 2, "head": normal(v, d) * 2 * scale / d**0.5}
    if bias:
        made["bias"] = normal(v)
    if r:
        made |= {"low": normal(n, r), "up": normal(v, r) / r**0.5}
    made = {name: value.to(dtype) for name, value in made.items()}
    return made | {"labels": torch.randint(v, (n,), generator=draw)}


def logits_of(a: Arguments) -> Tensor:
    logits = F.linear(a["hidden"], a["head"], a.get("bias"))
    return logits + a["low"] @ a["up"].T if "low" in a else logits


def obvious_logprob(a: Arguments) -> Tensor:
    """The code that anyone would write."""
    return torch.log_softmax(logits_of(a).float(), dim=-1).gather(1, a["labels"][:, None])[:, 0]


def true_logprob(a: Arguments) -> Tensor:
    """Exact near p = 1 too: minus log(1 + sum of exp(other - label))."""
    logits = logits_of(a)
    own = logits.gather(1, a["labels"][:, None])
    others = logits.scatter(1, a["labels"][:, None], float("-inf"))
    return F.logsigmoid(own[:, 0] - torch.logsumexp(others, dim=1))


def with_gradients(function, a: Arguments, weights: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """`function(arguments)` and the gradient of its weighted sum with respect to every float argument."""
    leaves = {name: value.detach().to(dtype or value.dtype).requires_grad_() if value.is_floating_point() else value
              for name, value in a.items()}  # fmt: skip
    value = function(leaves)
    (value * weights.to(value.dtype)).sum().backward()
    return {"logp": value.detach()} | {name: x.grad for name, x in leaves.items() if x.is_floating_point()}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """(mean, largest) absolute error of each tensor; anything that is not a number counts as infinite."""
    gaps = {name: (found[name].double() - truth[name]).abs().nan_to_num(nan=float("inf")) for name in truth}
    return {name: (gap.mean().item(), gap.max().item()) for name, gap in gaps.items()}


def worst(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest error of any tensor, relative to the largest entry of that tensor (0.1 at least)."""
    return max(error[1] / max(truth[name].abs().max().item(), 0.1) for name, error in errors(found, truth).items())


def forest(tokens: int, closing: float, seed: int = 0) -> Tensor:
    """end (T,) of a random forest in depth-first order; each branch closes with probability `closing` after a token."""
    draw, end, open_ = random.Random(seed), [tokens] * tokens, []
    for token in range(tokens):
        while open_ and draw.random() < closing:
            end[open_.pop()] = token
        open_.append(token)
    return torch.tensor(end)


def pair(prompt: int, chosen: int, rejected: int) -> list[int]:
    """end of one prompt with two answers."""
    total = prompt + chosen + rejected
    return [total] * prompt + [prompt + chosen] * chosen + [total] * rejected


def true_attention(q: Tensor, k: Tensor, v: Tensor, end: Tensor) -> Tensor:
    """Each token's ancestors are looked up one by one; no mask matrix, no grouping: (T, H, d)."""
    rows = []
    for i in range(len(q)):
        seen = [j for j in range(i + 1) if i < end[j]]
        for head in range(q.shape[1]):
            own = head * k.shape[1] // q.shape[1]
            weights = torch.softmax(k[seen, own] @ q[i, head] / q.shape[2] ** 0.5, dim=0)
            rows.append(weights @ v[seen, own])
    return torch.stack(rows).view(q.shape)
