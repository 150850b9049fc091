"""Which token sees which picture, and attention of the one to the other, picture by picture and without a mask.

Shapes: N tokens, H heads, K key-value heads, G query heads of a key-value head, d head width, D width, S patches of all
pictures, one after another, the tiles that a picture has before those that it has not.

A token sees the last run of pictures that stands before it in its text, up to itself. What stands before the first
picture sees, as transformers has it, all tiles of all pictures of its text, absent tiles too, and skips the perceptron
that follows; by Meta's own rule it sees nothing. Absent tiles are seen by no other token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..transfer import sent

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [first, stop) see these pictures, numbered by their tokens; `before` their first one, all tiles of them.

    `ends` marks the last span of a text.
    """

    first: int
    stop: int
    pictures: tuple[int, ...]
    before: bool = False
    ends: bool = False


def read_spans(ids: Tensor, end: Tensor, position: Tensor, image_token: int, meta_masking: bool) -> list[Span]:
    """The spans of a forest, in order; every token is in one of them."""
    marks = (ids == image_token).nonzero().flatten().tolist()
    roots = (position == 0).nonzero().flatten().tolist()
    spans: list[Span] = []
    for first, stop in zip(roots, [*roots[1:], len(ids)], strict=True):
        own = [number for number, mark in enumerate(marks) if first <= mark < stop]
        spans += _text_spans(first, stop, own, marks, meta_masking)
        if own and bool((end[first : marks[own[-1]] + 1] != stop).any()):
            raise ConfigError("an image token on a branch of a tree; the pictures of a tree belong on its trunk")
    return spans


def _text_spans(first: int, stop: int, own: list[int], marks: list[int], meta_masking: bool) -> list[Span]:
    """The spans of one tree, whose tokens are [first, stop) and whose pictures have the numbers `own`."""
    if not own:
        return [Span(first, stop, (), ends=True)]
    begin = marks[own[0]]
    spans = [Span(first, begin, () if meta_masking else tuple(own), before=True)] if begin > first else []
    run: tuple[int, ...] = ()
    for number in own:
        consecutive = bool(run) and marks[number] == marks[number - 1] + 1
        run = (*run, number) if consecutive else (number,)
        ends = number == own[-1]
        spans.append(Span(marks[number], stop if ends else marks[number + 1], run, ends=ends))
    return spans


@dataclass(slots=True)
class Sight:
    """What the tokens of a line see: states (S, D), the rows that a picture has of them, and the spans of the line."""

    states: Tensor
    real: Sequence[slice]  # of each picture, the patches of the tiles that it has
    whole: Sequence[slice]  # and of all its tiles, where a token sees them all
    spans: Sequence[Span]
    kept: dict[int, Pair] = field(default_factory=dict)
    marks: Tensor | None = None  # what `after_image` gives to all layers

    def keys_values(self, layer: int, make: Callable[[Tensor], Pair]) -> Pair:
        """The keys and values (K, S, d) of a layer, made once for all tokens and all steps."""
        if layer not in self.kept:
            self.kept[layer] = make(self.states)
        return self.kept[layer]

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q (N, H, d), keys and values (K, S, d) -> (N, H, d), zero where a token sees nothing."""
        return torch.cat([self._attend(q[span.first : span.stop], keys, values, span) for span in self.spans])

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        if not span.pictures:
            return torch.zeros_like(q)
        rows = [(self.whole if span.before else self.real)[picture] for picture in span.pictures]
        grouped = q.unflatten(1, (len(keys), -1)).permute(1, 2, 0, 3)  # (K, G, n, d): a group's queries are one block
        out = F.scaled_dot_product_attention(grouped.flatten(1, 2)[None], _rows(keys, rows), _rows(values, rows))[0]
        heads: Tensor = out.unflatten(1, (-1, len(q))).permute(2, 0, 1, 3).flatten(1, 2)
        return heads

    def after_image(self, x: Tensor) -> Tensor:
        """1 for the tokens that stand after a picture, else 0: (N, 1) like x."""
        if self.marks is None:
            each = [float(bool(span.pictures) and not span.before) for span in self.spans]
            counts = torch.tensor([span.stop - span.first for span in self.spans])
            self.marks = sent(torch.tensor(each, dtype=x.dtype).repeat_interleave(counts)[:, None], x.device)
        return self.marks

    def following(self, tokens: int) -> Sight:
        """What so many more tokens see, the same number after each text: what the last token of the text sees."""
        last = [span for span in self.spans if span.ends]
        count = tokens // len(last)
        spans = [replace(span, first=row * count, stop=(row + 1) * count) for row, span in enumerate(last)]
        return replace(self, spans=spans, marks=None)


def _rows(x: Tensor, rows: Sequence[slice]) -> Tensor:
    """(K, S, d) -> (1, K, s, d)."""
    return (x[:, rows[0]] if len(rows) == 1 else torch.cat([x[:, part] for part in rows], dim=1))[None]
