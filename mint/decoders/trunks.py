"""Keys and values of prompts on one line, for the many short texts that go on from them.

Shapes: B prompts, S tokens of the line, n new tokens, K key-value heads, d head width, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kernels import blocks, branch_attention, tree_attention, tree_layout
from ..transfer import sent
from ..trees import forest, sequence


class Trunks:
    """Prompts that have been read. `run` reads tokens after them, and keeps those for later ones or forgets them.

    `network` is what `Decoder.looking` gives for the prompts and their images; where it looks at any, a run has the same
    number of tokens after each prompt, in the order of the prompts.
    """

    def __init__(self, network: Any, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        self.network, self.device = network, device
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        line = forest([sequence(prompt) for prompt in prompts]).to(device)
        self.lengths = [len(prompt) for prompt in prompts]
        layout = tree_layout(line.end)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer], self.values[layer] = k, v
            return tree_attention(q, k, v, layout)

        hidden = network(line.ids, line.position, attend)
        self.size = len(line)
        stops = torch.tensor(self.lengths).cumsum(0)
        self.runs = [slice(stop - length, stop) for stop, length in zip(stops.tolist(), self.lengths, strict=True)]
        self.last: Tensor = hidden[(stops - 1).to(device)]  # (B, D), what predicts the first token after each prompt

    def run(self, ids: Tensor, position: Tensor, layout: tuple[blocks.Block, ...], keep: bool = False) -> Tensor:
        """Hidden states (n, D) of new tokens, which stand at the end of the line; `layout` says which of it they see."""

        layout = tuple(replace(block, mask=sent(block.mask, self.device)) for block in layout)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = torch.cat([self.keys[layer], k]), torch.cat([self.values[layer], v])
            if keep:
                self.keys[layer], self.values[layer] = keys, values
            return branch_attention(q, keys, values, layout)

        hidden: Tensor = self.network(sent(ids, self.device), sent(position, self.device), attend)
        if keep:
            self.size += len(ids)
        return hidden
