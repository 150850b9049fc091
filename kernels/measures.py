"""The parts of bench.py: which kernels are measured, at which sizes, and against whom.

Shapes: N rows, D width, V vocabulary. A size is "gpu" (those of Llama 3), "cpu" (where only ratios mean anything) or
"tiny" (whether every line runs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from . import reference
from .checks import DEVICE, GPU, checks, forest, normal
from .timing import Line, Part, Rates, Side, compared, rates

PAIRS = 4
Shape = tuple[int, int, int]


def drawn(n: int, d: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D), head (V, D), labels (N,)."""
    labels = torch.randint(v, (n,), device=DEVICE)
    return normal(n, d).requires_grad_(), normal(v, d, scale=d**-0.5), labels


def named(shape: Shape) -> str:
    return "N {} D {} V {}".format(*shape)


def floor_of(shape: Shape, rate: Rates, products: int = 2) -> float:
    """Seconds of so many products of N x D x V, or of reading the head once, whichever is longer."""
    n, d, v = shape
    width = 2 if GPU else 4
    return max(products * 2 * n * d * v / rate["products"], width * v * d / rate["bytes"])


def orpo(logp: Tensor) -> Tensor:
    chosen, rejected = logp.view(2, PAIRS, -1).mean(dim=-1)
    return -chosen.mean() - 0.1 * F.logsigmoid(kernels.log_odds_ratio(chosen, rejected)).mean()


def with_gradient(logp: Callable[[], Tensor], *leaves: Tensor) -> Side:
    """ORPO of 4 pairs and its gradients."""
    return lambda: torch.autograd.grad(orpo(logp()), leaves)


def written_out(
    hidden: Tensor, head: Tensor, labels: Tensor, low: Tensor | None = None, up: Tensor | None = None
) -> Tensor:
    """The obvious way: all logits."""
    logits = F.linear(hidden, head) if low is None or up is None else F.linear(hidden, head) + low @ up.T
    return logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0]


def own_sides(hidden: Tensor, head: Tensor, labels: Tensor) -> dict[str, Side]:
    """The head frozen: ours, the two products alone, and all logits written out."""
    room = torch.empty(len(hidden), len(head), dtype=hidden.dtype, device=DEVICE)
    return {
        "ours": with_gradient(lambda: kernels.token_logprob(hidden, head, labels), hidden),
        "two bare products": lambda: torch.mm(torch.mm(hidden.detach(), head.T, out=room), head),
        "materialised": with_gradient(lambda: written_out(hidden, head, labels), hidden),
    }


def peers(hidden: Tensor, head: Tensor, labels: Tensor) -> dict[str, Side]:
    """TRL's and Liger's ways, where they are installed."""
    sides: dict[str, Side] = {}
    if find_spec("trl"):
        given = hidden, head, None, labels, 1.0, 8192, None, 1.0, ()  # log p alone: no entropy, no other statistics
        sides["TRL chunked"] = with_gradient(
            lambda: import_module("trl.kernels").ChunkedLogProbFunction.apply(*given)[0], hidden
        )
    if find_spec("liger_kernel"):
        fused = import_module("liger_kernel.chunked_loss").LigerFusedLinearORPOLoss(compiled=GPU)
        shape = (2 * PAIRS, len(labels) // (2 * PAIRS))
        sides["Liger ORPO"] = lambda: torch.autograd.grad(
            fused(head, hidden.view(*shape, -1), labels.view(shape))[0], hidden
        )
    if find_spec("liger_kernel") and GPU:
        cross_entropy = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
        sides["Liger cross entropy"] = lambda: torch.autograd.grad(_first(cross_entropy(hidden, head, labels)), hidden)
    return sides


def _first(out: Any) -> Tensor:
    """A loss, which some versions give with other things behind it."""
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def logprobs(size: str, rate: Rates) -> Iterator[Line]:
    """The frozen head at full size, and the forward pass alone."""
    shapes: dict[str, list[Shape]] = {
        "gpu": [(8192, 3072, 128256), (8192, 4096, 128256)], "cpu": [(256, 512, 32003)], "tiny": [(16, 8, 67)],
    }  # fmt: skip
    for shape in shapes[size]:
        given = drawn(*shape)
        yield from compared("token_logprob", named(shape), own_sides(*given) | peers(*given), floor_of(shape, rate))

        def forward(given: tuple[Tensor, ...] = given) -> None:
            with torch.no_grad():
                kernels.token_logprob(*given)

        yield from compared("forward alone", named(shape), {"ours": forward}, floor_of(shape, rate, 1))


def few_rows(size: str, rate: Rates) -> Iterator[Line]:
    """From 128 rows up, where nothing may be slower than all logits written out."""
    counts, rest = {"gpu": ((128, 256, 512, 1024, 2048, 4096), (4096, 128256)), "cpu": ((16, 64), (512, 32003)),
                    "tiny": ((8,), (8, 67))}[size]  # fmt: skip
    for n in counts:
        yield from compared("few rows", named((n, *rest)), own_sides(*drawn(n, *rest)), floor_of((n, *rest), rate))


def trained(size: str, rate: Rates) -> Iterator[Line]:
    """A head that is trained: three products backward and forward more than none; its own walk computes a fourth."""
    shape = {"gpu": (8192, 3072, 128256), "cpu": (128, 256, 16003), "tiny": (16, 8, 67)}[size]
    hidden, head, labels = drawn(*shape)
    head.requires_grad_()
    sides = {
        "ours": with_gradient(lambda: kernels.token_logprob(hidden, head, labels), hidden, head),
        "materialised": with_gradient(lambda: written_out(hidden, head, labels), hidden, head),
    }
    yield from compared("trained head", named(shape), sides, floor_of(shape, rate, 3))


def low_rank(size: str, rate: Rates) -> Iterator[Line]:
    """A head with an adapter."""
    shape = {"gpu": (8192, 3072, 128256), "cpu": (128, 256, 16003), "tiny": (16, 8, 67)}[size]
    hidden, head, labels = drawn(*shape)
    for rank in {"gpu": (16, 256), "cpu": (16,), "tiny": (3,)}[size]:
        adapter = normal(shape[0], rank).requires_grad_(), normal(shape[2], rank, scale=0.1).requires_grad_()
        sides = low_rank_sides(hidden, head, labels, *adapter)
        yield from compared("LoRA on the head", f"{named(shape)} r {rank}", sides, floor_of(shape, rate))


def low_rank_sides(hidden: Tensor, head: Tensor, labels: Tensor, low: Tensor, up: Tensor) -> dict[str, Side]:
    leaves = hidden, low, up
    return {
        "ours": with_gradient(lambda: kernels.token_logprob(hidden, head, labels, low=low, up=up), *leaves),
        "materialised": with_gradient(lambda: written_out(hidden, head, labels, low, up), *leaves),
    }


def tiles(size: str, rate: Rates) -> Iterator[Line]:
    """What the tile's width does, at the rows that walk together by default."""
    shape = {"gpu": (8192, 4096, 128256), "cpu": (256, 512, 32003), "tiny": (16, 8, 67)}[size]
    hidden, head, labels = drawn(*shape)
    widths = {"gpu": (None, 2048, 4096, 8192, 16384), "cpu": (None, 1024, 4096), "tiny": (None, 7)}[size]

    def with_tile(width: int | None) -> Side:
        return with_gradient(lambda: kernels.token_logprob(hidden, head, labels, tile=width), hidden)

    sides = {"as chosen" if width is None else f"tile {width}": with_tile(width) for width in widths}
    yield from compared("tile width", named(shape), sides, floor_of(shape, rate))


def ratios(size: str, rate: Rates) -> Iterator[Line]:
    """From token log-probabilities to ORPO's terms and their gradient, and the odds ratio of given means alone."""
    pairs, length = {"gpu": (64, 200), "cpu": (64, 200), "tiny": (2, 3)}[size]
    logp = (-torch.rand(2 * pairs * length, device=DEVICE) - 1e-3).requires_grad_()
    edges, starts = torch.arange(len(logp), device=DEVICE), torch.arange(0, len(logp) + 1, length, device=DEVICE)
    chosen, rejected = ((-torch.rand(pairs, device=DEVICE) - 1e-3).requires_grad_() for _ in range(2))

    def terms(side: Any) -> Side:
        return lambda: torch.autograd.grad(side.preference_terms(logp, edges, starts).term.sum(), logp)

    def odds(side: Any) -> Side:
        return lambda: torch.autograd.grad(side.log_odds_ratio(chosen, rejected).sum(), (chosen, rejected))

    case, floor = f"{pairs} pairs of {length} + {length}", 20 * len(logp) / rate["bytes"]
    yield from compared("preference_terms", case, {"ours": terms(kernels), "plain": terms(reference)}, floor)
    yield from compared("log_odds_ratio", f"{pairs} pairs", {"ours": odds(kernels), "plain": odds(reference)},
                        24 * pairs / rate["bytes"])  # fmt: skip


def betweens(size: str, rate: Rates) -> Iterator[Line]:
    """Norm, SwiGLU and rotation with their gradients; the floor reads and writes each value once each way."""
    n, width, inner, heads, d = {
        "gpu": (8192, 3072, 8192, 24, 128), "cpu": (512, 384, 1024, 6, 64), "tiny": (3, 8, 12, 2, 4),
    }[size]  # fmt: skip
    x, weight, gates, up = normal(n, width), normal(width), normal(n, inner), normal(n, inner)
    q, angles = normal(n, heads, d), normal(n, 1, d // 2)
    cos, sin = angles.cos(), angles.sin()

    def written_out(q: Tensor) -> Tensor:
        left, right = q.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    cases: list[tuple[str, tuple[Tensor, ...], int, Callable[..., Tensor], Callable[..., Tensor]]] = [
        (
            "RMSNorm",
            (x,),
            5,
            lambda x: kernels.rms_norm(x, weight, 1e-5),
            lambda x: F.rms_norm(x, (width,), weight, 1e-5),
        ),
        ("SwiGLU", (gates, up), 4, kernels.swiglu, lambda a, b: F.silu(a) * b),
        ("rotation", (q,), 4, lambda q: kernels.rotate(q, cos, sin), written_out),
    ]
    for name, given, passes, ours, plain in cases:
        leaves = [one.requires_grad_() for one in given]
        grad = torch.randn_like(leaves[0])

        def side(piece: Callable[..., Tensor], leaves: list[Tensor] = leaves, grad: Tensor = grad) -> Side:
            return lambda: torch.autograd.grad(piece(*leaves), leaves, grad)

        sides = {"ours": side(ours), "written out": side(plain)}
        if find_spec("liger_kernel") and GPU and name != "rotation":
            functional = import_module("liger_kernel.transformers.functional")
            norm = partial(functional.liger_rms_norm, W=weight, eps=1e-5, in_place=False)
            sides["Liger"] = side(functional.liger_swiglu if name == "SwiGLU" else norm)
        moved = sum(leaf.nbytes for leaf in leaves) * passes
        yield from compared("between products", f"{name} of {tuple(leaves[0].shape)}", sides, moved / rate["bytes"])


def steps(size: str, rate: Rates) -> Iterator[Line]:
    """The products that a step of generation waits for, in turn over so many weights that none is read from a cache."""
    shapes, rows, room = {
        "gpu": (((3072, 5120), (3072, 3072), (3072, 16384), (8192, 3072)), (1, 64), 5e8),
        "cpu": (((1024, 2048),), (1, 8), 6e7), "tiny": (((8, 12),), (1,), 1e3),
    }[size]  # fmt: skip
    for width, out in shapes:
        weights = [normal(out, width)]
        weights += [normal(out, width) for _ in range(int(room / weights[0].nbytes))]
        for n in rows:
            x = normal(n, width)
            ours, plain = partial(_each, kernels.products.product, x, weights), partial(_each, F.linear, x, weights)
            sides: dict[str, Side] = {"ours": replayed(ours)} if GPU else {"ours": ours, "torch": plain}
            floor = sum(weight.nbytes for weight in weights) / rate["bytes"]
            case = f"{n} x {width} to {out}, {len(weights)} times"
            yield from compared("product of few rows", case, sides, floor, count=(len(weights), "products"))


def _each(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [product(x, weight) for weight in weights]


def replayed(side: Side) -> Side:
    """The side as a CUDA graph, which no launch from Python slows down."""
    side()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side()
    return graph.replay


def attentions(size: str, rate: Rates) -> Iterator[Line]:
    tokens, heads = {
        "gpu": (16384, ((128, 24, 8), (64, 32, 8))), "cpu": (2200, ((64, 6, 2),)), "tiny": (1101, ((16, 2, 1),)),
    }[size]  # fmt: skip
    for d, queries, groups in heads:
        q, k, v = (normal(tokens, n, d).requires_grad_() for n in (queries, groups, groups))
        for kind in ("causal", "pairs", "tries"):
            end = forest(kind, tokens)
            at = torch.arange(tokens, device=DEVICE)
            seen = sum(int(((at <= i[:, None]) & (i[:, None] < end)).sum()) for i in at.split(1024))
            floor = 14 * d * queries * seen / rate["products"]  # two products forward, five backward
            sides = attention_sides(kind, q, k, v, end)
            yield from compared(f"tree attention {d}", f"{kind}, T {tokens}", sides, floor)


def attention_sides(kind: str, q: Tensor, k: Tensor, v: Tensor, end: Tensor) -> dict[str, Side]:
    """Forward and backward: ours, torch's own on the plain causal rows, and with the forest's mask."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    layout, grad, at = kernels.tree_layout(end), torch.randn_like(q), torch.arange(len(end), device=DEVICE)
    batch = [x.transpose(0, 1)[None] for x in (q, k, v)]

    def backward(out: Callable[[], Tensor]) -> Side:
        return lambda: torch.autograd.grad(out(), (q, k, v), grad)

    def sdpa(**how: Any) -> Side:
        return backward(lambda: F.scaled_dot_product_attention(*batch, enable_gqa=True, **how)[0].transpose(0, 1))

    def flash() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            sdpa(is_causal=True)()

    sides = {"ours": backward(lambda: kernels.tree_attention(q, k, v, layout)), "SDPA, causal": sdpa(is_causal=True)}
    if kind != "causal":
        sides["SDPA, mask"] = sdpa(attn_mask=((at <= at[:, None]) & (at[:, None] < end))[None, None])
    return sides | ({"SDPA flash, causal": flash, "FlexAttention": backward(flex(batch, end))} if GPU else {})


def flex(batch: list[Tensor], end: Tensor) -> Callable[[], Tensor]:
    """FlexAttention under the forest's rule, compiled at its first run."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def rule(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < end[j])

    blocks = create_block_mask(rule, None, None, len(end), len(end), device=DEVICE)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(*batch, block_mask=blocks, enable_gqa=True)[0].transpose(0, 1)


def correct(_size: str, _rate: Rates) -> Iterator[Line]:
    yield from checks()


def measured_rates(size: str, _rate: Rates) -> Iterator[Line]:
    yield {"rates": rates(size), "device": torch.cuda.get_device_name() if GPU else "processor"}


FIRST = {"rates": Part(measured_rates), "checks": Part(correct, 150)}
"""What comes before any part that is chosen."""

PARTS = {
    "token_logprob": Part(logprobs, 90),
    "few_rows": Part(few_rows, 45),
    "trained": Part(trained, 45),
    "lora_head": Part(low_rank, 45),
    "tiles": Part(tiles, 45),
    "odds": Part(ratios, 30),
    "between": Part(betweens, 30),
    "steps": Part(steps, 30),
    "attention": Part(attentions, 90),
}
