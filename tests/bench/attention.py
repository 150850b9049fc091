"""Attention in blocks on a plain causal row against torch's causal attention: python tests/bench/attention.py

One JSON line per length and precision: the median time of ours over that of `scaled_dot_product_attention`, both sides
interleaved, forward alone and forward with backward. The layout, which all layers share, is given beside them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import generate  # noqa: E402
from generate import interleaved, say  # noqa: E402

from mint.kernels import tree_attention, tree_layout  # noqa: E402

HEADS, KV_HEADS, WIDTH = 12, 4, 64


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def trained(attend: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(attend(*inputs), inputs, grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--cpu-time", action="store_true", help="one thread's own time: for a machine that others use")
    options = parser.parse_args()
    if options.cpu_time:
        options.threads, generate.clock = 1, time.thread_time
    torch.set_num_threads(options.threads)
    for dtype in (torch.float32, torch.bfloat16):
        for length in options.lengths:
            compare(dtype, length, options.rounds)


def compare(dtype: torch.dtype, length: int, rounds: int) -> None:
    inputs = [torch.randn(length, heads, WIDTH).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    end = torch.full((length,), length)
    layout = tree_layout(end)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tree_attention(q, k, v, layout)

    def built() -> None:
        tree_layout(end)

    with torch.no_grad():
        forward = interleaved(rounds, ours=lambda: ours(*inputs), plain=lambda: plain(*inputs), layout=built)
    leaves, grad = [x.requires_grad_() for x in inputs], torch.randn(length, HEADS, WIDTH).to(dtype)
    both = interleaved(rounds, ours=trained(ours, leaves, grad), plain=trained(plain, leaves, grad))
    say(
        comparison="causal attention",
        dtype=str(dtype).removeprefix("torch."),
        tokens=length,
        forward=forward["ours"] / forward["plain"],
        with_backward=both["ours"] / both["plain"],
        layout=forward["layout"] / forward["plain"],
    )


if __name__ == "__main__":
    main()
