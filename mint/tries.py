"""A closed set of texts as a trie: every start that texts share is one node, and nodes lie in depth-first order.

Shapes: C texts, N nodes, n tokens of a piece, E edges. The root has no node of its own: it is the last token of the
prompt that the texts follow, and its number is -1.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
ROOT = -1


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Texts in one array, where a million take a tenth of what lists would: `flat[starts[c] : starts[c] + lengths[c]]`."""

    flat: NDArray[np.int32]
    starts: Ints  # (C,)
    lengths: Ints  # (C,)

    @classmethod
    def of(cls, texts: Iterable[Sequence[int]]) -> Texts:
        flat, lengths = array("i"), array("q")
        for text in texts:
            flat.extend(text)
            lengths.append(len(text))
        count = np.array(lengths, dtype=np.int64)
        return cls(np.array(flat, dtype=np.int32), count.cumsum() - count, count)

    def shared(self, start: Sequence[int]) -> int:
        """How many leading tokens of `start` all texts begin with."""
        for count, token in enumerate(start):
            if self.lengths.min() <= count or (self.flat[self.starts + count] != token).any():
                return count
        return len(start)

    def after(self, count: int) -> Texts:
        """The texts without the first `count` tokens of each."""
        return Texts(self.flat, self.starts + count, self.lengths - count)


@dataclass(frozen=True, slots=True, eq=False)
class Trie:
    """Nodes in depth-first order. The children of node v are `child[first[v + 1] : first[v + 2]]`."""

    token: Ints  # (N,)
    parent: Ints  # (N,), ROOT where a text begins
    depth: Ints  # (N,)
    end: Ints  # (N,) the number just past the last node below
    leaf: Ints  # (C,) the last node of each text
    child: Ints  # (N,) the nodes by their parents
    first: Ints  # (N + 2,)

    def __len__(self) -> int:
        return len(self.token)

    def children(self, node: int) -> Ints:
        """The nodes that follow a node, or that texts begin with."""
        found: Ints = self.child[self.first[node + 1] : self.first[node + 2]]
        return found

    def inner(self) -> Ints:
        """The nodes that something follows: those that a network has to compute."""
        found: Ints = np.nonzero(self.end > np.arange(1, len(self) + 1))[0]
        return found

    def texts_below(self) -> Ints:
        """How many texts go through each node: (N,)."""
        ends = np.zeros(len(self) + 1, dtype=np.int64)
        np.add.at(ends, self.leaf + 1, 1)
        total = ends.cumsum()
        found: Ints = total[self.end] - total[:-1]
        return found

    def text_at(self) -> Ints:
        """The text that ends in each node, or -1: (N,)."""
        found = np.full(len(self), -1, dtype=np.int64)
        found[self.leaf] = np.arange(len(self.leaf))
        return found

    def path(self, node: int) -> list[int]:
        """The nodes from the root's child down to this one."""
        found: list[int] = []
        while node != ROOT:
            found.append(node)
            node = int(self.parent[node])
        return found[::-1]


def build_trie(texts: Texts) -> Trie:
    """The trie of texts that each have a token; text c ends in node `leaf[c]`."""
    flat, starts, lengths = texts.flat, texts.starts, texts.lengths
    if not lengths.all() or not len(lengths):
        raise ValueError("a trie is built of at least one text, and each has a token")
    order = _sorted(flat, starts, lengths)
    starts, lengths = starts[order], lengths[order]
    shared = _shared(flat, starts, lengths)
    fresh = lengths - shared  # the nodes that each text adds to those of the text before
    begin = fresh.cumsum() - fresh
    row = np.repeat(np.arange(len(order)), fresh)
    depth = np.arange(len(row)) - begin[row] + shared[row]
    parent, end = _links(shared, lengths, begin, len(row))
    last = np.maximum.accumulate(np.where(fresh > 0, begin + fresh - 1, -1))
    leaf = np.empty_like(last)
    leaf[order] = last
    child = np.argsort(parent, kind="stable")
    first = np.searchsorted(parent[child], np.arange(-1, len(row) + 1))
    return Trie(flat[starts[row] + depth].astype(np.int64), parent, depth, end, leaf, child, first)


def _sorted(flat: NDArray[np.int32], starts: Ints, lengths: Ints) -> Ints:
    """The order of the texts by their tokens; big-endian bytes sort as the numbers do."""
    data, keys = flat.astype(">u4"), []
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        keys.append(data[start : start + length].tobytes())
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


def _shared(flat: NDArray[np.int32], starts: Ints, lengths: Ints) -> Ints:
    """How many leading tokens each text shares with the one before it, in sorted order."""
    shared = np.zeros(len(lengths), dtype=np.int64)
    alike = np.arange(1, len(lengths))
    for depth in range(int(lengths.max())):
        alike = alike[(lengths[alike] > depth) & (lengths[alike - 1] > depth)]
        alike = alike[flat[starts[alike] + depth] == flat[starts[alike - 1] + depth]]
        shared[alike] += 1
    return shared


def _links(shared: Ints, lengths: Ints, begin: Ints, nodes: int) -> tuple[Ints, Ints]:
    """Parent and end of each node. At a depth, a text has its own node where it shares no more with the text before;
    the others have that of the last text above that has."""
    parent, end = np.arange(-1, nodes - 1), np.empty(nodes, dtype=np.int64)
    fresh = lengths > shared
    for depth in range(int(lengths.max())):
        owners = np.nonzero(shared <= depth)[0]
        after = np.append(begin[owners[1:]], nodes)
        deep = lengths[owners] > depth
        end[begin[owners[deep]] + depth - shared[owners[deep]]] = after[deep]
        rows = np.nonzero((shared == depth + 1) & fresh)[0]
        above = owners[np.searchsorted(owners, rows, side="right") - 1]
        parent[begin[rows]] = begin[above] + depth - shared[above]
    parent[begin[(shared == 0) & fresh]] = ROOT
    return parent, end


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Some inner nodes in order, after the nodes above the first of them, which are computed again.

    Edge e leads from row `source[e]` of the piece to node `child[e]`, which has the token `token[e]`.
    """

    ids: Ints  # (n,)
    depth: Ints  # (n,)
    end: Ints  # (n,) within the piece
    again: int  # leading rows that another piece has scored
    source: Ints  # (E,)
    child: Ints  # (E,)
    token: Ints  # (E,)


def pieces(trie: Trie, most: int) -> Iterator[Piece]:
    """The inner nodes in pieces of at most `most`, besides the few that are computed again."""
    inner = trie.inner()
    for at in range(0, len(inner), most):
        own = inner[at : at + most]
        above = np.array(trie.path(int(own[0]))[:-1], dtype=np.int64)
        nodes = np.concatenate([above, own])
        count = len(nodes)
        ends = np.searchsorted(inner, trie.end[nodes]) - at + len(above)
        edges = slice(int(trie.first[own[0] + 1]), int(trie.first[own[-1] + 2]))  # the leaves between have none
        followers = trie.first[own + 2] - trie.first[own + 1]
        yield Piece(
            ids=trie.token[nodes],
            depth=trie.depth[nodes],
            end=np.minimum(ends, count),
            again=len(above),
            source=np.repeat(np.arange(len(above), count), followers),
            child=trie.child[edges],
            token=trie.token[trie.child[edges]],
        )
