"""Steps of generation on a GPU as one CUDA graph: some 260 small kernels are launched at once, not one by one from Python.

Without it a step of a few rows waits for the launches longer than for the weights. Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import parallel
from .cache import FixedCache

STEPS = 16
"""A shorter text is not worth a capture, which costs about what a few steps do."""


def worth_replaying(network: Any, count: int, device: torch.device) -> bool:
    """A network that looks at pictures is no module but one with its pictures, and takes its steps one by one; so does one
    that is spread over several processes."""
    plain = device.type == "cuda" and count >= STEPS and isinstance(network, nn.Module)
    return plain and not any(map(parallel.is_part, network.parameters()))


class Replay:
    """(B,) tokens -> (B, V) logits of the next, by `read`, which takes its tokens always from the same memory.

    The logits lie in memory that the next step writes again.
    """

    def __init__(self, read: Callable[[Tensor], Tensor], cache: FixedCache) -> None:
        self.read, self.cache = read, cache
        self.tokens = torch.zeros(len(cache.lengths), dtype=torch.int64, device=cache.lengths.device)
        self.repeat: Callable[[], Tensor] | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        if self.repeat is None:
            self.repeat = captured(lambda: self.read(self.tokens), self.cache.advance, self.tokens.device)
        return self.repeat()


def captured(read: Callable[[], Tensor], advance: Callable[[], None], device: torch.device) -> Callable[[], Tensor]:
    """A graph of `read` and `advance`. The reading before it chooses the algorithms, which a capture cannot; the column
    that it writes is written again, with the same, by the first replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            read()
        here.wait_stream(beside)
        with torch.cuda.graph(
            graph, stream=beside, capture_error_mode="thread_local"
        ):  # other threads may work meanwhile
            logits = read()
            advance()

    def repeat() -> Tensor:
        graph.replay()
        return logits

    return repeat
