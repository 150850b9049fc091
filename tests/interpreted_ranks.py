"""A decoder spread over two ranks that computes with the Triton kernels, in Triton's interpreter.

`python tests/interpreted_ranks.py FOLDER`: what it learns goes to FOLDER/two; test_sharding.py runs it in its own process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from ranks import on_ranks
from students import run_settings, text_pairs, write_pairs_file, write_student

from mint import kernels
from mint.pipeline import align


def learnt(folder: Path, name: str, **changes: Any) -> None:
    """A step of ORPO with an adapter on the head; 323 rows of a vocabulary are parted unevenly."""
    settings: dict[str, Any] = {"steps": 1, "batch_size": 2, "tokens_per_batch": 200, "held_out": 0.0, **changes}
    align(run_settings(
        model=str(folder / "model"), pairs=str(folder / "pairs.jsonl"), out=str(folder / name),
        targets=("all-linear", "lm_head"), **settings,
    ))  # fmt: skip


def spread(folder: Path) -> None:
    assert kernels._backend(torch.zeros(1), "logprob").WALK.__name__ == "KernelWalk"
    learnt(folder, "two", shard=True)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    write_student(place / "model", tie_word_embeddings=False, vocab_size=323)
    write_pairs_file(place / "pairs.jsonl", text_pairs(4))
    on_ranks(2, spread, place)
