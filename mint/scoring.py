"""The exact log-probability of every label of a closed set: the prompt is a trunk, the labels a trie on it.

Every token that labels share is computed once, and the vocabulary is met once at each inner node of the trie, however
many labels go on from there. Shapes: C labels, U inner nodes, E edges, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .decoders import Decoder, lora
from .kernels import row_logsumexp
from .trees import Text, token_tree
from .types import Message, Prediction, TokenTree

NORMALISATIONS = ("sum", "mean")
_EDGES = 4096  # rows of the head gathered together


@dataclass(frozen=True, slots=True)
class Ranker:
    """A decoder and a closed set of labels, ready for one case after another.

    `normalise`: "sum" ranks by log p(label and end of turn | prompt), "mean" by that over the label's tokens.
    With `opening` (how an answer begins) the label is the first of a list: log p(opening, label and end of line | prompt).
    """

    decoder: Decoder
    labels: Sequence[str]
    normalise: str = "sum"
    opening: str = ""

    def answers(self) -> list[list[int]]:
        """The ids of each label with its end of turn, as they follow an open assistant turn."""
        tokenizer = self.decoder.tokenizer
        if self.opening:
            return tokenizer.encode_all([f"{self.opening}{label.strip()}\n" for label in self.labels])
        end = tokenizer.special("<|eot_id|>")
        return [[*ids, end] for ids in tokenizer.encode_all([label.strip() for label in self.labels])]

    @torch.inference_mode()
    def logp(self, prompt: Sequence[int], images: Sequence[Any] = ()) -> Tensor:
        """Log-probability of each label after the prompt: (C,) float32. All labels see the prompt's images."""
        tree = token_tree([Text([*prompt, *answer], len(prompt)) for answer in self.answers()], tuple(images))
        sums = tree.to(self.decoder.device).path_sums(edge_logp(self.decoder, tree))
        return sums / tree.path_lengths().to(sums) if self.normalise == "mean" else sums

    def rank(
        self, case: str, messages: Sequence[Message], top: int | None = None, images: Sequence[Any] = ()
    ) -> Prediction:
        """The labels of one case, best first, with log-probability and probability over the whole set."""
        logp = self.logp(self.decoder.tokenizer.chat_ids(messages, generate=True), images).cpu()
        shares = logp.softmax(dim=0).tolist()
        order = sorted(range(len(self.labels)), key=lambda c: (-logp[c].item(), c))[:top]
        entries = ({"label": self.labels[c], "logprob": logp[c].item(), "probability": shares[c]} for c in order)
        return Prediction(case, tuple(entries))


def edge_logp(decoder: Decoder, tree: TokenTree) -> Tensor:
    """Log-probability of each scored edge: (E,). A node's logsumexp over the vocabulary is shared by all its edges."""
    tree = tree.to(decoder.device)
    nodes, at = tree.sources.unique(return_inverse=True)
    rows, head = decoder.hidden(tree).index_select(0, nodes), decoder.network.lm_head
    weight = head.merged() if isinstance(head, lora.LoRALinear) and head.enabled else head.weight
    total = row_logsumexp(rows, weight)
    own = torch.cat([_dots(rows, weight, at[e], tree.labels[e]) for e in _pieces(len(at))])
    return (own - total[at]).clamp(max=0.0)


def _pieces(count: int) -> Iterator[slice]:
    yield from (slice(first, first + _EDGES) for first in range(0, max(count, 1), _EDGES))


def _dots(rows: Tensor, weight: Tensor, at: Tensor, labels: Tensor) -> Tensor:
    """The logits of the labels alone: (E,) float32."""
    return (rows[at].float() * weight[labels].float()).sum(dim=-1)


def rank_all(ranker: Ranker, cases: Iterable[tuple[str, Sequence[Message]]], top: int | None) -> Iterator[Prediction]:
    """The ranking of every case, as it comes."""
    for case, messages in cases:
        yield ranker.rank(case, messages, top)
