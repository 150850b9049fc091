"""Token trees: the fields against slow definitions of their own, and log-probabilities against every text run alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import write_llama
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mint.decoders import Decoder, load_decoder
from mint.errors import ConfigError
from mint.trees import Text, forest, sequence, token_tree
from mint.types import TokenTree

Key = tuple[int, ...]


@st.composite
def texts(draw: st.DrawFn, tokens: int = 3, longest: int = 7) -> list[Text]:
    """Texts over few tokens, so that starts are shared, texts repeat, and some are the start of others."""
    lines = draw(st.lists(st.lists(st.integers(0, tokens - 1), max_size=longest), max_size=6))
    return [Text(line, draw(st.integers(1, max(len(line), 1)))) for line in lines]


def keys_of(tree: TokenTree) -> list[Key]:
    """The text up to and with each token, read off the tree by the rule j <= i < end[j]."""
    ids, end = tree.ids.tolist(), tree.end.tolist()
    return [tuple(ids[j] for j in range(i + 1) if i < end[j]) for i in range(len(ids))]


def starts(lines: list[Text]) -> set[Key]:
    """Every start of a text that something follows: each must be computed, and nothing else."""
    return {tuple(text.ids[:n]) for text in lines for n in range(1, len(text.ids))}


@settings(max_examples=150, deadline=None)
@given(lines=texts())
@example(lines=[])
@example(lines=[Text([])])
@example(lines=[Text([]), Text([1]), Text([1, 2])])
@example(lines=[Text([1, 2]), Text([1, 2, 0], 2), Text([1, 2], 2), Text([2, 2])])
def test_a_tree_computes_every_start_of_its_texts_once(lines: list[Text]) -> None:
    tree = token_tree(lines)
    keys = keys_of(tree)
    assert len(set(keys)) == len(keys)
    assert set(keys) == starts(lines)
    assert tree.position.tolist() == [len(key) - 1 for key in keys]
    for i, j in ((i, j) for i in range(len(keys)) for j in range(len(keys))):
        below = keys[i][: len(keys[j])] == keys[j]
        assert (j <= i < int(tree.end[j])) == below


@settings(max_examples=150, deadline=None)
@given(lines=texts())
@example(lines=[Text([1, 2, 0], 1), Text([1, 2, 0], 2), Text([1, 2], 2)])
def test_every_path_has_the_edges_of_its_scored_tokens(lines: list[Text]) -> None:
    tree = token_tree(lines)
    keys = keys_of(tree)
    edges = [(*keys[source], label) for source, label in zip(tree.sources.tolist(), tree.labels.tolist(), strict=True)]
    assert len(set(edges)) == len(edges)  # an edge that texts share is stored once
    members = list(zip(tree.member_paths.tolist(), tree.member_edges.tolist(), strict=True))
    assert tree.paths == len(lines)
    for path, text in enumerate(lines):
        wanted = [tuple(text.ids[: n + 1]) for n in range(text.first, len(text.ids))]
        assert [edges[e] for p, e in members if p == path] == wanted
    assert set(edges) == {edges[e] for _, e in members}
    assert tree.path_lengths().tolist() == [max(len(text.ids) - text.first, 0) for text in lines]


@settings(max_examples=60, deadline=None)
@given(groups=st.lists(texts(), max_size=4))
@example(groups=[])
def test_packed_trees_keep_their_fields_and_see_nothing_of_each_other(groups: list[list[Text]]) -> None:
    trees = [token_tree(lines) for lines in groups]
    packed = forest(trees)
    keys = [key for tree in trees for key in keys_of(tree)]
    assert keys_of(packed) == keys
    assert len(packed) == sum(map(len, trees))
    assert packed.paths == sum(tree.paths for tree in trees)
    edges = [keys_of(tree)[s] for tree in trees for s in tree.sources.tolist()]
    assert [keys_of(packed)[s] for s in packed.sources.tolist()] == edges
    assert packed.labels.tolist() == [label for tree in trees for label in tree.labels.tolist()]
    values = torch.rand(len(packed.labels), dtype=torch.float64)
    parts = values.split([len(tree.labels) for tree in trees]) if trees else ()
    apart = [tree.path_sums(part) for tree, part in zip(trees, parts, strict=True)]
    assert torch.equal(packed.path_sums(values), torch.cat([values[:0], *apart]))


def test_a_plain_sequence_is_the_tree_of_one_text() -> None:
    for ids in ([], [4], [4, 4, 2, 4]):
        plain, tree = sequence(ids), token_tree([Text(ids)])
        assert plain.position.tolist() == list(range(len(ids)))
        assert plain.end.tolist() == [len(ids)] * len(ids)  # all its tokens, the last one too
        assert plain.sources.tolist() == tree.sources.tolist()
        assert plain.labels.tolist() == tree.labels.tolist()
        assert plain.path_lengths().tolist() == tree.path_lengths().tolist()


def test_a_pair_by_hand() -> None:
    """Prompt 7 8, answers 1 2 9 and 1 3: the shared 1 is one token and one edge, the ends are labels alone."""
    tree = token_tree([Text([7, 8, 1, 2, 9], 2), Text([7, 8, 1, 3], 2)])
    assert tree.ids.tolist() == [7, 8, 1, 2]
    assert tree.end.tolist() == [4, 4, 4, 4]
    assert tree.sources.tolist() == [1, 2, 3, 2]
    assert tree.labels.tolist() == [1, 2, 9, 3]
    assert tree.path_sums(torch.tensor([1.0, 10.0, 100.0, 1000.0])).tolist() == [111.0, 1001.0]


def test_images_ride_along_in_the_order_of_their_trees() -> None:
    first, second = token_tree([Text([1, 2])], images=("a", "b")), token_tree([Text([1, 2])], images=("c",))
    assert forest([first, second]).images == ("a", "b", "c")


def test_moving_a_tree_keeps_every_field() -> None:
    tree = token_tree([Text([1, 2, 3]), Text([1, 3])], images=("a",)).to("cpu")
    assert (tree.paths, tree.images, tree.ids.tolist()) == (2, ("a",), [1, 2])


@pytest.mark.parametrize("first", [0, -1])
def test_a_text_whose_first_token_would_be_scored_is_refused(first: int) -> None:
    with pytest.raises(ConfigError, match="nothing before it"):
        token_tree([Text([1, 2]), Text([1, 2, 3], first)])


# Log-probabilities through the decoder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("trees") / "llama")


@pytest.fixture(scope="session")
def decoder(folder: Path) -> Decoder:
    return load_decoder(folder, device="cpu", dtype="float32")


def alone(decoder: Decoder, text: Text) -> list[float]:
    """The log-probabilities of a text's scored tokens from its own plain row."""
    logp = decoder.logits([list(text.ids)])[0].double().log_softmax(-1)
    return [float(logp[n - 1, text.ids[n]]) for n in range(text.first, len(text.ids))]


def compare(decoder: Decoder, tree: TokenTree, lines: list[Text], tolerance: float = 1e-5) -> None:
    """Every edge and every sum; the tolerance is relative to the largest log-probability, as rounding is."""
    token_logp = decoder.token_logp(tree).detach().double()
    sums = tree.path_sums(token_logp)
    for path, text in enumerate(lines):
        ours = token_logp[tree.member_edges[tree.member_paths == path]]
        wanted = torch.tensor(alone(decoder, text), dtype=torch.float64)
        room = tolerance * float(wanted.abs().max()) if len(wanted) else 0.0
        torch.testing.assert_close(ours, wanted, rtol=0, atol=room)
        torch.testing.assert_close(sums[path], wanted.sum(), rtol=0, atol=room * len(wanted))


@settings(max_examples=25, deadline=None)
@given(groups=st.lists(texts(tokens=4, longest=10), min_size=1, max_size=3))
@example(groups=[[Text([5, 6, 7, 8], 2), Text([5, 6, 7], 2), Text([5, 6, 7, 8, 9], 3)], [Text([5, 6])]])
def test_each_edge_has_the_log_probability_of_its_text_run_alone(decoder: Decoder, groups: list[list[Text]]) -> None:
    lines = [text for group in groups for text in group]
    compare(decoder, forest([token_tree(group) for group in groups]), lines)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("seed", range(2))
def test_long_prompts_with_answers_that_share_a_start_score_as_each_alone(
    folder: Path, dtype: str, tolerance: float, seed: int
) -> None:
    """Longer than several blocks of attention: two prompts of ~150 tokens, answers of ~90 that part in the middle."""
    drawn = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(0, 300, (count,), generator=drawn).tolist()

    groups = []
    for length in (151, 97):
        prompt, shared = ids(length), ids(41)
        answers = [shared + ids(53), shared + ids(9), ids(90), shared]
        groups.append([Text(prompt + answer, length) for answer in answers])
    decoder = load_decoder(folder, device="cpu", dtype=dtype)
    lines = [text for group in groups for text in group]
    compare(decoder, forest([token_tree(group) for group in groups]), lines, tolerance)


def test_gradients_of_a_tree_are_those_of_its_texts_alone(decoder: Decoder) -> None:
    """An edge that two answers share counts in both."""
    lines = [Text([9, 8, 7, 1, 2, 3], 3), Text([9, 8, 7, 1, 2, 5, 6], 3), Text([9, 8, 7, 4], 3)]
    weights = torch.tensor([1.0, -2.0, 0.5])
    norm = decoder.network.model.norm.weight.requires_grad_()
    try:
        tree = token_tree(lines)
        together = torch.autograd.grad(tree.path_sums(decoder.token_logp(tree)) @ weights, norm)[0]
        trees = [token_tree([text]) for text in lines]
        sums = [tree.path_sums(decoder.token_logp(tree))[0] for tree in trees]
        apart = torch.autograd.grad(torch.stack(sums) @ weights, norm)[0]
    finally:
        norm.requires_grad_(False)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_a_wrong_tree_is_seen(decoder: Decoder) -> None:
    """The comparison is able to fail: siblings that see each other, and positions that count on."""
    lines = [Text([5, 6, 7, 8, 9], 2), Text([5, 6, 3, 4, 2], 2)]
    tree = token_tree(lines)
    count = len(tree)
    fields = {name: getattr(tree, name) for name in TokenTree.__slots__}
    for wrong in ({"end": torch.full_like(tree.end, count)}, {"position": torch.arange(count)}):
        with pytest.raises(AssertionError):
            compare(decoder, TokenTree(**{**fields, **wrong}), lines)
