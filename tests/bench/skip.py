"""How much of the second product `token_logprob(skip=...)` can leave out, and what that saves on a processor.

    python tests/bench/skip.py [--rows 2048] [--tiles 32] [--skip 1e-4 1e-3 1e-2]

Rows are hidden states of the built-in student in the answers and in the prompts of conversations that it was not trained
on, with its head (3,072 tokens), and, beside them, random ones. `rows`: the share of (row, tile) that is left out.
`blocks`: of (128 rows, tile) of which no row needs the tile, which is what a kernel could leave out on a GPU. `error`:
the largest error of a direction, over the largest direction. `time`: forward and backward by the thread's own time, over
that with nothing left out, turn about, median. One JSON line a case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mint.builtin.cases import STUDENT
from mint.builtin.student import conversations
from mint.decoders import load_decoder
from mint.kernels import reference, token_logprob
from mint.progress import set_quiet
from mint.trees import Text, forest, token_tree

BLOCK, ROUNDS = 128, 5
Given = tuple[Tensor, Tensor, Tensor]


def of_the_student(rows: int, answers: bool) -> Given:
    """Hidden states within prompts or answers, the head, and the tokens that follow."""
    decoder = load_decoder(STUDENT, device="cpu", dtype="float32")
    texts = []
    for messages, answer in conversations(64, seed=99):
        prompt = decoder.tokenizer.chat_ids(messages, generate=True)
        whole = prompt + decoder.tokenizer.answer_ids([{"role": "assistant", "content": answer}])
        texts.append(token_tree([Text(whole, len(prompt)) if answers else Text(prompt)]))
    tree = forest(texts)
    with torch.no_grad():
        hidden = decoder.hidden(tree)[tree.sources]
    chosen = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(0))[:rows].sort().values
    return hidden[chosen], decoder.network.lm_head.weight.detach(), tree.labels[chosen]


def random_ones(like: Given) -> Given:
    """Logits of standard deviation 1, labels at random."""
    drawn = torch.Generator().manual_seed(0)
    hidden, head, labels = like
    return (torch.randn(hidden.shape, generator=drawn), torch.randn(head.shape, generator=drawn) * head.shape[1] ** -0.5,
            torch.randint(len(head), labels.shape, generator=drawn))  # fmt: skip


def directions(given: Given, tile: int, skip: float) -> tuple[Tensor, float]:
    """The gradient of the sum of all log p, and the thread's seconds."""
    hidden = given[0].detach().requires_grad_()
    start = time.thread_time()
    token_logprob(hidden, *given[1:], tile=tile, skip=skip).sum().backward()
    assert hidden.grad is not None
    return hidden.grad, time.thread_time() - start


def left_out(given: Given, tile: int, skip: float) -> tuple[float, float]:
    """The shares of rows and of blocks of rows that a tile does without."""
    needed: list[Tensor] = []
    real = reference.Walk.not_left_out

    def noting(walk: reference.Walk, mass: Tensor) -> Tensor:
        kept = real(walk, mass)
        needed.append(torch.zeros(len(mass)).index_fill_(0, kept, 1.0))
        return kept

    reference.Walk.not_left_out = noting  # type: ignore[method-assign]
    directions(given, tile, skip)
    reference.Walk.not_left_out = real  # type: ignore[method-assign]
    rows = torch.stack(needed)
    blocks = torch.stack([part.amax(dim=1) for part in rows.split(BLOCK, dim=1)])
    return 1 - rows.mean().item(), 1 - blocks.mean().item()


def measured(name: str, given: Given, tiles: int, skip: float) -> dict[str, float | str]:
    tile = -(-len(given[1]) // tiles)
    rows, blocks = left_out(given, tile, skip)
    turns = [(directions(given, tile, 0.0), directions(given, tile, skip)) for _ in range(ROUNDS)]
    (exact, _), (found, _) = turns[0]
    error = (found - exact).norm(dim=1).max() / exact.norm(dim=1).max()
    plain, ours = (statistics.median(turn[side][1] for turn in turns) for side in (0, 1))
    return {"bench": "skip", "rows of": name, "skip": skip, "rows": round(rows, 3), "blocks": round(blocks, 3),
            "error": float(f"{error.item():.1e}"), "time": round(ours / plain, 2)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--tiles", type=int, default=32)
    parser.add_argument("--skip", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2])
    words = parser.parse_args()
    set_quiet(True)
    prompts, answers = (of_the_student(words.rows, kind) for kind in (False, True))
    for name, given in (("answers", answers), ("prompts", prompts), ("random numbers", random_ones(prompts))):
        for skip in words.skip:
            print(json.dumps(measured(name, given, words.tiles, skip)), flush=True)


if __name__ == "__main__":
    main()
