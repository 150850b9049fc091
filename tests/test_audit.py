"""The audit of a run, worked by hand and held against what the run then does."""

from __future__ import annotations

from pathlib import Path

import pytest
from students import run_settings, text_pairs, write_student

from mint.decoders import load_decoder, lora
from mint.training.audit import audit
from mint.training.batches import TokenPair, split, step_pairs, token_pairs
from mint.training.objectives import objective_batch
from mint.training.plan import activations


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("student"))


def test_the_audit_counts_what_a_person_would_count(folder: Path) -> None:
    decoder = load_decoder(folder, device="cpu", dtype="float32")
    lora.attach(decoder.network, "q_proj", rank=2, alpha=4.0)
    begin, end = (decoder.tokenizer.special(name) for name in ("<|begin_of_text|>", "<|eot_id|>"))
    pairs = [
        TokenPair("good", [begin, 1, 2, 3, end], [begin, 1, 2, 4, end], 3, 3),
        TokenPair("same prompt", [begin, 1, 2, 5, 6, end], [begin, 1, 2, 4, end], 3, 3),
        TokenPair("bad", [begin, begin, 7, 8], [1, 7, 8, 9, end], 3, 2, 1, 5, 6),
    ]
    found = audit(decoder, pairs, run_settings(batch_size=3, steps=4))
    expected = {
        "pairs": 3,
        "steps": 4,
        "begin_of_text_missing": 1,
        "begin_of_text_doubled": 1,
        "end_of_turn_missing": 1,
        "answers_that_begin_differently_tokenised": 1,
        "prompts_cut": 1,
        "prompt_tokens_cut": 5,
        "answers_cut": 1,
        "prompts_that_repeat": 1,
        "longest_text": 6,
        "tokens_one_by_one": 5 + 5 + 6 + 5 + 4 + 5,
        # begin; 1 2; 3, 4, 5 6 below; begin 7; and apart from all: 1 7 8 9 (8 after begin 7, and every end, are labels)
        "tokens_computed": 1 + 2 + 4 + 2 + 4,
        "share_saved": round(1 - 13 / 30, 4),
    }
    assert {name: found[name] for name in expected} == expected
    network = decoder.network
    assert found["weights_bytes"] == sum(p.numel() for n, p in network.named_parameters() if ".lora_" not in n) * 4
    assert found["adapter_and_optimiser_bytes"] == 2 * (2 * 128 + 256 * 2) * 4 * 4  # weight, gradient, two moments
    assert found["activation_bytes"] == activations(decoder, 5 + 2 + 6 + 2 + 4 + 3, recompute=False)
    assert activations(decoder, 10, recompute=False) == 10 * (2 * (7 * 128 + 3 * 160) + 128) * 4
    assert found["seconds_expected"] >= 0


def test_the_audit_computes_as_many_tokens_as_an_epoch_of_training(folder: Path) -> None:
    decoder = load_decoder(folder, device="cpu", dtype="float32")
    lora.attach(decoder.network, "q_proj", rank=2, alpha=4.0)
    settings = run_settings(batch_size=3, tokens_per_batch=50, objective="sft")
    pairs = token_pairs(text_pairs(7), decoder.tokenizer, settings)
    steps = [step_pairs(pairs, n, settings) for n in range(3)]
    groups = [group for step in steps for group in split(step, 50)]
    computed = sum(len(objective_batch(group, settings).tree) for group in groups)
    assert audit(decoder, pairs, settings)["tokens_computed"] == computed
