"""`token_logprob` + ORPO alone, forward and backward, against materialised logits and against Liger's fused loss.

    python tests/bench/loss.py [--width 2048] [--vocabulary 128256] [--positions 1024] [--pairs 4 1]

The head is frozen, as LoRA leaves it. Time: all sides in one process, in turn, median. Memory: each side in a process of
its own, the peak above what its inputs take. One JSON line a comparison.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
warnings.simplefilter("ignore")

from mint import orpo_loss  # noqa: E402
from mint.kernels import token_logprob  # noqa: E402

BETA = 0.1
Side = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def inputs(words: argparse.Namespace, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D), head (V, D), labels (N,): the first half of the rows are chosen answers."""
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    hidden = torch.randn(words.positions, words.width, generator=generator).to(kind).requires_grad_()
    head = torch.empty(words.vocabulary, words.width, dtype=kind)
    for rows in head.split(8192):
        rows.copy_(torch.randn(rows.shape, generator=generator) * words.width**-0.5)
    return hidden, head, torch.randint(0, words.vocabulary, (words.positions,), generator=generator)


def _orpo(logp: Tensor, pairs: int) -> Tensor:
    chosen, rejected = logp.view(2, pairs, -1).mean(dim=-1)
    return orpo_loss(chosen, rejected, -chosen.mean(), BETA)


def ours(hidden: Tensor, head: Tensor, labels: Tensor, pairs: int) -> Tensor:
    return _orpo(token_logprob(hidden, head, labels), pairs)


def materialised(hidden: Tensor, head: Tensor, labels: Tensor, pairs: int) -> Tensor:
    logits = hidden @ head.T
    return _orpo(torch.log_softmax(logits.float(), dim=-1).gather(1, labels[:, None])[:, 0], pairs)


def liger(hidden: Tensor, head: Tensor, labels: Tensor, pairs: int) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    fused = LigerFusedLinearORPOLoss(beta=BETA, compiled=False)
    out = fused(head, hidden.view(2 * pairs, -1, hidden.shape[1]), labels.view(2 * pairs, -1))
    loss: Tensor = out[0] if isinstance(out, tuple) else out
    return loss


SIDES: dict[str, Side] = {"ours": ours, "materialised": materialised, "liger": liger}


def compare(words: argparse.Namespace, dtype: str, pairs: int) -> dict[str, Any]:
    hidden, head, labels = inputs(words, dtype)
    times: dict[str, list[float]] = {name: [] for name in (*SIDES, "forward")}
    losses = {}
    clock = time.process_time if words.computing else time.perf_counter
    for side in SIDES.values():
        _warm(side, dtype, pairs)
    for _ in range(words.rounds):
        for name, side in SIDES.items():
            hidden.grad = None
            start = clock()
            loss = side(hidden, head, labels, pairs)
            loss.backward()  # type: ignore[no-untyped-call]
            losses[name] = loss.item()
            times[name].append(clock() - start)
        start = clock()
        with torch.no_grad():
            ours(hidden, head, labels, pairs)
        times["forward"].append(clock() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    memory = {name: _memory(words, name, dtype, pairs) for name in SIDES}
    return {
        "bench": "loss", "dtype": dtype, "pairs": pairs, "losses": losses,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "time_to_materialised": round(seconds["ours"] / seconds["materialised"], 3),
        "time_to_liger": round(seconds["ours"] / seconds["liger"], 3),
        "both_ways_to_forward": round(seconds["ours"] / seconds["forward"], 3),
        "memory": memory,
        "memory_to_materialised": round(memory["ours"] / memory["materialised"], 3),
        "memory_to_liger": round(memory["ours"] / memory["liger"], 3),
    }  # fmt: skip


def _warm(side: Side, dtype: str, pairs: int) -> None:
    """Imports and thread pools, by a small call."""
    small = argparse.Namespace(width=32, vocabulary=64, positions=8 * pairs)
    side(*inputs(small, dtype), pairs).backward()  # type: ignore[no-untyped-call]


def _memory(words: argparse.Namespace, side: str, dtype: str, pairs: int) -> int:
    sizes = [str(x) for x in (words.width, words.vocabulary, words.positions)]
    line = [sys.executable, __file__, "--child", side, dtype, str(pairs), *sizes]
    return int(subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()[-1])


def child(side: str, dtype: str, pairs: str, width: str, vocabulary: str, positions: str) -> None:
    words = argparse.Namespace(width=int(width), vocabulary=int(vocabulary), positions=int(positions))
    data = inputs(words, dtype)
    _warm(SIDES[side], dtype, int(pairs))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")
    SIDES[side](*data, int(pairs)).backward()  # type: ignore[no-untyped-call]
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) * 1024 - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=6)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--pairs", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--computing", action="store_true")
    words = parser.parse_args()
    if words.computing:
        torch.set_num_threads(1)
    if words.child:
        child(*words.child)
        return
    for dtype in words.dtypes:
        for pairs in words.pairs:
            print(json.dumps(compare(words, dtype, pairs)), flush=True)


if __name__ == "__main__":
    main()
