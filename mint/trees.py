"""Texts that begin alike become one tree of tokens, and trees become one line of tokens: no token is computed twice.

Texts of a prompt and its answers (or of a prompt and a closed set of labels) share everything up to where they part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import ConfigError
from .types import TokenTree


class Text(NamedTuple):
    """A text to be scored: the log-probabilities of `ids[first:]`, each given all ids before it; first is at least 1."""

    ids: Sequence[int]
    first: int = 1


def token_tree(texts: Sequence[Text], images: tuple[Any, ...] = ()) -> TokenTree:
    """The trie of the texts in depth-first order; path p is texts[p]. A token that nothing follows is only a label."""
    if any(text.first < 1 for text in texts):
        raise ConfigError(
            "a text is scored from its first token, which has nothing before it; let `first` be at least 1"
        )
    order = sorted(range(len(texts)), key=lambda p: list(texts[p].ids))
    nodes: list[int] = []  # the token of each node
    parents: list[int] = []
    line: list[int] = []  # the nodes of the text before
    lines: dict[int, list[int]] = {}
    before: Sequence[int] = ()
    for p in order:
        ids = texts[p].ids
        same = shared(before, ids)
        line = line[:same]
        for token in ids[same:]:
            parents.append(line[-1] if line else -1)
            line.append(len(nodes))
            nodes.append(int(token))
        lines[p], before = line, ids
    return _assemble(nodes, parents, [(lines[p], texts[p].first) for p in range(len(texts))], images)


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens two texts share."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))


def _assemble(
    nodes: list[int], parents: list[int], lines: list[tuple[list[int], int]], images: tuple[Any, ...]
) -> TokenTree:
    """Numbers the nodes that have a child as tokens, and the scored edges; an edge is named by the node it leads to."""
    last = list(range(len(nodes)))  # the last node below each node
    for child in range(len(nodes) - 1, -1, -1):
        if parents[child] >= 0:
            last[parents[child]] = max(last[parents[child]], last[child])
    node, parent, deepest = (torch.tensor(x, dtype=torch.int64) for x in (nodes, parents, last))
    inner = deepest > torch.arange(len(nodes))
    number = torch.cat([inner.new_zeros(1, dtype=torch.int64), inner.cumsum(0)])  # tokens before each node
    scored = [torch.tensor(line[first:], dtype=torch.int64) for line, first in lines]
    edges, members = torch.cat([*scored, deepest[:0]]).unique(return_inverse=True)
    counts = torch.tensor([len(line) for line in scored], dtype=torch.int64)
    return TokenTree(
        ids=node[inner],
        end=number[deepest[inner] + 1],
        position=_depths(parents)[inner],
        sources=number[parent[edges]],
        labels=node[edges],
        member_edges=members,
        member_paths=torch.arange(len(lines)).repeat_interleave(counts),
        paths=len(lines),
        images=images,
    )


def _depths(parents: list[int]) -> Tensor:
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return torch.tensor(depths, dtype=torch.int64)


def sequence(ids: Sequence[int] | Tensor) -> TokenTree:
    """One plain text with all its tokens: a causal row, scored from its second token on."""
    ids = torch.as_tensor(ids, dtype=torch.int64)
    count = ids.shape[0]
    edges = torch.arange(max(count - 1, 0))
    return TokenTree(
        ids=ids,
        end=torch.full((count,), count),
        position=torch.arange(count),
        sources=edges,
        labels=ids[1:],
        member_edges=edges,
        member_paths=torch.zeros_like(edges),
        paths=1,
    )


def without_label(tree: TokenTree, label: int) -> TokenTree:
    """The tree without the edges that lead to one kind of token, such as an image's, which is fed and never predicted."""
    kept = tree.labels != label
    number = kept.cumsum(0) - 1
    members = kept[tree.member_edges]
    return replace(
        tree,
        sources=tree.sources[kept],
        labels=tree.labels[kept],
        member_edges=number[tree.member_edges[members]],
        member_paths=tree.member_paths[members],
    )


def forest(trees: Sequence[TokenTree]) -> TokenTree:
    """Several trees on one line, none seeing another; their paths are numbered on."""
    tokens = _offsets([len(tree) for tree in trees])
    edges = _offsets([len(tree.sources) for tree in trees])
    paths = _offsets([tree.paths for tree in trees])

    def joined(name: str, offsets: Sequence[int] | None = None) -> Tensor:
        parts = [getattr(tree, name) for tree in trees] or [torch.zeros(0, dtype=torch.int64)]
        return torch.cat(parts if offsets is None else [x + o for x, o in zip(parts, offsets, strict=False)])

    return TokenTree(
        ids=joined("ids"),
        end=joined("end", tokens),
        position=joined("position"),
        sources=joined("sources", tokens),
        labels=joined("labels"),
        member_edges=joined("member_edges", edges),
        member_paths=joined("member_paths", paths),
        paths=paths[-1],
        images=tuple(image for tree in trees for image in tree.images),
    )


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Running sums with a leading zero: [2, 3] -> [0, 2, 5]."""
    total = [0]
    for size in sizes:
        total.append(total[-1] + size)
    return total
