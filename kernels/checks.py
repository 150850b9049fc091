"""Whether the kernels are right on this machine: against float64, in every dtype; on a GPU also that nothing waits for the
device and that a CUDA graph takes them. The first half of bench.py, and what both halves draw their tensors with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from . import reference

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)


def normal(*shape: int, dtype: torch.dtype = DTYPE, scale: float = 1.0, device: str = DEVICE) -> Tensor:
    return (torch.randn(shape, dtype=torch.float32, device=device) * scale).to(dtype)


def gap(found: Tensor, truth: Tensor) -> float:
    """Relative error; not a number counts as infinite."""
    error = ((found.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def gradients(function: Callable[..., Tensor], leaves: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    given = [x.detach().to(dtype).requires_grad_() for x in leaves]
    out = function(*given)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), given)]


def check(name: str, ours: Callable[..., Tensor], truth: Callable[..., Tensor], leaves: tuple[Tensor, ...],
          limit: float) -> dict[str, Any]:  # fmt: skip
    found, true = gradients(ours, leaves, leaves[0].dtype), gradients(truth, leaves, torch.float64)
    error = max(gap(one, other) for one, other in zip(found, true, strict=True))
    return {"check": name, "error": error, "limit": limit, "right": error <= limit}


def forest(kind: str, tokens: int) -> Tensor:
    """end (T,): plain causal rows, pairs of prompt/chosen/rejected 700/200/200 packed, or tries of 64 labels after a prompt."""
    if kind == "causal":
        return torch.full((tokens,), tokens, device=DEVICE)
    trunk, branches = (700, [200, 200]) if kind == "pairs" else (1024, [16] * 64)
    ends, start = [], 0
    while start + trunk + sum(branches) <= tokens:
        stop = start + trunk + sum(branches)
        ends += [stop] * trunk
        for length in branches:
            ends += [len(ends) + length] * length
        start = stop
    return torch.tensor(ends + [tokens] * (tokens - start), device=DEVICE)


def attended(end: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return kernels.tree_attention(q, k, v, kernels.tree_layout(end))


def attended_plainly(end: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.tree_attention(q, k, v, end)


def between_checks() -> Iterator[dict[str, Any]]:
    """Norm, SwiGLU and rotation, at a width that is no power of two."""
    cos, sin = (f(normal(129, 1, 40, dtype=torch.float32)) for f in (torch.cos, torch.sin))
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x, y, heads = normal(129, 3000, dtype=dtype), normal(129, 3000, dtype=dtype), normal(129, 3, 80, dtype=dtype)

        def turned(x: Tensor) -> Tensor:
            return kernels.rotate(x, cos.to(x.dtype), sin.to(x.dtype))

        def true_turn(x: Tensor) -> Tensor:
            left, right = x.chunk(2, dim=-1)
            return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

        yield check(f"swiglu {dtype}", kernels.swiglu, lambda a, b: a * torch.sigmoid(a) * b, (x, y), limit)
        yield check(f"rotate {dtype}", turned, true_turn, (heads,), limit)
        yield check(f"rms_norm {dtype}", lambda x, w: kernels.rms_norm(x, w, 1e-5), true_norm, (x, y[0]), limit)
        yield check(f"add_rms_norm {dtype}", lambda x, y, w: torch.cat(kernels.add_rms_norm(x, y, w, 1e-5)),
                    lambda x, y, w: torch.cat([x + y, true_norm(x + y, w)]), (x, y, y[0]), limit)  # fmt: skip


def true_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def step_checks() -> Iterator[dict[str, Any]]:
    """A step of generation with what it writes into the cache, against the twin in float64."""
    first, now = torch.tensor([0, 133, 270], device=DEVICE), torch.tensor([290], device=DEVICE)
    for dtype, limit in ((torch.float32, 1e-3 if GPU else 1e-4), (torch.bfloat16, 2e-2)):
        q, k, v = normal(3, 10, 80, dtype=dtype).split([6, 2, 2], dim=1)
        cos, sin = normal(2, 3, 1, 40, dtype=dtype)
        cache = normal(2, 3, 2, 300, 80, dtype=dtype)
        exact = [x.double() for x in (q, k, v, cos, sin, *cache)]
        found = kernels.step_attention(q, k, v, cos, sin, *cache, first, now)
        true = reference.step_attention(*exact, first, now)
        error = max(gap(found, true), *(gap(one, two) for one, two in zip(cache, exact[5:], strict=True)))
        yield {"check": f"step_attention {dtype}", "error": error, "limit": limit, "right": error <= limit}


def part_checks() -> Iterator[dict[str, Any]]:
    """log p and its direction from two parts of a head, put together as ranks do."""
    labels, parts = torch.randint(5003, (129,), device=DEVICE), (slice(0, 2000), slice(2000, 5003))
    for dtype, limit in ((torch.float32, 1e-3 if GPU else 1e-4), (torch.bfloat16, 2e-2)):
        hidden, head = normal(129, 256, dtype=dtype), normal(5003, 256, dtype=dtype, scale=0.2)
        walks = [kernels.part_walk(hidden, head[part], labels - part.start, True) for part in parts]
        level, total, label_logit, sums = (torch.stack([walk[at] for walk in walks]) for at in range(4))
        shares = (level - level.amax(0)).exp()
        shares /= (shares * total).sum(0)
        logp = label_logit.sum(0) - torch.logsumexp(torch.cat([level + total.log(), label_logit.sum(0)[None]]), 0)
        way = -torch.expm1(logp)[:, None] * (head[labels] - (shares[..., None] * sums).sum(0))
        exact = hidden.double().requires_grad_()
        true = torch.log_softmax(exact @ head.double().T, dim=1).gather(1, labels[:, None])[:, 0]
        error = max(gap(logp, true.detach()), gap(way, torch.autograd.grad(true.sum(), exact)[0]))
        yield {"check": f"parts of a head {dtype}", "error": error, "limit": limit, "right": error <= limit}


def checks() -> Iterator[dict[str, Any]]:
    labels = torch.randint(5003, (129,), device=DEVICE)
    for dtype, limit in ((torch.float32, 1e-3 if GPU else 1e-4), (torch.bfloat16, 2e-2)):
        leaves = (normal(129, 256, dtype=dtype), normal(5003, 256, dtype=dtype, scale=0.2), normal(5003, dtype=dtype),
                  normal(129, 16, dtype=dtype), normal(5003, 16, dtype=dtype, scale=0.2))  # fmt: skip

        def ours(h: Tensor, w: Tensor, b: Tensor, low: Tensor, up: Tensor) -> Tensor:
            return kernels.token_logprob(h, w, labels, bias=b, low=low, up=up, tile=1000)

        def true(h: Tensor, w: Tensor, b: Tensor, low: Tensor, up: Tensor) -> Tensor:
            return torch.log_softmax(h @ w.T + b + low @ up.T, dim=1).gather(1, labels[:, None])[:, 0]

        yield check(f"token_logprob {dtype}", ours, true, leaves, limit)
        for d in (64, 80, 128):
            end = forest("pairs", 1391)
            qkv = tuple(normal(len(end), heads, d, dtype=dtype) for heads in (4, 2, 2))
            yield check(
                f"tree_attention {d} {dtype}", partial(attended, end), partial(attended_plainly, end), qkv, limit
            )
    yield from between_checks()
    yield from step_checks()
    yield from part_checks()
    odds = -torch.logspace(-6, 3, 257, device=DEVICE)
    yield check("log_odds_ratio", kernels.log_odds_ratio, reference.log_odds_ratio, (odds, odds.flip(0)), 1e-5)
    if GPU:
        yield from device_checks()


def device_checks() -> Iterator[dict[str, Any]]:
    """Nothing waits for the device, and a graph replays to the same numbers."""
    hidden, head, labels = normal(300, 512), normal(32003, 512, scale=0.1), torch.randint(32003, (300,), device=DEVICE)
    hidden.requires_grad_()

    def run() -> Tensor:
        return torch.autograd.grad(kernels.token_logprob(hidden, head, labels).mean(), hidden)[0]

    expected = run()
    torch.cuda.set_sync_debug_mode("error")
    run()
    torch.cuda.set_sync_debug_mode("default")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    yield {
        "check": "CUDA graph",
        "error": gap(captured, expected),
        "limit": 0.0,
        "right": torch.equal(captured, expected),
    }
