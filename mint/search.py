"""The k likeliest texts of a closed set, without scoring the others: best first, with an exact bound.

A log-probability only falls along a path, so that of a start bounds all texts that go on from it. Starts are opened from
the likeliest down, until the k-th text found is at least as likely as every start that is left.
Shapes: N nodes of the trie, n new tokens, S tokens of the line.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .decoders.branches import grow
from .decoders.heads import edge_logp
from .decoders.trunks import Trunks
from .tries import ROOT, Trie

WIDTH = 64
"""Tokens that are opened together: a pass over so few costs hardly more than a pass over one."""

MOST = 2048
"""Tokens that are opened in all, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Found:
    """The k likeliest texts by number, with their log-probabilities, best first.

    `total` is the log of the probability of all texts at most: that of the texts seen and of the starts never opened.
    """

    texts: tuple[int, ...]
    logp: tuple[float, ...]
    total: float
    opened: int  # tokens computed


@dataclass(slots=True)
class _Search:
    trie: Trie
    trunk: Trunks
    weight: Tensor
    k: int
    text_at: Any
    left: list[tuple[float, int]] = field(default_factory=list)  # starts not yet opened: (-logp, node), a heap
    seen: list[tuple[float, int]] = field(default_factory=list)  # texts found: (logp, text)
    best: list[float] = field(default_factory=list)  # the k largest log-probabilities, a heap
    column: dict[int, int] = field(default_factory=dict)  # where on the line an opened node stands
    logp: dict[int, float] = field(default_factory=dict)  # of opened nodes

    def floor(self) -> float:
        """What a start must reach to matter."""
        return self.best[0] if len(self.best) >= self.k else -math.inf

    def add(self, nodes: list[int], logp: list[float]) -> None:
        """Children of an opened node: texts that end, and starts to be opened."""
        for node, value in zip(nodes, logp, strict=True):
            text = int(self.text_at[node])
            if text >= 0:
                self.seen.append((value, text))
                (heapq.heappush if len(self.best) < self.k else heapq.heappushpop)(self.best, value)
            if self.trie.end[node] > node + 1:
                heapq.heappush(self.left, (-value, node))

    def next_chains(self) -> list[list[int]]:
        """The likeliest starts, each with what must follow it: up to where the trie parts, or a text ends."""
        chains: list[list[int]] = []
        tokens = 0
        while self.left and tokens < WIDTH and -self.left[0][0] >= self.floor():
            value, node = heapq.heappop(self.left)
            self.logp[node] = -value
            chain = [node]
            while (only := self._only_child(chain[-1])) is not None:
                chain.append(only)
            chains.append(chain)
            tokens += len(chain)
        return chains

    def _only_child(self, node: int) -> int | None:
        """The one node that follows, if it is one, something follows it, and no text ends in it."""
        children = self.trie.children(node)
        child = int(children[0])
        alone = len(children) == 1 and self.trie.end[child] > child + 1 and self.text_at[child] < 0
        return child if alone else None

    def open(self, chains: list[list[int]]) -> None:
        """Compute the nodes of some chains and weigh all that follows them."""
        nodes = [node for chain in chains for node in chain]
        self.column.update((node, self.trunk.size + at) for at, node in enumerate(nodes))
        above = [[self.column[node] for node in self.trie.path(own)] for own in nodes]
        hidden = grow(self.trunk, self.trie.token[nodes].tolist(), self.trie.depth[nodes].tolist(), above)
        self.weigh(nodes, hidden)

    def weigh(self, nodes: list[int], hidden: Tensor) -> None:
        """Log-probabilities of the children of computed nodes; hidden (n, D)."""
        children = [self.trie.children(node) for node in nodes]
        source = np.repeat(np.arange(len(nodes)), [len(part) for part in children])
        edges = edge_logp(hidden[None], self.weight, source, self.trie.token[np.concatenate(children)])[0].tolist()
        at = 0
        for node, part in zip(nodes, children, strict=True):
            base, names = self.logp.get(node, 0.0), part.tolist()
            values = [base + edge for edge in edges[at : at + len(names)]]
            at += len(names)
            if names[0] in self.column:  # the chain goes on: that node is open already
                self.logp[names[0]] = values[0]
            else:
                self.add(names, values)


@torch.inference_mode()
def best_first(trunk: Trunks, weight: Tensor, trie: Trie, k: int, most: int = MOST) -> Found | None:
    """The k likeliest texts of the trie after the one prompt of `trunk`, ties by their number; weight (V, D).

    None where it would open more than `most` tokens: a model that prefers nothing is better ranked in full.
    """
    search = _Search(trie, trunk, weight, k, trie.text_at())
    search.weigh([ROOT], trunk.last)
    while chains := search.next_chains():
        if len(search.column) + sum(map(len, chains)) > most:
            return None
        search.open(chains)
    found = sorted(search.seen, key=lambda item: (-item[0], item[1]))
    total = math.log(math.fsum(map(math.exp, (*(v for v, _ in search.seen), *(-v for v, _ in search.left)))) or 5e-324)
    texts, logp = tuple(text for _, text in found[:k]), tuple(value for value, _ in found[:k])
    return Found(texts, logp, total, len(search.column))
