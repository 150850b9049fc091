"""Generation against transformers' generate, against the forward pass without a cache, and row by row."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mint.decoders import Decoder, load_decoder
from mint.decoders.generation import Sampling, steps
from mint.errors import ConfigError

VOCABULARY = 320


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No token ends a generation except the tokenizer's end of turn, which a random network rarely writes."""
    return write_llama(tmp_path_factory.mktemp("generation") / "llama", eos_token_id=None)


@pytest.fixture(scope="session")
def decoder(folder: Path) -> Decoder:
    return load_decoder(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def oracle(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompts_of(*lengths: int, seed: int = 1) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=drawn).tolist() for length in lengths]


@pytest.fixture
def endless(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    held = decoder.tokenizer
    monkeypatch.setitem(decoder.__dict__, "tokenizer", _Endless(held))
    return decoder


class _Endless:
    def __init__(self, held: Any) -> None:
        self.held, self.stop_ids = held, ()


def their_greedy(oracle: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """transformers' generate on prompts padded on the left; the mask is given, since a prompt may hold the pad id."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    made = oracle.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    return made[:, longest:].tolist()


@pytest.mark.parametrize("lengths", [(300,), (40, 40, 40), (1,), (1, 130, 67), (70, 2, 70)])
def test_greedy_tokens_are_those_of_transformers(endless: Decoder, oracle: Any, lengths: tuple[int, ...]) -> None:
    prompts = prompts_of(*lengths)
    assert endless.generate(prompts, 24) == their_greedy(oracle, prompts, 24)


def test_a_tensor_of_prompts_is_as_good_as_lists(endless: Decoder) -> None:
    prompts = prompts_of(9, 9)
    assert endless.generate(torch.tensor(prompts), 5) == endless.generate(prompts, 5)


def cached_logits(decoder: Decoder, prompts: list[list[int]], forced: list[list[int]]) -> list[Tensor]:
    """Logits (B, V) of every step, the tokens of each step being given."""
    seen: list[Tensor] = []

    def choose(logits: Tensor) -> Tensor:
        seen.append(logits.clone())
        return torch.tensor([row[len(seen) - 1] for row in forced])

    with torch.inference_mode():
        made = list(steps(decoder.network, prompts, len(forced[0]), choose, decoder.device))
    assert [list(row) for row in zip(*made, strict=True)] == forced
    return seen


@pytest.mark.parametrize("lengths", [(200,), (3, 150, 64), (65, 1)])
def test_logits_with_the_cache_are_those_without(decoder: Decoder, lengths: tuple[int, ...]) -> None:
    prompts, forced = prompts_of(*lengths), prompts_of(*(20 for _ in lengths), seed=2)
    for step, logits in enumerate(cached_logits(decoder, prompts, forced)):
        for row, (prompt, tokens) in enumerate(zip(prompts, forced, strict=True)):
            plain = decoder.logits([prompt + tokens[:step]])[0, -1]
            torch.testing.assert_close(logits[row], plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


def test_a_wrong_position_or_a_seen_gap_would_show(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above is able to fail: positions that lag, and the blank left of a short row."""
    from mint.decoders.cache import Cache

    prompts, forced = prompts_of(3, 150), prompts_of(5, 5, seed=2)
    right = cached_logits(decoder, prompts, forced)
    real = Cache.__init__

    def seen_gap(self: Cache, *rest: Any) -> None:
        real(self, *rest)
        self.mask = None

    for name, wrong in (("__init__", seen_gap), ("position", property(lambda self: self.lengths - 1))):
        with monkeypatch.context() as patch:
            patch.setattr(Cache, name, wrong)
            found = cached_logits(decoder, prompts, forced)
        assert float((found[-1] - right[-1]).abs().max()) > 1e-2


@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.2, "top_p": 0.9, "seed": 4}])
def test_a_row_alone_writes_what_it_writes_in_a_batch(endless: Decoder, how: dict[str, Any]) -> None:
    prompts = prompts_of(100, 5, 63, 64)
    together = endless.generate(prompts, 16, **how)
    assert together == [endless.generate([prompt], 16, **how)[0] for prompt in prompts]


def test_a_seed_repeats_and_another_differs(endless: Decoder) -> None:
    prompts = prompts_of(12, 7)
    how = {"temperature": 1.5, "top_k": 50, "top_p": 0.95}
    first = endless.generate(prompts, 30, seed=7, **how)
    assert endless.generate(prompts, 30, seed=7, **how) == first
    assert endless.generate(prompts, 30, seed=8, **how) != first
    assert endless.generate(prompts, 30, **how) != endless.generate(prompts, 30, **how)  # no seed: drawn afresh


# How the next token is chosen


def their_shares(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    warpers += [] if top_k is None else [TopKLogitsWarper(top_k)]
    warpers += [] if top_p is None else [TopPLogitsWarper(top_p)]
    for warper in warpers:
        logits = warper(None, logits)
    return logits.softmax(dim=-1)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 5),
    top_k=st.none() | st.integers(1, 60),
    top_p=st.none() | st.floats(0.05, 0.99),
)
def test_shares_are_those_of_transformers(
    seed: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = 3 * torch.randn(3, 50, generator=torch.Generator().manual_seed(seed))
    ours = Sampling(temperature, top_k, top_p).shares(logits)
    torch.testing.assert_close(ours, their_shares(logits, temperature, top_k, top_p), rtol=1e-5, atol=1e-6)


def test_shares_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for how, wanted in (
        ({}, [0.5, 0.25, 0.125, 0.125]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.4}, [1, 0, 0, 0]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 1.0}, [0.5, 0.25, 0.125, 0.125]),
    ):
        found = Sampling(1.0, **how).shares(logits)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.tensor([wanted], dtype=torch.float32))
    assert Sampling(0.5).shares(logits)[0, 0] > 0.7  # colder is sharper


def test_draws_follow_the_shares() -> None:
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    choose = Sampling(1.0, seed=0).chooser(1)
    counts = Counter(int(choose(logits)) for _ in range(2000))
    assert all(abs(counts[token] / 2000 - share) < 0.04 for token, share in enumerate((0.6, 0.3, 0.1)))


# Ends, streaming, and what is refused


def test_every_end_of_the_generation_config_stops(endless: Decoder, folder: Path, tmp_path: Path) -> None:
    """Ends chosen among the tokens that are written anyway: each row stops at its first, which is kept."""
    prompts = prompts_of(30, 41, 52)
    written = endless.generate(prompts, 12)
    ends = [written[0][3], written[1][7]]
    place = shutil.copytree(folder, tmp_path / "llama")
    settings = json.loads((place / "generation_config.json").read_text())
    (place / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": ends}))
    stopping = load_decoder(place, device="cpu", dtype="float32")
    stops = {*ends, stopping.tokenizer.special("<|eot_id|>")}
    wanted = []
    for row in written:
        first = next((at for at, token in enumerate(row) if token in stops), len(row))
        wanted.append(row[: first + 1])
    assert stopping.generate(prompts, 12) == wanted
    assert [len(row) for row in wanted[:2]] != [12, 12]


def test_generation_ends_when_every_row_has(endless: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is made for rows that have all ended."""
    prompts = prompts_of(10, 20)
    first = endless.generate(prompts, 1)
    monkeypatch.setattr(endless.tokenizer, "stop_ids", tuple(row[0] for row in first))
    asked: list[int] = []
    real = endless.network.forward
    monkeypatch.setattr(endless.network, "forward", lambda ids, *rest: (asked.append(len(ids)), real(ids, *rest))[1])
    assert endless.generate(prompts, 50) == first
    assert asked[0] == 30
    assert len(asked) <= 2


def test_tokens_are_told_as_they_come_row_by_row(endless: Decoder) -> None:
    prompts = prompts_of(5, 9)
    heard: list[tuple[int, int]] = []
    written = endless.generate(prompts, 6, on_token=lambda row, token: heard.append((row, token)))
    assert heard == [(row, written[row][step]) for step in range(6) for row in range(2)]


def test_a_row_that_has_ended_is_told_of_no_more(endless: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(5, 9)
    free = endless.generate(prompts, 6)
    monkeypatch.setattr(endless.tokenizer, "stop_ids", (free[0][1],))
    heard: list[tuple[int, int]] = []
    written = endless.generate(prompts, 6, on_token=lambda row, token: heard.append((row, token)))
    assert len(written[0]) <= 2
    assert sorted(heard) == sorted((row, token) for row in range(2) for token in written[row])


def test_no_new_tokens_are_an_empty_answer(decoder: Decoder) -> None:
    assert decoder.generate(prompts_of(5, 6), 0) == [[], []]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": []}, "at least one prompt"),
        ({"ids": [[1], []]}, "empty"),
        ({"ids": [[VOCABULARY]]}, f"{VOCABULARY}.*0..{VOCABULARY - 1}"),
        ({"ids": [1, 2]}, r"\(B, T\)"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_bad_arguments_are_refused(decoder: Decoder, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        decoder.generate(**{"ids": [[1, 2]], "max_new_tokens": 3, **change})
