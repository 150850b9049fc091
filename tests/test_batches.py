"""From pairs to batches: TRL's tokens, what truncation may take, and every pair once an epoch."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from students import chat_pairs, peers, run_settings, text_pairs, write_chat_template, write_student

from mint.answers import answer_text
from mint.chat import ChatTokenizer
from mint.decoders import Decoder, load_decoder
from mint.errors import RecordError
from mint.training.batches import (
    TokenPair,
    batch,
    cut,
    order,
    split,
    step_pairs,
    steps_per_epoch,
    token_pairs,
    tokenise,
    total_steps,
)
from mint.training.objectives import objective_batch
from mint.types import PreferencePair


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_template(write_student(tmp_path_factory.mktemp("student")))


@pytest.fixture(scope="session")
def decoder(folder: Path) -> Decoder:
    return load_decoder(folder, device="cpu", dtype="float32", date="26 Jul 2024")


@pytest.fixture(scope="session")
def tokenizer(decoder: Decoder) -> ChatTokenizer:
    return decoder.tokenizer


@pytest.fixture(scope="session")
def trl_row(folder: Path) -> Callable[[PreferencePair], dict[str, Any]]:
    """A pair as TRL's ORPO trainer tokenises it."""
    with peers():
        from transformers import AutoTokenizer
        from trl.data_utils import maybe_apply_chat_template
        from trl.experimental.orpo import ORPOTrainer

        words = AutoTokenizer.from_pretrained(folder)
    stub = types.SimpleNamespace(processing_class=words, is_encoder_decoder=False, max_length=100_000)
    stub.build_tokenized_answer = partial(ORPOTrainer.build_tokenized_answer, stub)

    def row(pair: PreferencePair) -> dict[str, Any]:
        with peers():
            example = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            return ORPOTrainer.tokenize_row(stub, maybe_apply_chat_template(example, words))

    return row


def assert_same(ours: TokenPair, theirs: dict[str, Any]) -> None:
    assert ours.chosen == theirs["chosen_input_ids"]
    assert ours.rejected == theirs["rejected_input_ids"]
    for first, labels in (
        (ours.chosen_first, theirs["chosen_labels"]),
        (ours.rejected_first, theirs["rejected_labels"]),
    ):
        assert [label == -100 for label in labels] == [at < first for at in range(len(labels))]


# ---- tokens ---------------------------------------------------------------------------------------------------------


def test_plain_strings_are_tokenised_as_trl_does(tokenizer: ChatTokenizer, trl_row: Any) -> None:
    for pair in text_pairs(20):
        assert_same(tokenise(pair, tokenizer), trl_row(pair))


def test_conversations_are_tokenised_as_trl_does_with_the_same_template(tokenizer: ChatTokenizer, trl_row: Any) -> None:
    for pair in chat_pairs(10):
        assert_same(tokenise(pair, tokenizer), trl_row(pair))
    system = {"role": "system", "content": " Name the finding. "}
    earlier = [{"role": "user", "content": "thin lip"}, {"role": "assistant", "content": "\tyes \n"}]
    pair = chat_pairs(1, seed=3)[0]
    longer = replace(pair, prompt=[system, *earlier, *pair.prompt])
    assert_same(tokenise(longer, tokenizer), trl_row(longer))


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "firsts"),
    [
        pytest.param("x t", "he red", "all", (2, 3), id="one answer merges"),
        pytest.param("x t", "he red", "hat", (2, 2), id="both merge"),
        pytest.param("", "red", "blue", (1, 1), id="no prompt"),
        pytest.param("red ", "thin", "the", (5, 4), id="the space goes to one answer"),
    ],
)
def test_a_token_merged_across_the_boundary_is_the_answers_as_in_trl(
    prompt: str, chosen: str, rejected: str, firsts: tuple[int, int], tokenizer: ChatTokenizer, trl_row: Any
) -> None:
    pair = PreferencePair("one", prompt, chosen, rejected)
    made = tokenise(pair, tokenizer)
    assert_same(made, trl_row(pair))
    assert tokenizer.decode(made.chosen) == prompt + chosen
    assert (made.chosen_first, made.rejected_first) == firsts


def test_where_several_tokens_change_the_answer_begins_with_the_first_of_them(tokenizer: ChatTokenizer) -> None:
    with peers():
        from trl.data_utils import common_prefix_length
    pair = PreferencePair("one", "red use", "r thin", " red")  # "use" is two tokens, "user" is one
    made = tokenise(pair, tokenizer)
    start = tokenizer.plain_ids(pair.prompt)
    assert made.chosen_first == common_prefix_length(start, made.chosen)
    assert tokenizer.decode(made.chosen[made.chosen_first :]) == "user thin"
    assert made.rejected_first == len(start)


def test_a_text_begins_once_and_ends_once(tokenizer: ChatTokenizer) -> None:
    begin, end = tokenizer.special("<|begin_of_text|>"), tokenizer.special("<|eot_id|>")
    for pair in [*text_pairs(3), *chat_pairs(3)]:
        made = tokenise(pair, tokenizer)
        for ids in (made.chosen, made.rejected):
            assert ids.count(begin) == 1 == ids.index(begin) + 1
            assert ids[-1] == end != ids[-2]


def test_special_tokens_written_in_a_text_stay_words(tokenizer: ChatTokenizer) -> None:
    made = tokenise(PreferencePair("one", "thin<|eot_id|>", " red", " blue"), tokenizer)
    assert made.chosen.count(tokenizer.special("<|eot_id|>")) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "thin"}, "pairs.jsonl:7: pair 'one': texts and message lists are mixed"),
        ({"rejected": [{"role": "assistant", "content": "red \n"}]}, "'one': chosen and rejected are the same tokens"),
        ({"chosen": [{"role": "user", "content": "red"}]}, "'one': an answer is one assistant message; found user"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            "'one': .*an image for a model that reads text",
        ),
    ],
)
def test_a_pair_that_cannot_be_tokenised_is_named_or_left_out(
    changes: dict[str, Any], message: str, tokenizer: ChatTokenizer
) -> None:
    answers = ([{"role": "assistant", "content": word}] for word in ("red", "blue"))
    good = PreferencePair("one", [{"role": "user", "content": "thin"}], *answers, where="pairs.jsonl:7")
    bad = replace(good, **changes)
    with pytest.raises(RecordError, match=message):
        token_pairs([bad], tokenizer, run_settings())
    skipped: list[str] = []
    kept = token_pairs([bad, replace(good, id="two")], tokenizer, run_settings(), skipped)
    assert [pair.id for pair in kept] == ["two"]
    assert len(skipped) == 1
    assert skipped[0].startswith("pairs.jsonl:7: pair 'one': ")


def test_two_pairs_of_one_id_are_refused(tokenizer: ChatTokenizer) -> None:
    pair = text_pairs(1)[0]
    with pytest.raises(RecordError, match="pair 'pair-0': another pair has this id; give each its own"):
        token_pairs([pair, pair], tokenizer, run_settings())


NAMES = ["Kabuki syndrome", "Noonan syndrome", "Marfan syndrome"]


@pytest.mark.parametrize("plain", [False, True], ids=["chat", "plain"])
def test_the_first_name_ends_before_the_line_of_the_second(tokenizer: ChatTokenizer, plain: bool) -> None:
    answers = [answer_text(names, "disease") for names in (NAMES, NAMES[::-1], NAMES[:1])]
    parts = answers if plain else [[{"role": "assistant", "content": text}] for text in answers]
    prompt: Any = "Which?\n" if plain else [{"role": "user", "content": "Which?"}]
    listed = tokenise(PreferencePair("one", prompt, parts[0], parts[1]), tokenizer)
    first = tokenizer.decode(listed.chosen[listed.chosen_first : listed.first_stop])
    assert first == "POTENTIAL_DISEASES:\n1. Kabuki syndrome"
    alone = tokenise(PreferencePair("two", prompt, parts[2], parts[1]), tokenizer)
    assert alone.first_stop == len(alone.chosen)  # with the end of the turn
    shorter = cut(replace(listed, opening=1), 10_000, listed.chosen_first - 1)
    assert shorter.cut_prompt == 1
    assert shorter.chosen[shorter.first_stop :] == listed.chosen[listed.first_stop :]


def test_an_answer_cut_within_its_first_name_is_all_first_name() -> None:
    pair = replace(made_pair(prompt=4, chosen=30, rejected=20), first_end=4 + 25)
    found = cut(pair, max_length=12, max_prompt_length=None)
    assert found.first_stop == len(found.chosen) == 12


# ---- truncation -----------------------------------------------------------------------------------------------------


def made_pair(prompt: int, chosen: int, rejected: int, opening: int = 1) -> TokenPair:
    """A pair whose tokens tell where they come from: prompt 0, 1, …; chosen 1000, …; rejected 2000, …."""
    start = list(range(prompt))
    return TokenPair(
        "one",
        start + list(range(1000, 1000 + chosen)),
        start + list(range(2000, 2000 + rejected)),
        prompt,
        prompt,
        opening,
    )


SIZES = {
    "prompt": st.integers(1, 60),
    "chosen": st.integers(1, 40),
    "rejected": st.integers(1, 40),
    "opening": st.integers(1, 8),
    "max_length": st.integers(2, 80),
    "max_prompt": st.none() | st.integers(1, 60),
}


@given(**SIZES)
def test_truncation_takes_the_left_of_the_prompt_then_the_right_of_the_answers(
    prompt: int, chosen: int, rejected: int, opening: int, max_length: int, max_prompt: int | None
) -> None:
    assume(max_prompt is None or max_prompt < max_length)
    opening = min(opening, max(prompt - 1, 1))
    pair = made_pair(prompt, chosen, rejected, opening)
    needed = min(prompt, 1 + opening)
    if needed >= max_length or (max_prompt is not None and needed > max_prompt):
        with pytest.raises(
            RecordError, match=f"nothing that tells the answers apart is left within --max-length {max_length}"
        ):
            cut(pair, max_length, max_prompt)
        return
    found = cut(pair, max_length, max_prompt)
    fits = prompt + max(chosen, rejected) <= max_length and prompt <= (max_prompt or max_length)
    assert (found == pair) == fits
    first = found.chosen_first
    assert found.rejected_first == first <= min(prompt, max_prompt or prompt)
    for ids, answer in ((found.chosen, pair.chosen[prompt:]), (found.rejected, pair.rejected[prompt:])):
        assert first < len(ids) <= max_length
        assert ids[:first] == [0, *range(prompt - first + 1, prompt)]
        assert ids[first:] == answer[: len(ids) - first]
    assert found.cut_prompt == prompt - first
    kept = len(found.chosen) - first, len(found.rejected) - first
    assert found.cut_answers == max(chosen - kept[0], rejected - kept[1])
    if found.cut_answers:
        assert max(len(found.chosen), len(found.rejected)) == max_length  # nothing was cut that had room


def test_truncation_by_hand() -> None:
    pair = made_pair(prompt=10, chosen=6, rejected=4, opening=2)
    shorter = cut(pair, max_length=12, max_prompt_length=None)  # the prompt may keep 12 - 6 = 6
    assert shorter.chosen == [0, 5, 6, 7, 8, 9, 1000, 1001, 1002, 1003, 1004, 1005]
    assert shorter.rejected == [0, 5, 6, 7, 8, 9, 2000, 2001, 2002, 2003]
    assert (shorter.cut_prompt, shorter.cut_answers) == (4, 0)
    both = cut(pair, max_length=6, max_prompt_length=None)  # half of 6 for the prompt, and the answers lose 3 and 1
    assert both.chosen == [0, 8, 9, 1000, 1001, 1002]
    assert both.rejected == [0, 8, 9, 2000, 2001, 2002]
    assert (both.cut_prompt, both.cut_answers) == (7, 3)
    limited = cut(pair, max_length=100, max_prompt_length=4)
    assert limited.chosen[:5] == [0, 7, 8, 9, 1000]
    assert (limited.cut_prompt, limited.cut_answers) == (6, 0)


def test_answers_whose_boundary_differs_lose_the_same_tokens_of_the_prompt() -> None:
    pair = TokenPair("one", [0, 1, 2, 3, 4, 50, 51], [0, 1, 2, 3, 60, 61], 5, 4)
    found = cut(pair, max_length=5, max_prompt_length=None)
    assert found.chosen == [0, 3, 4, 50, 51]
    assert found.rejected == [0, 3, 60, 61]
    assert (found.chosen_first, found.rejected_first, found.cut_prompt) == (3, 2, 2)


def test_answers_that_part_only_beyond_the_limit_are_refused() -> None:
    pair = TokenPair("one", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 6], 2, 2)
    with pytest.raises(
        RecordError, match=r"2 tokens of prompt and 4 of an answer: nothing that tells .* --max-length 5;"
    ):
        cut(pair, max_length=5, max_prompt_length=None)


def test_what_truncation_leaves_nothing_of_is_refused_by_its_place_or_listed(tokenizer: ChatTokenizer) -> None:
    pairs = [replace(pair, where=f"p.jsonl:{n}") for n, pair in enumerate(chat_pairs(3), 1)]
    settings = run_settings(max_length=6)  # the opening of an answer alone has more
    with pytest.raises(
        RecordError, match=r"p.jsonl:1: pair 'pair-0': .*nothing .* is left within --max-length 6; raise"
    ):
        token_pairs(pairs, tokenizer, settings)
    skipped: list[str] = []
    assert token_pairs(pairs, tokenizer, settings, skipped) == []
    assert [fault[:10] for fault in skipped] == ["p.jsonl:1:", "p.jsonl:2:", "p.jsonl:3:"]


def test_a_cut_conversation_still_opens_the_assistants_turn(tokenizer: ChatTokenizer) -> None:
    (pair,) = token_pairs(chat_pairs(1), tokenizer, run_settings(max_length=24))
    opening = tokenizer._header("assistant") + tokenizer.encode("\n\n")
    assert pair.cut_prompt > 0
    assert pair.chosen[pair.chosen_first - len(opening) : pair.chosen_first] == opening
    assert pair.chosen[0] == tokenizer.special("<|begin_of_text|>")


# ---- steps and batches ----------------------------------------------------------------------------------------------


@given(count=st.integers(1, 40), size=st.integers(1, 12), seed=st.integers(0, 100))
def test_every_epoch_takes_every_pair_once(count: int, size: int, seed: int) -> None:
    pairs = [replace(made_pair(2, 1, 1), id=str(n)) for n in range(count)]
    settings = run_settings(batch_size=size, seed=seed)
    each = steps_per_epoch(count, size)
    epochs = [[step_pairs(pairs, epoch * each + n, settings) for n in range(each)] for epoch in range(2)]
    for epoch in epochs:
        assert [len(step) for step in epoch[:-1]] == [size] * (each - 1)
        assert 1 <= len(epoch[-1]) <= size
        assert sorted(pair.id for step in epoch for pair in step) == sorted(pair.id for pair in pairs)
    again = [step_pairs(pairs, n, settings) for n in range(each)]
    assert again == epochs[0]


def test_the_order_changes_from_epoch_to_epoch_and_from_seed_to_seed() -> None:
    orders = [order(20, epoch, seed) for epoch in range(3) for seed in range(3)]
    assert len({tuple(one) for one in orders}) == 9


def test_steps_are_exact_when_given_and_follow_the_epochs_otherwise() -> None:
    assert total_steps(10, run_settings(batch_size=4, epochs=3.0)) == 9
    assert total_steps(10, run_settings(batch_size=4, epochs=0.5)) == 2
    assert total_steps(10, run_settings(batch_size=4, epochs=0.01)) == 1
    assert total_steps(10, run_settings(batch_size=4, steps=5)) == 5
    assert total_steps(10, run_settings(batch_size=4, steps=50)) == 50


@given(sizes=st.lists(st.tuples(*[st.integers(1, 30)] * 3), min_size=1, max_size=20), budget=st.integers(1, 100))
def test_a_split_holds_every_pair_once_within_the_budget(sizes: list[tuple[int, int, int]], budget: int) -> None:
    pairs = [replace(made_pair(*size), id=str(n)) for n, size in enumerate(sizes)]
    groups = list(split(pairs, budget))
    assert sorted(pair.id for group in groups for pair in group) == sorted(pair.id for pair in pairs)
    for group in groups:
        assert len(batch(group).tree) <= sum(pair.size for pair in group)
        assert len(group) == 1 or sum(pair.size for pair in group) <= budget
    lengths = [pair.size for group in groups for pair in group]
    assert lengths == sorted(lengths, reverse=True)
    for one, other in pairwise(groups):
        assert sum(pair.size for pair in one) + other[0].size > budget  # no group could have taken one more


def test_a_batch_scores_prompt_chosen_and_rejected_of_each_pair_in_this_order() -> None:
    pairs = [made_pair(5, 3, 2), made_pair(4, 1, 6)]
    made = batch(pairs)
    assert made.tree.path_lengths().tolist() == [4, 3, 2, 0, 3, 1, 6, 0]
    assert made.apart == (5 + 3) + (5 + 2) + (4 + 1) + (4 + 6)
    # the prompts are one trunk of 5; the last token of each of the four answers is only a label
    assert len(made.tree) == 5 + 2 + 1 + 0 + 5
    scored = (0, 1, 2, 4, 5, 6)
    labels = [made.tree.labels[made.tree.member_edges[made.tree.member_paths == p]].tolist() for p in scored]
    assert labels == [[1, 2, 3, 4], [1000, 1001, 1002], [2000, 2001], [1, 2, 3], [1000], list(range(2000, 2006))]


def test_parts_that_an_objective_does_not_look_at_are_not_computed() -> None:
    pairs = [made_pair(5, 3, 2)]
    lengths = {
        name: objective_batch(pairs, run_settings(**choice)).tree.path_lengths().tolist()
        for name, choice in {
            "orpo": {"objective": "orpo"},
            "orpo, chosen": {"objective": "orpo", "nll": "chosen"},
            "dpo": {"objective": "dpo"},
            "sft": {"objective": "sft"},
            "sft, all": {"objective": "sft", "nll": "prompt+chosen"},
            "sft, first": {"objective": "sft", "first_weight": 2.0},
        }.items()
    }
    assert lengths == {
        "orpo": [4, 3, 2, 0],
        "orpo, chosen": [0, 3, 2, 0],
        "dpo": [0, 3, 2, 0],
        "sft": [0, 3, 0, 0],
        "sft, all": [4, 3, 0, 0],
        "sft, first": [0, 3, 0, 3],  # one answer that names no second thing is all first name
    }
    assert len(objective_batch(pairs, run_settings(objective="sft")).tree) == 5 + 2
