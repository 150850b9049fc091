"""`python -m mint.kernels.bench [--json] [--out FILE] [--only NAME ...]`: the kernels on this machine, in one table.

First that they are right (against float64, and on a GPU that nothing waits for the device and a CUDA graph takes them),
then how fast: the median of rounds in which all sides take turns, beside the floor that the machine's own matrix product
sets, and beside the peers that are installed. A processor gets smaller sizes; there only the ratios mean anything.
Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from . import reference
from .checks import DEVICE, GPU, checks, forest, normal

Side = Callable[[], Any]
ROUNDS = 7 if GPU else 3
PAIRS = 4


def seconds(side: Side) -> float:
    """One run. On a GPU between two events, so that the time of the launches in Python is seen only if it is longer."""
    if not GPU:
        start = time.perf_counter()
        side()
        return time.perf_counter() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    side()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


def peak(side: Side) -> int | None:
    """Bytes above what was held before; tests/bench/loss.py measures it on a processor."""
    if not GPU:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side()
    return torch.cuda.max_memory_allocated() - before


def compared(bench: str, case: str, sides: dict[str, Side], floor: float | None = None) -> Iterator[dict[str, Any]]:
    """A line for each side: interleaved medians, ratio to the first side, fraction of the floor that it reaches."""
    for side in sides.values():
        side()  # compiles, tunes, fills the allocator
    memory = {name: peak(side) for name, side in sides.items()}
    rounds = [{name: seconds(side) for name, side in sides.items()} for _ in range(ROUNDS)]
    medians = {name: statistics.median(one[name] for one in rounds) for name in sides}
    first, floor = next(iter(medians.values())), floor if GPU else None  # a shared processor has no steady rate
    for name, median in medians.items():
        yield {"bench": bench, "case": case, "side": name, "ms": median * 1e3, "to_ours": median / first,
               "floor_ms": None if floor is None else floor * 1e3, "fraction": floor and floor / median,
               "mib": None if memory[name] is None else memory[name] / 2**20}  # fmt: skip


def rates() -> dict[str, float]:
    """What this machine gives: operations a second of a square product, bytes a second of a copy."""
    n = 8192 if GPU else 1024
    x, y = normal(n, n), normal(n, n)
    room = torch.empty(1 << (30 if GPU else 24), dtype=torch.uint8, device=DEVICE)
    product, copy = (min(seconds(side) for _ in range(8)) for side in (lambda: torch.mm(x, y), room.clone))
    return {"products": 2 * n**3 / product, "bytes": 2 * room.numel() / copy}


def orpo(logp: Tensor) -> Tensor:
    chosen, rejected = logp.view(2, PAIRS, -1).mean(dim=-1)
    return -chosen.mean() - 0.1 * F.logsigmoid(kernels.log_odds_ratio(chosen, rejected)).mean()


def logprob_sides(hidden: Tensor, head: Tensor, labels: Tensor) -> dict[str, Side]:
    """Each side: ORPO of 4 pairs and the gradient of the hidden states, the head frozen; peers where installed."""

    def backward(logp: Callable[[], Tensor]) -> Side:
        return lambda: torch.autograd.grad(orpo(logp()), hidden)

    def forward() -> None:
        with torch.no_grad():
            kernels.token_logprob(hidden, head, labels)

    sides = {"ours": backward(lambda: kernels.token_logprob(hidden, head, labels)), "ours, forward": forward}
    whole = torch.empty(len(hidden), len(head), dtype=hidden.dtype, device=DEVICE)
    sides["two bare products"] = lambda: torch.mm(torch.mm(hidden.detach(), head.T, out=whole), head)
    sides["materialised"] = backward(
        lambda: F.linear(hidden, head).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    )
    if find_spec("trl"):
        chunked = import_module("trl.kernels").ChunkedLogProbFunction
        sides["TRL chunked"] = backward(lambda: chunked.apply(hidden, head, None, labels, 1.0, 8192)[0])
    if find_spec("liger_kernel"):
        liger = import_module("liger_kernel.chunked_loss").LigerFusedLinearORPOLoss
        fused, shape = liger(compiled=GPU), (2 * PAIRS, len(labels) // (2 * PAIRS))
        sides["Liger ORPO"] = lambda: torch.autograd.grad(
            fused(head, hidden.view(*shape, -1), labels.view(shape))[0], hidden
        )
        if GPU:
            cross_entropy = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
            sides["Liger cross entropy"] = lambda: torch.autograd.grad(cross_entropy(hidden, head, labels), hidden)
    return sides


def logprobs(rate: dict[str, float]) -> Iterator[dict[str, Any]]:
    sizes = [(8192, 3072, 128256), (8192, 4096, 128256), *((n, 4096, 128256) for n in (128, 512, 2048))]
    for n, d, v in sizes if GPU else [(256, 512, 32003)]:
        hidden, head, labels = (
            normal(n, d).requires_grad_(),
            normal(v, d, scale=d**-0.5),
            torch.randint(v, (n,), device=DEVICE),
        )
        floor = max(4 * n * d * v / rate["products"], 2 * v * d * head.element_size() / rate["bytes"])
        yield from compared("token_logprob", f"N {n} D {d} V {v}", logprob_sides(hidden, head, labels), floor)


def trained(rate: dict[str, float]) -> Iterator[dict[str, Any]]:
    n, d, v = (8192, 3072, 128256) if GPU else (128, 256, 16003)
    hidden, head, labels = (
        normal(n, d).requires_grad_(),
        normal(v, d, scale=d**-0.5),
        torch.randint(v, (n,), device=DEVICE),
    )
    low, up = normal(n, 16).requires_grad_(), normal(v, 16, scale=0.1).requires_grad_()
    weight, logprob, grad = head.clone().requires_grad_(), kernels.token_logprob, torch.autograd.grad
    sides = {
        "ours, trained head": lambda: grad(logprob(hidden, weight, labels).mean(), (hidden, weight)),
        "ours, LoRA 16": lambda: grad(logprob(hidden, head, labels, low=low, up=up).mean(), (hidden, low, up)),
        "materialised": lambda: grad(F.cross_entropy(F.linear(hidden, weight).float(), labels), (hidden, weight)),
    }
    yield from compared("trained head", f"N {n} D {d} V {v}", sides, 6 * n * d * v / rate["products"])


def tiles(rate: dict[str, float]) -> Iterator[dict[str, Any]]:
    """What the tile's width does, at the rows that walk together by default."""
    n, d, v = (8192, 4096, 128256) if GPU else (256, 512, 32003)
    hidden, head, labels = (
        normal(n, d).requires_grad_(),
        normal(v, d, scale=d**-0.5),
        torch.randint(v, (n,), device=DEVICE),
    )
    widths = (None, 2048, 4096, 8192, 16384) if GPU else (None, 1024, 4096)

    def with_tile(width: int | None) -> Side:
        return lambda: torch.autograd.grad(kernels.token_logprob(hidden, head, labels, tile=width).mean(), hidden)

    sides = {f"tile {width}": with_tile(width) for width in widths}
    yield from compared("tile width", f"N {n} D {d} V {v}", sides, 4 * n * d * v / rate["products"])


def ratios(rate: dict[str, float]) -> Iterator[dict[str, Any]]:
    """From token log-probabilities to ORPO's terms and their gradient: 64 pairs with answers of 200 tokens."""
    logp = (-torch.rand(64 * 400, device=DEVICE)).requires_grad_()
    edges, starts = torch.arange(64 * 400, device=DEVICE), torch.arange(0, 64 * 400 + 1, 200, device=DEVICE)
    sides = {name: lambda side=side: torch.autograd.grad(side.preference_terms(logp, edges, starts).term.sum(), logp)
             for name, side in (("ours", kernels), ("plain", reference))}  # fmt: skip
    yield from compared("preference_terms", "64 pairs of 200 + 200", sides, 20 * len(logp) / rate["bytes"])


def attentions(rate: dict[str, float]) -> Iterator[dict[str, Any]]:
    tokens = 16384 if GPU else 2200
    for d, heads, groups in ((128, 24, 8), (64, 32, 8)) if GPU else ((64, 6, 2),):
        q, k, v = (normal(tokens, n, d).requires_grad_() for n in (heads, groups, groups))
        for kind in ("causal", "pairs", "tries"):
            end = forest(kind, tokens)
            at = torch.arange(tokens, device=DEVICE)
            seen = sum(int(((at <= i[:, None]) & (i[:, None] < end)).sum()) for i in at.split(1024))
            floor = 14 * d * heads * seen / rate["products"]  # two products forward, five backward
            yield from compared(
                f"tree attention {d}", f"{kind}, T {tokens}", attention_sides(kind, q, k, v, end), floor
            )


def attention_sides(kind: str, q: Tensor, k: Tensor, v: Tensor, end: Tensor) -> dict[str, Side]:
    layout, grad = kernels.tree_layout(end), torch.randn_like(q)
    batch = [x.transpose(0, 1)[None] for x in (q, k, v)]

    def backward(out: Callable[[], Tensor]) -> Side:
        return lambda: torch.autograd.grad(out(), (q, k, v), grad)

    def sdpa(**how: Any) -> Side:
        return backward(lambda: F.scaled_dot_product_attention(*batch, enable_gqa=True, **how)[0].transpose(0, 1))

    sides = {"ours": backward(lambda: kernels.tree_attention(q, k, v, layout)), "SDPA, causal": sdpa(is_causal=True)}
    at = torch.arange(len(end), device=DEVICE)
    if kind != "causal":
        sides["SDPA, mask"] = sdpa(attn_mask=((at <= at[:, None]) & (at[:, None] < end))[None, None])
    if GPU:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def rule(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (i < end[j])

        blocks, flex = (
            create_block_mask(rule, None, None, len(end), len(end), device=DEVICE),
            torch.compile(flex_attention),
        )
        sides["FlexAttention"] = backward(lambda: flex(*batch, block_mask=blocks, enable_gqa=True)[0].transpose(0, 1))
    return sides


BENCHES = {"token_logprob": logprobs, "trained": trained, "tiles": tiles, "odds": ratios, "attention": attentions}


COLUMNS = "{:<22}{:<30}{:<20}{:>10}{:>9}{:>10}{:>9}{:>9}"


def table(report: dict[str, Any]) -> str:
    products, copies = (report["rates"][name] / 1e12 for name in ("products", "bytes"))
    lines = [f"{report['device']}: {products:.2f} TFLOP/s in products, {copies:.3f} TB/s in copies"]
    for one in report["checks"]:
        verdict = "right" if one["right"] else "WRONG"
        lines.append(f"{verdict}  {one['check']:<36} error {one['error']:.1e}, at most {one['limit']:.0e}")
    lines.append(COLUMNS.format("bench", "case", "side", "ms", "to ours", "floor ms", "reached", "MiB"))
    for one in report["lines"]:
        floor, reached = ("", "") if one["floor_ms"] is None else (f"{one['floor_ms']:.3f}", f"{one['fraction']:.0%}")
        memory = "" if one["mib"] is None else f"{one['mib']:.0f}"
        times = f"{one['ms']:.3f}", f"{one['to_ours']:.2f}", floor, reached, memory
        lines.append(COLUMNS.format(one["bench"], one["case"], one["side"], *times))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file too")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    words = parser.parse_args()
    torch.manual_seed(0)
    report: dict[str, Any] = {"device": torch.cuda.get_device_name() if GPU else "processor", "torch": torch.__version__,
                              "rates": rates(), "checks": list(checks()), "lines": []}  # fmt: skip
    for at, name in enumerate(words.only, 1):
        print(f"bench {at}/{len(words.only)}: {name}", file=sys.stderr, flush=True)
        report["lines"] += BENCHES[name](report["rates"])
    if words.out:  # beside its place and renamed
        beside = words.out.with_name(f".{words.out.name}.part")
        beside.write_text(json.dumps(report, indent=2) + "\n")
        beside.replace(words.out)
    print(json.dumps(report) if words.json else table(report))
    return 0 if all(one["right"] for one in report["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
