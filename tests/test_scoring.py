"""Rank mode: every label's log-probability against a forward pass of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checkpoints import write_llama

from mint import scoring
from mint.decoders import Decoder, load_decoder, lora
from mint.errors import ConfigError, WorkError
from mint.scoring import Ranker, layout_of

LABELS = ("Kabuki syndrome", "Noonan", "Noonan syndrome", "Noonan syndrome 1", "Noonan syndrome 10", "Ünïcode (x)",
          "β-thalassaemia", "3-methylglutaconic aciduria", "日本病", "Kabuki syndrome 2")  # fmt: skip
CASES = [(f"case {n}", [{"role": "user", "content": "Short stature. " * n}]) for n in (1, 9, 40)]


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load_decoder(write_llama(tmp_path_factory.mktemp("scoring") / "llama"), device="cpu", dtype="float32")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tries in pieces of seven tokens."""
    layout_of.cache_clear()
    monkeypatch.setattr(scoring, "PIECE", 7)
    yield
    layout_of.cache_clear()


def alone(ranker: Ranker, prompt: list[int]) -> torch.Tensor:
    """log p(label and its end | prompt with its opening), each label in a row of its own, in float64 sums.

    A label ends with the turn, or after an opening with its line.
    """
    decoder, shared = ranker.decoder, len(ranker.layout.opening)
    end = [] if ranker.opening else [decoder.tokenizer.special("<|eot_id|>")]
    line = "\n" if ranker.opening else ""
    start, found = prompt[: len(prompt) - shared], []
    for label in ranker.labels:
        ids = [*start, *decoder.tokenizer.encode(ranker.opening + label + line), *end]
        assert ids[: len(prompt)] == prompt
        logp = decoder.logits([ids])[0].double().log_softmax(-1)
        found.append(sum(float(logp[n - 1, ids[n]]) for n in range(len(prompt), len(ids))))
    return torch.tensor(found, dtype=torch.float64)


def check(ranker: Ranker) -> None:
    """Each of the two errs by up to 3e-6 of the truth (the same weights in float64), since the weights are wide."""
    prompts = [ranker.prompt(messages) for _, messages in CASES]
    for prompt, row in zip(prompts, ranker.logp(prompts), strict=True):
        torch.testing.assert_close(row.double(), alone(ranker, prompt), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opening", ["", "POTENTIAL_DISEASES:\n1. ", "Diagnosis:"])
def test_each_label_scores_as_in_a_forward_pass_of_its_own(decoder: Decoder, opening: str) -> None:
    check(Ranker(decoder, LABELS, opening=opening))


@pytest.mark.usefixtures("small_pieces")
def test_a_set_that_is_scored_in_pieces_scores_the_same(decoder: Decoder) -> None:
    ranker = Ranker(decoder, LABELS)
    assert ranker.layout.small is None
    check(ranker)


def test_an_adapter_on_the_head_counts(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = write_llama(tmp_path_factory.mktemp("adapted") / "llama", tie_word_embeddings=False, num_hidden_layers=1)
    adapted = load_decoder(folder, device="cpu", dtype="float32")
    plain = Ranker(adapted, LABELS).logp([[1, 2, 3]])
    lora.attach(adapted.network, ["lm_head", "q_proj"], rank=4, alpha=8)
    for layer in lora.adapted(adapted.network).values():
        torch.nn.init.normal_(layer.lora_B, 0, 0.1, generator=torch.Generator().manual_seed(0))
    check(Ranker(adapted, LABELS))
    assert not torch.allclose(Ranker(adapted, LABELS).logp([[1, 2, 3]]), plain, atol=0.1)


def test_bfloat16_is_no_worse_than_its_rows_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Against the same bfloat16 weights in float64: the trie may err no more than 1.5 times what single rows do."""
    folder = write_llama(tmp_path_factory.mktemp("half") / "llama", dtype=torch.bfloat16, std=0.1, num_hidden_layers=1)
    half, exact = (load_decoder(folder, device="cpu", dtype=kind) for kind in ("bfloat16", "float64"))
    ranker = Ranker(half, LABELS)
    prompts = [ranker.prompt(messages) for _, messages in CASES]
    truth = torch.stack([alone(Ranker(exact, LABELS), prompt) for prompt in prompts])
    rows = torch.stack([alone(ranker, prompt) for prompt in prompts])
    assert (ranker.logp(prompts).double() - truth).norm() <= 1.5 * (rows - truth).norm()


def test_cases_together_rank_as_each_alone(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    ranker, groups = Ranker(decoder, LABELS), []
    real = Ranker.logp
    monkeypatch.setattr(
        Ranker, "logp", lambda self, prompts, images: groups.append(len(prompts)) or real(self, prompts, images)
    )
    together = list(ranker.rank_all((*case, ()) for case in CASES))
    assert groups == [3]
    for answer, (case, messages) in zip(together, CASES, strict=True):
        single = ranker.rank(case, messages)
        assert answer.id == single.id == case
        assert answer.top(10) == single.top(10)
        ours, theirs = ([entry["logprob"] for entry in a.ranking] for a in (answer, single))
        assert ours == pytest.approx(theirs, abs=1e-4)
        assert sum(entry["probability"] for entry in answer.ranking) == pytest.approx(1.0)


def test_mean_and_prior_rank_by_what_they_say(decoder: Decoder) -> None:
    empty = [{"role": "user", "content": "Nothing."}]
    plain = Ranker(decoder, LABELS)
    case, prior = (plain.logp([plain.prompt(m)])[0].double() for m in (CASES[0][1], empty))
    lengths = torch.tensor([len(decoder.tokenizer.encode(label)) + 1 for label in LABELS])
    for name, score in {"mean": case / lengths, "prior": case - prior}.items():
        ranking = Ranker(decoder, LABELS, name, empty=("empty", empty, ())).rank(*CASES[0]).ranking
        order = score.argsort(descending=True).tolist()
        assert [entry["label"] for entry in ranking] == [LABELS[c] for c in order]
        assert [e["logprob"] for e in ranking] == pytest.approx(case[order].tolist(), abs=1e-4)
        assert [e["probability"] for e in ranking] == pytest.approx(score.softmax(0)[order].tolist(), abs=1e-4)


def test_one_label_has_all_the_probability(decoder: Decoder) -> None:
    ranker = Ranker(decoder, ["Noonan"], opening="1. ")
    (entry,) = ranker.rank(*CASES[0]).ranking
    assert entry["probability"] == 1.0
    check(ranker)


def test_the_trie_of_a_label_set_is_made_once(decoder: Decoder) -> None:
    assert Ranker(decoder, LABELS).layout is Ranker(decoder, list(LABELS)).layout
    assert Ranker(decoder, LABELS).layout is not Ranker(decoder, LABELS, opening="1.").layout


def test_threads_share_a_ranker(decoder: Decoder) -> None:
    ranker = Ranker(decoder, LABELS)
    wanted = [ranker.rank(*case) for case in CASES]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda case: ranker.rank(*case), CASES * 3)) == wanted * 3


@pytest.mark.parametrize(
    ("labels", "normalise", "words"),
    [([], "sum", "no labels"), (["a"], "max", "'max'"), (["a"], "prior", "empty case")],
)
def test_what_cannot_be_ranked_is_refused(decoder: Decoder, labels: list[str], normalise: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Ranker(decoder, labels, normalise)


def test_a_decoder_that_gives_no_numbers_is_refused(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = decoder.network.model.norm
    broken = torch.nn.Parameter(torch.full_like(norm.weight, float("nan")))
    monkeypatch.setitem(norm._parameters, "weight", broken)
    with pytest.raises(WorkError, match="log-probabilities that are no numbers; look for NaN"):
        Ranker(decoder, LABELS).rank(*CASES[0])
    with pytest.raises(WorkError, match="no numbers"):
        Ranker(decoder, LABELS).best(*CASES[0], top=1)


def test_a_wrong_score_is_seen(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: siblings that see each other, and positions that forget the prompt."""
    ranker = Ranker(decoder, LABELS)
    real = scoring._run_piece

    def lost(trunks: scoring.Trunks, *rest: object) -> torch.Tensor:
        trunks.lengths = [0] * len(trunks.lengths)
        return real(trunks, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(scoring, "_run_piece", lost)
    with pytest.raises(AssertionError):
        check(ranker)
    assert math.isfinite(float(ranker.logp([[1, 2]]).sum()))
