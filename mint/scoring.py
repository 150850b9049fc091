"""The exact log-probability of every label of a closed set: the prompt is a trunk, the labels a trie on it.

Every token that labels share is computed once, and the vocabulary is met once at each inner node of the trie, however
many labels go on from there. The trie is made once for a set of labels. A large one is scored in pieces, and of small
ones several cases go through the network together. Shapes: B cases, C labels, N nodes, E edges, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .chat import ChatTokenizer
from .decoders import Decoder
from .decoders.heads import edge_logp, head_weight
from .decoders.trunks import Trunks
from .errors import ConfigError, WorkError
from .kernels import blocks
from .progress import progress
from .search import best_first
from .tries import ROOT, Piece, Texts, Trie, build_trie, pieces
from .types import Message, Prediction

NORMALISATIONS = ("sum", "mean", "prior")
PIECE = 4096
"""Tokens of a trie that go through the network together."""

Case = tuple[str, Sequence[Message], Sequence[Any]]
"""A case's id, its conversation, and the images of that."""
_Asked = tuple[str, list[int], Sequence[Any]]


@dataclass(frozen=True, eq=False)
class Layout:
    """What is known of a set of labels before any case: its opening, its trie, and the pieces that are computed."""

    opening: tuple[int, ...]  # tokens between the open turn and the labels
    trie: Trie
    lengths: Tensor  # (C,) tokens of each label with its end
    queries: int = blocks.QUERIES  # of a block of attention

    @cached_property
    def levels(self) -> list[tuple[Tensor, Tensor]]:
        """The nodes of each depth from the second on, and their parents."""
        order = np.argsort(self.trie.depth, kind="stable")
        stops = np.searchsorted(self.trie.depth[order], np.arange(1, self.trie.depth.max() + 2))
        return [
            (torch.from_numpy(nodes), torch.from_numpy(self.trie.parent[nodes]))
            for nodes in np.split(order, stops)[1:-1]
        ]

    @cached_property
    def small(self) -> tuple[Piece, tuple[blocks.Block, ...]] | None:
        """The one piece of a small trie and its blocks, to be used case after case."""
        found = [(piece, self.blocks(piece)) for piece in pieces(self.trie, PIECE)] if self.size <= PIECE else []
        return found[0] if found else None

    @cached_property
    def size(self) -> int:
        """Tokens that have to be computed."""
        return len(self.trie.inner())

    def pieces(self) -> Iterator[tuple[Piece, tuple[blocks.Block, ...]]]:
        if self.small is not None:
            yield self.small
        else:
            yield from ((piece, self.blocks(piece)) for piece in pieces(self.trie, PIECE))

    def blocks(self, piece: Piece) -> tuple[blocks.Block, ...]:
        return blocks.tree_blocks(torch.from_numpy(piece.end), self.queries)


@lru_cache(maxsize=8)
def layout_of(
    tokenizer: ChatTokenizer, labels: tuple[str, ...], opening: str, alone: bool = False, queries: int = blocks.QUERIES
) -> Layout:
    """The trie of `opening + label` and end of line, less the tokens that the opening has for itself; without an opening,
    or where the label is `alone` on its list, it ends with the turn."""
    if opening and not alone:
        texts = Texts.of(tokenizer.encode_all(f"{opening}{label.strip()}\n" for label in labels))
    else:
        end = tokenizer.special("<|eot_id|>")
        texts = Texts.of([*ids, end] for ids in tokenizer.encode_all(opening + label.strip() for label in labels))
    start = tokenizer.encode(opening.rstrip()) if opening else []
    own = texts.after(texts.shared(start))
    return Layout(tuple(start[: texts.shared(start)]), build_trie(own), torch.from_numpy(own.lengths), queries)


@dataclass(frozen=True)
class Ranker:
    """A decoder and a closed set of labels, ready for one case after another; threads may share it.

    `normalise`: "sum" ranks by log p(label and its end | prompt, opening), "mean" by that over the label's tokens,
    "prior" by that less what it is after `empty`, a case of which nothing is known. A label ends with the turn; with
    `opening` (how an answer begins) it is the first of a list and ends with its line, or the only one of a list (`alone`)
    and ends with the turn.
    """

    decoder: Decoder
    labels: Sequence[str]
    normalise: str = "sum"
    opening: str = ""
    empty: Case | None = None
    alone: bool = False
    layout: Layout = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.normalise not in NORMALISATIONS:
            raise ConfigError(f"normalise is {self.normalise!r}; wanted one of {', '.join(NORMALISATIONS)}")
        if self.normalise == "prior" and self.empty is None:
            raise ConfigError("normalise is 'prior'; it needs the prompt of an empty case")
        if not self.labels:
            raise ConfigError("no labels to rank; at least one is wanted")
        queries = blocks.ON_GPU if self.decoder.device.type == "cuda" else blocks.QUERIES
        layout = layout_of(self.decoder.tokenizer, tuple(self.labels), self.opening, self.alone, queries)
        object.__setattr__(self, "layout", layout)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """What stands before the labels: the conversation, an open turn of the assistant, and the opening."""
        return [*self.decoder.tokenizer.chat_ids(messages, generate=True), *self.layout.opening]

    @torch.inference_mode()
    def logp(self, prompts: Sequence[Sequence[int]], images: Sequence[Sequence[Any]] | None = None) -> Tensor:
        """Log-probability of each label after each prompt: (B, C) float32. All labels see the images of their prompt."""
        layout, weight, trie = self.layout, head_weight(self.decoder.network), self.layout.trie
        trunks = Trunks(self.decoder.looking(prompts, images), prompts, self.decoder.device)
        nodes = torch.zeros(len(prompts), len(trie), dtype=torch.float64)  # of each node after its parent
        begin = trie.children(ROOT)
        nodes[:, begin] = edge_logp(trunks.last[:, None], weight, np.zeros_like(begin), trie.token[begin])
        parts = layout.pieces()
        if layout.small is None:
            parts = progress(parts, "scoring labels", -(-layout.size // PIECE), f"part of {PIECE} token")
        for piece, own in parts:
            hidden = _run_piece(trunks, piece, own)[:, piece.again :]
            nodes[:, piece.child] = edge_logp(hidden, weight, piece.source - piece.again, piece.token)
        for level, parents in layout.levels:
            nodes[:, level] += nodes[:, parents]
        self._check_numbers(bool(nodes.isnan().any()))
        return nodes[:, trie.leaf].float()

    def scores(self, logp: Tensor) -> Tensor:
        """What the labels are ranked by: (B, C) -> (B, C)."""
        if self.normalise == "mean":
            return logp / self.layout.lengths
        return logp - self.prior if self.normalise == "prior" else logp

    @cached_property
    def prior(self) -> Tensor:
        """Log-probability of each label after the empty case: (C,)."""
        assert self.empty is not None  # seen to when the ranker was made
        _, messages, images = self.empty
        return self.logp([self.prompt(messages)], [images])[0]

    def rank(
        self, case: str, messages: Sequence[Message], top: int | None = None, images: Sequence[Any] = ()
    ) -> Prediction:
        """The labels of one case, best first, with log-probability and probability over the whole set."""
        return next(self.rank_all([(case, messages, images)], top))

    def rank_all(self, cases: Iterable[Case], top: int | None = None) -> Iterator[Prediction]:
        """The ranking of every case, in their order; small ones go through the network together.

        The first few of a large set are searched for best first; that gives the same labels and log-probabilities.
        """
        if top is not None and self.normalise == "sum" and self.layout.size > PIECE and top * 8 <= len(self.labels):
            yield from (self.best(case, messages, top, images) for case, messages, images in cases)
            return
        for group in self._groups((case, self.prompt(messages), images) for case, messages, images in cases):
            logp = self.logp([prompt for _, prompt, _ in group], [images for _, _, images in group])
            scores = self.scores(logp)
            for (case, _, _), own, score in zip(group, logp, scores, strict=True):
                yield Prediction(case, self._entries(own, score, top))

    @torch.inference_mode()
    def best(self, case: str, messages: Sequence[Message], top: int, images: Sequence[Any] = ()) -> Prediction:
        """The first labels of one case by best-first search; where the model prefers none, by the full ranking.

        Labels that were never reached count towards the probabilities with the most that they can have, so that the
        probability of an entry is never stated too high.
        """
        prompt, weight = self.prompt(messages), head_weight(self.decoder.network)
        trunk = Trunks(self.decoder.looking([prompt], [images]), [prompt], self.decoder.device)
        found = best_first(trunk, weight, self.layout.trie, top)
        if found is None:
            logp = self.logp([prompt], [images])[0]
            return Prediction(case, self._entries(logp, logp, top))
        self._check_numbers(math.isnan(found.total))
        entries = zip(found.texts, found.logp, strict=True)
        return Prediction(
            case,
            tuple(
                {"label": self.labels[c], "logprob": value, "probability": math.exp(value - found.total)}
                for c, value in entries
            ),
        )

    def _check_numbers(self, wrong: bool) -> None:
        if wrong:
            name = self.decoder.checkpoint.name
            raise WorkError(
                f"{name}: gives log-probabilities that are no numbers; look for NaN in its weights, or give --dtype float32"
            )

    def _groups(self, cases: Iterable[_Asked]) -> Iterator[list[_Asked]]:
        """Cases whose prompts, pictures and tries together have at most PIECE tokens, or one by one."""
        group: list[_Asked] = []
        tokens = 0
        for case, prompt, images in cases:
            need = len(prompt) + len(images) * self.decoder.picture_tokens + self.layout.size
            if group and tokens + need > PIECE:
                yield group
                group, tokens = [], 0
            group.append((case, prompt, images))
            tokens += need
        if group:
            yield group

    def _entries(self, logp: Tensor, score: Tensor, top: int | None) -> tuple[dict[str, Any], ...]:
        shares = score.double().softmax(dim=0)
        order = score.sort(descending=True, stable=True).indices[:top].tolist()
        return tuple(
            {"label": self.labels[c], "logprob": logp[c].item(), "probability": shares[c].item()} for c in order
        )


def _run_piece(trunks: Trunks, piece: Piece, own: tuple[blocks.Block, ...]) -> Tensor:
    """Hidden states of a piece after each of the prompts: (B, n, D)."""
    count, prompts = len(piece.ids), len(trunks.runs)
    depth = torch.from_numpy(piece.depth)
    layout = [
        block
        for case, run in enumerate(trunks.runs)
        for block in blocks.moved(own, (run,), trunks.size + case * count, case * count)
    ]
    position = torch.cat([depth + length for length in trunks.lengths])
    hidden = trunks.run(torch.from_numpy(piece.ids).repeat(prompts), position, tuple(layout))
    return hidden.view(prompts, count, -1)
