"""Keys and values of the tokens so far, so that a new token costs one step.

Shapes: B rows, S columns, K key-value heads, G query heads of a key-value head, d head width.
Rows of unequal length are aligned on the right: every row's next token goes into the same column, and what lies left of
a short row is masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import step_attention, tree_attention, tree_layout
from ..trees import forest, sequence
from .layers import Angles, Attend, Turning


class Cache:
    """Two ways to attend: `prefill` for all tokens of the prompts, on one line; then `step` for one token a row."""

    def __init__(self, prompts: Sequence[Sequence[int]], room: int, device: torch.device) -> None:
        self.line = forest([sequence(prompt) for prompt in prompts]).to(device)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.filled = int(self.lengths.max())
        self.columns = self.filled + room
        self.layout = tree_layout(self.line.end)
        self.row = torch.arange(len(prompts), device=device).repeat_interleave(self.lengths)
        self.column = self.line.position + (self.filled - self.lengths)[self.row]
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        unequal = bool((self.lengths != self.filled).any())
        blank = torch.arange(self.columns, device=device) < (self.filled - self.lengths)[:, None]
        self.mask = torch.zeros(blank.shape, device=device).masked_fill_(blank, float("-inf")) if unequal else None

    def prefill(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, d), k and v (N, K, d) of the prompts on one line -> (N, H, d)."""
        shape = (len(self.lengths), k.shape[1], self.columns, k.shape[2])
        self.keys[layer], self.values[layer] = k.new_zeros(shape), v.new_zeros(shape)
        self.keys[layer][self.row, :, self.column] = k
        self.values[layer][self.row, :, self.column] = v
        return tree_attention(q, k, v, self.layout)

    def step(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token of each row: q (B, H, d), k and v (B, K, d) -> (B, H, d)."""
        keys, values, now = self.keys[layer], self.values[layer], self.filled
        keys.select(2, now).copy_(k)
        values.select(2, now).copy_(v)
        mask = None if self.mask is None else self.mask[:, None, None, : now + 1].to(q.dtype)
        grouped = q.unflatten(1, (k.shape[1], -1))  # (B, K, G, d): the heads of a group are its queries
        keys, values = (held.narrow(2, 0, now + 1) for held in (keys, values))
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).flatten(1, 2)

    @property
    def stepping(self) -> Attend | Turning:
        """How a step attends."""
        return self.step

    @property
    def position(self) -> Tensor:
        """The position of each row's next token: (B,)."""
        return self.lengths

    def advance(self) -> None:
        """All layers have stored the token of this step."""
        self.filled += 1
        self.lengths = self.lengths + 1


class FixedCache(Cache):
    """A cache whose steps repeat: what changes from step to step lies on the device and is changed in place (`now`, `lengths`,
    the columns), so that a CUDA graph of one step makes all that follow."""

    def __init__(self, prompts: Sequence[Sequence[int]], room: int, device: torch.device) -> None:
        super().__init__(prompts, room, device)
        self.first = self.filled - self.lengths  # the first column of each row
        self.now = torch.tensor([self.filled], device=device)  # the column that a step writes

    @property
    def stepping(self) -> Turning:
        return Turning(self.turn_and_step)

    def turn_and_step(self, layer: int, q: Tensor, k: Tensor, v: Tensor, angles: Angles) -> Tensor:
        """`step` of q and k that are not turned yet."""
        return step_attention(q, k, v, *angles, self.keys[layer], self.values[layer], self.first, self.now)

    def advance(self) -> None:
        self.now.add_(1)
        self.lengths.add_(1)
