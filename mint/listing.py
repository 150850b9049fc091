"""The aligned list, decoded greedily under the trie of a closed set: exactly k names of the set, none twice, by construction.

What the form or the trie leaves no choice about (the heading, numbers, line ends, the rest of a name that has begun) is
not asked of the model but read together with what comes next. So is what looks likely to be chosen next: a pass waits for
the weights, and a few more tokens in it cost less than a pass of their own. Shapes: D width, V vocabulary, E edges.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .answers import heading, line_start
from .chat import ChatTokenizer
from .decoders import Decoder
from .decoders.branches import Token, read
from .decoders.heads import edge_logp, head_weight, logits_of
from .decoders.trunks import Trunks
from .labels import LabelSet
from .tries import ROOT, Ints, Texts, Trie, build_trie
from .types import Message, Prediction

AHEAD = 12
"""Tokens of a pass that may turn out not to be written."""
LEAST = 0.1
"""What looks less likely than this is not read ahead."""


@dataclass(frozen=True, eq=False)
class Lines:
    """The tokens of an answer's parts: its start up to the first number, the numbers, and the names as they end lines.

    A line is cut where the tokenizer cuts it, after its number and before the space or after the space, and after its
    end: then the parts have the same tokens as the whole.
    """

    start: list[int]
    gap: str  # what a number ends with: nothing, or the space where its token has it
    inside: Trie  # names with a line end after them
    last: Trie  # names with the end of the turn after them
    through: tuple[Ints, Ints]  # how many names go through each node of the two
    names: tuple[Ints, Ints]  # and the name that ends in each

    def trie(self, is_last: bool) -> Trie:
        return self.last if is_last else self.inside


@lru_cache(maxsize=8)
def lines_of(tokenizer: ChatTokenizer, names: tuple[str, ...], kind: str) -> Lines:
    """The parts of a list of these names."""
    end, bare, number = (
        tokenizer.special("<|eot_id|>"),
        line_start(1).rstrip(),
        tokenizer.encode(line_start(1).rstrip()),
    )
    gap = "" if tokenizer.encode(line_start(1) + "A")[: len(number)] == number else " "
    texts = [f"{' ' if not gap else ''}{name.strip()}" for name in names]
    inside = build_trie(Texts.of(tokenizer.encode_all(f"{text}\n" for text in texts)))
    last = build_trie(Texts.of([*ids, end] for ids in tokenizer.encode_all(texts)))
    start = tokenizer.encode(heading(kind) + bare + gap)
    tries = inside, last
    through = inside.texts_below(), last.texts_below()
    return Lines(start, gap, *tries, through, names=(inside.text_at(), last.text_at()))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a list stands: its last token, the names it has, and the node that the name under way has come to."""

    token: Token
    chosen: tuple[int, ...] = ()
    node: int = ROOT
    name: tuple[int, ...] = ()  # the tokens down to that node


@dataclass(frozen=True)
class _Form:
    """What may follow in a list of `count` names."""

    tokenizer: ChatTokenizer
    lines: Lines
    count: int

    def ends(self, place: _Place) -> bool:
        return len(place.chosen) == self.count

    def options(self, place: _Place) -> tuple[Ints, Ints]:
        """The nodes that may follow, and how many names not yet chosen go through each."""
        is_last = len(place.chosen) == self.count - 1
        trie = self.lines.trie(is_last)
        nodes = trie.children(place.node)
        left = self.lines.through[is_last][nodes]
        for name in place.chosen:
            leaf = trie.leaf[name]
            left -= (nodes <= leaf) & (leaf < trie.end[nodes])
        return nodes[left > 0], left[left > 0]

    def tokens(self, place: _Place, nodes: Ints) -> Ints:
        found: Ints = self.lines.trie(len(place.chosen) == self.count - 1).token[nodes]
        return found

    def follow(self, place: _Place) -> _Place:
        """The next place where there is a choice, or the list's end."""
        while not self.ends(place):
            nodes, _ = self.options(place)
            if len(nodes) > 1:
                break
            place = self.choose(place, int(nodes[0]))
        return place

    def choose(self, place: _Place, node: int) -> _Place:
        """The place after a node; where a name ends there, that after the number of the next line."""
        line = len(place.chosen)
        is_last = line == self.count - 1
        trie = self.lines.trie(is_last)
        own = int(trie.token[node])
        token = place.token.then([own], line)
        if trie.end[node] > node + 1:
            return replace(place, token=token, node=node, name=(*place.name, own))
        number = [] if is_last else self.tokenizer.encode(line_start(line + 2).strip() + self.lines.gap)
        return _Place(token.then(number), (*place.chosen, int(self.lines.names[is_last][node])))


@dataclass
class _Walk:
    """The writing of one list."""

    form: _Form
    trunk: Trunks
    weight: Tensor
    said: dict[tuple[int, ...], dict[int, float]] = field(default_factory=dict)  # the logits after the start of a name

    def last(self) -> _Place:
        """The place at the list's end, when each choice is the likeliest; all that it takes to score it is read."""
        place = self.form.follow(_Place(Token().then(self.form.lines.start)))
        while not self.form.ends(place):
            if place.token.state is None:
                read(self.trunk, self._tokens(place))
            place = self.form.follow(self.form.choose(place, self._likeliest(place)))
        assert place.token.above is not None
        if unread := place.token.above.unread():
            read(self.trunk, unread)
        return place

    def _likeliest(self, place: _Place) -> int:
        """The node that the model prefers."""
        nodes, _ = self.form.options(place)
        tokens = self.form.tokens(place, nodes)
        assert place.token.state is not None
        logits = logits_of(place.token.state, self.weight, tokens)
        self.said[place.name] = dict(zip(tokens.tolist(), logits.tolist(), strict=True))
        return int(nodes[int(logits.argmax())])

    def _tokens(self, place: _Place) -> list[Token]:
        """What has to be read up to a place, and what may well follow it, the likeliest first."""
        found = dict.fromkeys(place.token.unread())
        most, numbers = len(found) + AHEAD, itertools.count()
        left = [(-1.0, next(numbers), place)]
        while left and len(found) < most:
            likely, _, place = heapq.heappop(left)
            found.update(dict.fromkeys(place.token.unread()))
            for node, share in [] if self.form.ends(place) else self._guesses(place):
                if -likely * share >= LEAST:
                    after = self.form.follow(self.form.choose(place, node))
                    heapq.heappush(left, (likely * share, next(numbers), after))
        return list(found)

    def _guesses(self, place: _Place) -> list[tuple[int, float]]:
        """The nodes that may follow, with how likely each looks before the model is asked: the more names it leads to; or,
        where the model was asked the same in an earlier line, half of the time its first choice, then the second, ..."""
        nodes, left = self.form.options(place)
        said = self.said.get(place.name)
        if said is None:
            return list(zip(nodes.tolist(), (left / left.sum()).tolist(), strict=True))
        tokens = self.form.tokens(place, nodes).tolist()
        order = sorted(range(len(tokens)), key=lambda at: -said.get(tokens[at], -math.inf))
        return [(int(nodes[at]), 0.5**rank) for rank, at in enumerate(order[:4], 1)]


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
        lines, count = lines_of(tokenizer, self.known.labels, self.kind), min(k, len(self.known))
        prompt = tokenizer.chat_ids(messages, generate=True)
        trunk = Trunks(self.decoder.looking([prompt], [images]), [prompt], self.decoder.device)
        place = _Walk(_Form(tokenizer, lines, count), trunk, weight).last()
        logp = _line_logp(place.token, weight, count)
        names = [self.known.labels[name] for name in place.chosen]
        entries = (
            {"label": name, "logprob": value, "probability": math.exp(value)}
            for name, value in zip(names, logp, strict=True)
        )
        text = heading(self.kind) + "".join(line_start(place) + name for place, name in enumerate(names, 1))
        return Prediction(case, tuple(entries), text)


def _line_logp(last: Token, weight: Tensor, count: int) -> list[float]:
    """The log-probability of each name given all before it, from the states of a list that is read."""
    scored = [token for token in last.path() if token.part >= 0]
    states = torch.stack([token.above.state for token in scored if token.above and token.above.state is not None])
    edges = edge_logp(states[None], weight, np.arange(len(scored)), np.array([token.id for token in scored]))[0]
    lines = torch.tensor([token.part for token in scored])
    found: list[float] = edges.new_zeros(count).index_add(0, lines, edges).tolist()
    return found
