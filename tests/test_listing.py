"""List mode: valid names, none twice, in the aligned form; and each line's probability against one plain forward pass."""

from __future__ import annotations

import pytest
import torch
from checkpoints import write_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from mint import listing
from mint.answers import answer_text, parse_answer
from mint.chat import ChatTokenizer
from mint.decoders import Decoder, load_decoder
from mint.decoders.trunks import Trunks
from mint.labels import LabelSet
from mint.listing import Lister, lines_of
from mint.tokens import learn_chat_tokenizer

LABELS = (
    "Kabuki syndrome",
    "Noonan",
    "Noonan syndrome",
    "Noonan syndrome 1",
    "Ünïcode (x)",
    "β-thal",
    "3-methyl",
    "日本病",
    "(odd",
)
NAMES = ("Kabuki syndrome", "Noonan syndrome")
CASE = [{"role": "user", "content": "Short stature, ptosis."}]


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = write_llama(tmp_path_factory.mktemp("listing") / "llama", num_hidden_layers=2, std=0.15)
    return load_decoder(folder, device="cpu", dtype="float32")


def by_hand(decoder: Decoder, labels: tuple[str, ...], k: int) -> list[tuple[str, float]]:
    """The list written token by token: a whole forward pass for each token, the allowed ones by comparing texts."""
    tokenizer, end = decoder.tokenizer, decoder.tokenizer.special("<|eot_id|>")
    prompt = tokenizer.chat_ids(CASE, generate=True)
    ids, left, lines = [*prompt, *tokenizer.encode("POTENTIAL_DISEASES:\n1.")], list(labels), []
    for line in range(1, k + 1):
        final = line == k
        ways = {
            name: [*tokenizer.encode(f" {name}"), end] if final else tokenizer.encode(f" {name}\n") for name in left
        }
        written: list[int] = []
        total = 0.0
        while written not in ways.values():
            allowed = sorted({way[len(written)] for way in ways.values() if way[: len(written)] == written})
            logp = decoder.logits([[*ids, *written]])[0, -1].double().log_softmax(-1)
            token = max(allowed, key=lambda token: float(logp[token]))
            total += float(logp[token])
            written.append(token)
        name = next(name for name, way in ways.items() if way == written)
        left.remove(name)
        lines.append((name, total))
        ids += written + ([] if final else tokenizer.encode(f"{line + 1}."))
    assert ids[len(prompt) :] == [*tokenizer.encode(answer_text([name for name, _ in lines], "disease")), end]
    return lines


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_the_list_is_greedy_decoding_under_the_set(decoder: Decoder, k: int) -> None:
    answer, wanted = Lister(decoder, LabelSet(LABELS)).write("a", CASE, k), by_hand(decoder, LABELS, k)
    assert answer.top(k) == tuple(name for name, _ in wanted)
    assert [entry["logprob"] for entry in answer.ranking] == pytest.approx(
        [logp for _, logp in wanted], rel=1e-5, abs=1e-4
    )
    assert answer.text == answer_text([name for name, _ in wanted], "disease")


@settings(max_examples=25)
@given(
    labels=st.lists(st.text("ab( 1", min_size=1, max_size=5).map(str.strip).filter(bool), min_size=1, max_size=8, unique=True),
    k=st.integers(1, 10),
)  # fmt: skip
def test_any_list_has_k_names_of_the_set_and_none_twice(decoder: Decoder, labels: list[str], k: int) -> None:
    names = {"".join(label.split()).casefold().strip("(*"): f"x{label}" for label in labels}  # spelled apart
    known = LabelSet(dict.fromkeys(names.values()))
    answer = Lister(decoder, known).write("a", CASE, k)
    found = answer.top(99)
    assert len(found) == len(set(found)) == min(k, len(known))
    assert set(found) <= set(known.labels)
    assert all(0 <= entry["probability"] <= 1 for entry in answer.ranking)


def test_its_text_is_read_back_as_the_same_names(decoder: Decoder) -> None:
    known = LabelSet(LABELS[:4])
    answer = Lister(decoder, known).write("a", CASE, 4)
    assert tuple(named.label for named in parse_answer(answer.text or "", known)) == answer.top(4)


@pytest.mark.parametrize(("ahead", "least"), [(0, 1.0), (3, 0.2), (500, 0.0)])
def test_what_is_read_ahead_changes_nothing(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, ahead: int, least: float
) -> None:
    names = [f"{first} {second}{third}" for first in ("alpha", "beta") for second in "abc" for third in "123"]
    wanted = by_hand(decoder, tuple(names), 7)
    monkeypatch.setattr(listing, "AHEAD", ahead)
    monkeypatch.setattr(listing, "LEAST", least)
    answer = Lister(decoder, LabelSet(names)).write("a", CASE, 7)
    assert answer.top(7) == tuple(name for name, _ in wanted)
    found = [entry["logprob"] for entry in answer.ranking]
    assert found == pytest.approx([logp for _, logp in wanted], rel=1e-5, abs=1e-4)


def passes_of(decoder: Decoder, names: list[str], k: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each pass after the prompt's."""
    passes, real = [], Trunks.run
    with monkeypatch.context() as patch:
        patch.setattr(
            Trunks, "run", lambda own, ids, *rest, **more: passes.append(len(ids)) or real(own, ids, *rest, **more)
        )
        Lister(decoder, LabelSet(names)).write("a", CASE, k)
    return passes


def test_what_leaves_no_choice_is_not_asked(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that share nothing cost one pass each, the last name of the set none of its own, and one to score the end."""
    monkeypatch.setattr(listing, "AHEAD", 0)
    assert len(passes_of(decoder, ["alpha one", "beta two", "gamma three"], 3, monkeypatch)) == 3


def test_what_is_likely_is_read_in_the_same_pass(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{first} {second}" for first in ("alpha", "beta") for second in "abcdef"]
    many = passes_of(decoder, names, 8, monkeypatch)
    monkeypatch.setattr(listing, "AHEAD", 0)
    assert len(many) < 0.7 * len(passes_of(decoder, names, 8, monkeypatch))


def test_the_parts_of_a_list_are_made_once(decoder: Decoder) -> None:
    assert lines_of(decoder.tokenizer, LABELS, "disease") is lines_of(decoder.tokenizer, LABELS, "disease")


def test_a_tissue_list_has_its_own_heading(decoder: Decoder) -> None:
    answer = Lister(decoder, LabelSet(["Colon", "Lung"]), "tissue").write("a", CASE, 2)
    assert (answer.text or "").startswith("POTENTIAL_TISSUES:\n1. ")
    assert torch.tensor([entry["logprob"] for entry in answer.ranking]).isfinite().all()


def test_a_list_has_the_tokens_that_the_same_text_has(decoder: Decoder) -> None:
    """Whether a token holds the space after a number or the space before a name: a model reads what it was trained on."""
    phrases = learn_chat_tokenizer(["a b c"], 600, ["POTENTIAL_DISEASES:", *(f"{n}. " for n in range(1, 10)), *NAMES])
    for tokenizer in (decoder.tokenizer, ChatTokenizer(phrases, (0,), "")):
        lines = lines_of(tokenizer, NAMES, "disease")
        inside, last = ([lines.trie(end).token[lines.trie(end).path(int(leaf))].tolist() for leaf in lines.trie(end).leaf]
                        for end in (False, True))  # fmt: skip
        number = tokenizer.encode(f"2.{lines.gap}")
        whole = tokenizer.encode(answer_text(NAMES, "disease"))
        assert [*lines.start, *inside[0], *number, *last[1][:-1]] == whole
