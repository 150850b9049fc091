"""Text from a decoder, a token of every row at a time: greedy or sampled, with a key-value cache.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from ..transfer import arriving
from .cache import Cache, FixedCache
from .layers import Attend, Turning
from .packing import packed
from .replay import Replay, worth_replaying


class Network(Protocol):
    """What generation needs of a decoder: hidden states of a line of tokens, and the head on them."""

    lm_head: Callable[[Tensor], Tensor]

    def __call__(self, ids: Tensor, position: Tensor, attend: Attend | Turning, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the likeliest; `top_k` and `top_p` cut the tail first."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}; wanted 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; wanted at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; wanted a share above 0 and at most 1")

    def chooser(self, rows: int) -> Callable[[Tensor], Tensor]:
        """(B, V) logits -> (B,) tokens. Every row draws from its own generator, so a row alone draws as in a batch."""
        if self.temperature == 0:
            return lambda logits: logits.max(dim=-1).indices  # in bfloat16 four times as fast as argmax
        generators = [torch.Generator() for _ in range(rows)]
        for generator in generators:
            generator.seed() if self.seed is None else generator.manual_seed(self.seed)

        def draw(logits: Tensor) -> Tensor:
            shares = self.shares(logits).cpu()
            rows = zip(shares, generators, strict=True)
            return torch.cat([torch.multinomial(share, 1, generator=g) for share, g in rows]).to(logits.device)

        return draw

    def shares(self, logits: Tensor) -> Tensor:
        """The probabilities that are drawn from: (B, V) -> (B, V) float32."""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p is not None:
            ordered, index = logits.sort(dim=-1, descending=True)
            share = ordered.softmax(dim=-1)
            past = share.cumsum(dim=-1) - share >= self.top_p  # what is likelier already holds top_p
            logits = logits.masked_fill(past.scatter(-1, index, past), float("-inf"))
        return logits.softmax(dim=-1)


def steps(
    network: Network,
    prompts: Sequence[Sequence[int]],
    count: int,
    choose: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Iterator[list[int]]:
    """The next token of every row, `count` times. A row goes on past its end; the caller decides when to stop."""
    ahead = worth_replaying(network, count, device)
    cache = FixedCache(prompts, count, device) if ahead else Cache(prompts, count, device)

    def read(tokens: Tensor) -> Tensor:
        return network.lm_head(network(tokens, cache.position, cache.stepping))

    def follow(tokens: Tensor) -> Tensor:
        logits = read(tokens)
        cache.advance()
        return logits

    with packed(network, len(prompts), count, device):
        hidden = network(cache.line.ids, cache.line.position, cache.prefill)
        last = cache.lengths.cumsum(0) - 1
        logits = network.lm_head(hidden[last])
        step = Replay(read, cache) if isinstance(cache, FixedCache) else follow
        for left in reversed(range(count)):
            tokens = choose(logits)
            written = arriving(tokens)
            if ahead and left:  # a GPU goes on while the tokens are looked at
                logits = step(tokens)
            yield written()
            if left and not ahead:
                logits = step(tokens)


@torch.inference_mode()
def generate(
    network: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
    device: torch.device,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, its stop token included; `on_token(row, token)` hears of each as it comes."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ConfigError("generate needs at least one prompt and a token in each; found an empty one")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; wanted a number from 0 up")
    stops = set(stop_ids)
    written: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    if not max_new_tokens:
        return written
    for tokens in steps(network, prompts, max_new_tokens, sampling.chooser(len(prompts)), device):
        for row in sorted(open_rows):
            written[row].append(tokens[row])
            if on_token is not None:
                on_token(row, tokens[row])
        open_rows -= {row for row in open_rows if tokens[row] in stops}
        if not open_rows:
            break
    return written
