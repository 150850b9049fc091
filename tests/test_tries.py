"""Tries: every field against a slow definition of its own, and pieces that together hold every edge once."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mint.tries import ROOT, Texts, Trie, build_trie, pieces

Rows = list[list[int]]
some_texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8)


def starts(texts: Rows) -> list[tuple[int, ...]]:
    return sorted({tuple(text[:n]) for text in texts for n in range(1, len(text) + 1)})


def read(trie: Trie, node: int) -> tuple[int, ...]:
    return tuple(int(trie.token[above]) for above in trie.path(node))


@settings(max_examples=120)
@given(texts=some_texts)
@example(texts=[[1], [1, 2], [1, 2, 0], [0]])
@example(texts=[[1, 2], [1, 2]])
@example(texts=[[70000, 1], [256, 1], [1, 256]])
def test_a_trie_holds_every_start_of_its_texts_once_in_order(texts: Rows) -> None:
    trie, keys = build_trie(Texts.of(texts)), starts(texts)
    assert [read(trie, node) for node in range(len(trie))] == keys
    assert [keys[leaf] for leaf in trie.leaf] == [tuple(text) for text in texts]
    for node, key in enumerate(keys):
        below = [other for other, longer in enumerate(keys) if longer[: len(key)] == key]
        assert trie.depth[node] == len(key) - 1
        assert trie.end[node] == below[-1] + 1
        assert trie.children(node).tolist() == [other for other in below if len(keys[other]) == len(key) + 1]
        assert trie.texts_below()[node] == sum(tuple(text[: len(key)]) == key for text in texts)
        assert (node in trie.inner()) == (len(below) > 1)
    assert trie.children(ROOT).tolist() == [node for node, key in enumerate(keys) if len(key) == 1]
    ends = trie.text_at()
    assert all(tuple(texts[ends[node]]) == keys[node] for node in range(len(trie)) if ends[node] >= 0)


@settings(max_examples=120)
@given(texts=some_texts, most=st.integers(1, 6))
@example(texts=[[0, 0, 1], [0, 0, 2], [0, 1, 1], [1, 1, 1]], most=2)
def test_pieces_score_every_edge_once_and_see_all_that_stands_above(texts: Rows, most: int) -> None:
    trie, scored = build_trie(Texts.of(texts)), []
    for piece in pieces(trie, most):
        count = len(piece.ids)
        assert count - piece.again <= most
        lines = [tuple(int(piece.ids[j]) for j in range(i + 1) if i < piece.end[j]) for i in range(count)]
        assert piece.depth.tolist() == [len(line) - 1 for line in lines]
        assert (piece.source >= piece.again).all()
        for source, child, token in zip(piece.source, piece.child, piece.token, strict=True):
            assert (*lines[source], int(token)) == read(trie, int(child))
        scored += piece.child.tolist()
    assert sorted([*scored, *trie.children(ROOT).tolist()]) == list(range(len(trie)))


@pytest.mark.parametrize("texts", [[], [[1], []]])
def test_a_trie_of_nothing_is_refused(texts: Rows) -> None:
    with pytest.raises(ValueError, match="at least one text"):
        build_trie(Texts.of(texts))
