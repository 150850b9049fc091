"""Best-first search: the same answer as the full ranking, on small sets of every shape and on one of 20,000."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from checkpoints import write_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from mint import scoring, search
from mint.decoders import Decoder, load_decoder
from mint.decoders.heads import head_weight
from mint.decoders.trunks import Trunks
from mint.scoring import Ranker
from mint.search import Found, best_first


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("search") / "llama"
    write_llama(folder, num_hidden_layers=1, hidden_size=64, num_attention_heads=1, num_key_value_heads=1, std=0.5)
    return load_decoder(folder, device="cpu", dtype="float32")


def searched(ranker: Ranker, prompt: list[int], k: int, most: int = 10**6) -> Found | None:
    network = ranker.decoder.network
    return best_first(Trunks(network, [prompt], torch.device("cpu")), head_weight(network), ranker.layout.trie, k, most)


def compare(ranker: Ranker, prompt: list[int], k: int, most: int = 10**6) -> Found:
    """The first k of the full ranking; neighbours that are as good as equal may stand in either order."""
    full, found = ranker.logp([prompt])[0].double(), searched(ranker, prompt, k, most)
    assert found is not None
    best = full.sort(descending=True).values[:k]
    assert len(set(found.texts)) == len(best)
    torch.testing.assert_close(torch.tensor(found.logp, dtype=torch.float64), best, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(full[list(found.texts)], best, rtol=1e-5, atol=1e-4)
    assert found.total >= float(full.logsumexp(0)) - 1e-4
    return found


@settings(max_examples=40)
@given(
    labels=st.lists(st.text("ab c", min_size=1, max_size=6).map(str.strip).filter(bool), min_size=1, max_size=12, unique=True),
    k=st.integers(1, 14),
    prompt=st.lists(st.integers(0, 255), min_size=1, max_size=9),
)  # fmt: skip
def test_small_sets_of_any_shape_give_the_full_ranking(
    decoder: Decoder, labels: list[str], k: int, prompt: list[int]
) -> None:
    compare(Ranker(decoder, labels), prompt, k)


def test_twenty_thousand_labels_give_the_same_first_ten(decoder: Decoder) -> None:
    labels = ["".join(letters) for letters in product("abcdefghijkl", repeat=4)][:20000]
    ranker = Ranker(decoder, labels)
    assert ranker.layout.size > scoring.PIECE
    for prompt in ([5, 9, 77], list(range(40, 90))):
        found = compare(ranker, prompt, 10, most=ranker.layout.size // 4)
        assert found.opened < ranker.layout.size // 4


def test_rank_mode_searches_a_large_set_and_says_the_same(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ["".join(letters) for letters in product("abcdefgh", repeat=3)]
    case = ("a", [{"role": "user", "content": "Tall."}])
    full = Ranker(decoder, labels).rank(*case, top=5)
    monkeypatch.setattr(scoring, "PIECE", 60)
    calls: list[Found | None] = []
    real = search.best_first
    monkeypatch.setattr(scoring, "best_first", lambda *a: calls.append(real(*a)) or calls[-1])
    found = Ranker(decoder, labels).rank(*case, top=5)
    assert calls[0] is not None
    assert found.top(5) == full.top(5)
    for one, other in zip(found.ranking, full.ranking, strict=True):
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
        assert one["probability"] <= other["probability"] + 1e-6  # what was never reached is counted at its most


def test_a_search_that_would_open_too_much_gives_way_to_the_full_ranking(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, case = ["".join(letters) for letters in product("abcdefgh", repeat=3)], [{"role": "user", "content": "x"}]
    ranker = Ranker(decoder, labels)
    assert searched(ranker, [1, 2], 5, most=3) is None
    monkeypatch.setattr(scoring, "best_first", lambda *_: None)
    answer = ranker.best("a", case, 5)
    assert answer.top(5) == ranker.rank("a", case).top(5)
    assert math.fsum(entry["probability"] for entry in answer.ranking) < 1


def test_a_search_that_stops_too_early_is_seen(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: with a bound that is too high, likelier labels are left behind."""
    labels = ["".join(letters) for letters in product("abcdefghijkl", repeat=3)]
    monkeypatch.setattr(search, "WIDTH", 1)
    monkeypatch.setattr(search._Search, "floor", lambda self: -1.0 if self.seen else -math.inf)
    with pytest.raises(AssertionError):
        compare(Ranker(decoder, labels), [5, 9, 77], 10)
