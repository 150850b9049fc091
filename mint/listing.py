"""The aligned list, decoded greedily under the trie of a closed set: exactly k names of the set, none twice, by construction.

What the form or the trie leaves no choice about (the heading, numbers, line ends, the rest of a name that has begun) is
not asked of the model but read together with what comes next, so a list costs one pass for each real choice.
Shapes: n tokens of a step, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .answers import heading, line_start
from .chat import ChatTokenizer
from .decoders import Decoder
from .decoders.heads import edge_logp, head_weight, logits_of
from .decoders.trunks import Trunks
from .kernels import blocks
from .labels import LabelSet
from .tries import ROOT, Ints, Trie, build_trie
from .types import Message, Prediction


@dataclass(frozen=True, eq=False)
class Lines:
    """The tokens of an answer's parts: its start up to the first number, the numbers, and the names as they end lines.

    A line is cut after its number and before the space, and after its end: a tokenizer that splits words by spaces makes
    the same tokens of the parts as of the whole.
    """

    start: list[int]
    inside: Trie  # names with a line end after them
    last: Trie  # names with the end of the turn after them
    through: tuple[Ints, Ints]  # how many names go through each node of the two
    names: tuple[Ints, Ints]  # and the name that ends in each

    def trie(self, is_last: bool) -> Trie:
        return self.last if is_last else self.inside


@lru_cache(maxsize=8)
def lines_of(tokenizer: ChatTokenizer, names: tuple[str, ...], kind: str) -> Lines:
    """The parts of a list of these names."""
    end = tokenizer.special("<|eot_id|>")
    inside = build_trie(tokenizer.encode_all([f" {name.strip()}\n" for name in names]))
    last = build_trie([[*ids, end] for ids in tokenizer.encode_all([f" {name.strip()}" for name in names])])
    start = tokenizer.encode(heading(kind) + line_start(1).rstrip(" "))
    tries = inside, last
    through = inside.texts_below(), last.texts_below()
    return Lines(start, *tries, through, names=(inside.text_at(), last.text_at()))


@dataclass(slots=True)
class _Walk:
    """One list on its way: what is written, what of it is scored, and which names are left."""

    tokenizer: ChatTokenizer
    lines: Lines
    weight: Tensor
    count: int
    chosen: list[int] = field(default_factory=list)
    scored: list[tuple[int, int, int]] = field(default_factory=list)  # (source token, token, line)
    length: int = 0  # tokens written so far

    def __iter__(self) -> Generator[list[int], Tensor, None]:
        """Yields tokens to be read, and is sent the hidden state (D,) of the last of them."""
        pending = list(self.lines.start)
        self.length = len(pending)
        for line in range(self.count):
            trie, left = self.lines.trie(line == self.count - 1), self._left(line == self.count - 1)
            node = ROOT
            while node == ROOT or trie.end[node] > node + 1:
                options = trie.children(node)
                options = options[left[options] > 0]
                at = 0
                if len(options) > 1:
                    hidden = yield pending
                    pending = []
                    at = int(logits_of(hidden, self.weight, trie.token[options]).argmax())
                node = int(options[at])
                self._write(pending, int(trie.token[node]), line)
            self.chosen.append(int(self.lines.names[line == self.count - 1][node]))
            if line + 1 < self.count:
                number = self.tokenizer.encode(line_start(line + 2).strip())
                pending += number
                self.length += len(number)
        yield pending[:-1]

    def _write(self, pending: list[int], token: int, line: int) -> None:
        self.scored.append((self.length - 1, token, line))
        self.length += 1
        pending.append(token)

    def _left(self, is_last: bool) -> Ints:
        """How many names that are not yet chosen go through each node."""
        trie, left = self.lines.trie(is_last), self.lines.through[is_last].copy()
        for name in self.chosen:
            left[trie.path(int(trie.leaf[name]))] -= 1
        return left


@dataclass(frozen=True)
class Lister:
    """A decoder and a closed set of names, ready to list the k that fit a case; threads may share it."""

    decoder: Decoder
    known: LabelSet
    kind: str = "disease"

    @torch.inference_mode()
    def write(self, case: str, messages: Sequence[Message], k: int, images: Sequence[Any] = ()) -> Prediction:
        """The list of one case: its names in order, each line's log-probability given all before it, and the text."""
        tokenizer, weight = self.decoder.tokenizer, head_weight(self.decoder.network)
        walk = _Walk(tokenizer, lines_of(tokenizer, self.known.labels, self.kind), weight, min(k, len(self.known)))
        prompt = tokenizer.chat_ids(messages, generate=True)
        trunk = Trunks(self.decoder.looking([prompt], [images]), [prompt], self.decoder.device)
        states = _follow(trunk, iter(walk))
        source, token, line = (np.array(part) for part in zip(*walk.scored, strict=True))
        edges = edge_logp(states[None], weight, source, token)[0]
        logp = edges.new_zeros(walk.count).index_add(0, torch.from_numpy(line), edges).tolist()
        names = [self.known.labels[name] for name in walk.chosen]
        entries = (
            {"label": name, "logprob": value, "probability": math.exp(value)}
            for name, value in zip(names, logp, strict=True)
        )
        text = heading(self.kind) + "".join(line_start(place) + name for place, name in enumerate(names, 1))
        return Prediction(case, tuple(entries), text)


def _follow(trunk: Trunks, walk: Generator[list[int], Tensor, None]) -> Tensor:
    """Read what a walk writes, step by step, until it is done: the hidden states (n, D) of all that was read."""
    states: list[Tensor] = []
    written = 0
    tokens = next(walk, None)
    while tokens is not None:
        position = torch.arange(len(tokens)) + trunk.lengths[0] + written
        ends = torch.full((len(tokens),), len(tokens))
        layout = blocks.moved(blocks.tree_blocks(ends), (slice(0, trunk.size),), trunk.size, 0)
        if tokens:
            states.append(trunk.run(torch.tensor(tokens), position, layout, keep=True))
        written += len(tokens)
        try:
            tokens = walk.send(states[-1][-1])
        except StopIteration:
            tokens = None
    return torch.cat(states)
