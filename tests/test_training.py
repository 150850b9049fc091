"""The loop over steps: pieces add up to the whole, likelihood and reference against oracles, NaN, evaluation, schedules."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from students import saved, stir, trainer_of, transformers_of, untimed, write_student

from mint.decoders import load_decoder, lora
from mint.errors import WorkError
from mint.losses import OBJECTIVES
from mint.training import Trainer
from mint.training.batches import CHOSEN, PATHS, REJECTED, TokenPair, batch, step_pairs
from mint.training.objectives import METRICS, batch_loss
from mint.training.runs import read_metrics
from mint.trees import sequence

Grads = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("student"))


def accumulated(trainer: Trainer, **changes: Any) -> tuple[dict[str, float], Grads]:
    """The metrics and the gradients of one step over all pairs."""
    trainer.settings = replace(trainer.settings, **changes)
    trainer.optimizer.zero_grad()
    trainer.decoder.network.train()
    totals, _ = trainer.accumulate(trainer.pairs)
    found = {name: weight.grad.clone() for name, weight in trainer.weights.items()}
    return dict(zip(METRICS, totals.tolist(), strict=True)), found


def assert_same_gradients(one: Grads, other: Grads, relative: float) -> None:
    for name, wanted in one.items():
        error = (other[name] - wanted).abs().max() / wanted.abs().max()
        assert error <= relative, f"{name}: {error:.1e}"


# ---- a step and its pieces ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["prompt+chosen", "chosen"])
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_one_long_batch_equals_its_accumulated_pieces(model: Path, tmp_path: Path, objective: str, scope: str) -> None:
    trainer = trainer_of(model, tmp_path, 7, objective=objective, nll=scope)
    stir(trainer.decoder.network)
    trainer.remember_reference()
    whole, gradients = accumulated(trainer, tokens_per_batch=10_000)
    for budget in (1, 70):
        pieces, found = accumulated(trainer, tokens_per_batch=budget)
        for name in METRICS:
            assert pieces[name] == pytest.approx(whole[name], rel=2e-6, abs=1e-6), name
        assert_same_gradients(gradients, found, 2e-6)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_pieces_add_up_exactly_where_the_network_does_not_round(model: Path, tmp_path: Path, objective: str) -> None:
    """In float64 no more is left of the difference: in float32 it is the network's rounding of other batches, not the sums."""
    trainer = trainer_of(model, tmp_path, 7, objective=objective, dtype="float64")
    stir(trainer.decoder.network)
    trainer.remember_reference()
    whole, gradients = accumulated(trainer, tokens_per_batch=10_000)
    for budget in (1, 70):
        pieces, found = accumulated(trainer, tokens_per_batch=budget)
        assert pieces["loss"] == pytest.approx(whole["loss"], rel=1e-12)
        assert_same_gradients(gradients, found, 2e-7)  # an adapter is float32


def test_pieces_would_not_add_up_if_each_were_averaged_by_itself(model: Path, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, 7)
    whole, _ = accumulated(trainer)
    alone = []
    for pair in trainer.pairs:
        totals, _ = trainer.accumulate([pair])
        alone.append(totals[METRICS.index("nll_loss")].item())
    assert abs(sum(alone) / len(alone) - whole["nll_loss"]) > 1e-3  # the oracle can see the lengths


def test_a_difference_of_long_sums_is_exact(model: Path, tmp_path: Path) -> None:
    """An answer as likely as its reference has no margin; sums in float32 would leave one of a millionth of them."""
    trainer = trainer_of(model, tmp_path, objective="ipo")
    part = batch(trainer.pairs)
    logp = -9 * torch.rand(len(part.tree.labels), generator=torch.Generator().manual_seed(0))
    reference = part.tree.path_sums(logp.double()).view(-1, PATHS)[:, [CHOSEN, REJECTED]]
    loss, _ = batch_loss(logp, part, trainer.settings, 1, len(trainer.pairs), reference)
    assert float(loss) == pytest.approx((1 / (2 * trainer.settings.beta)) ** 2, rel=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("objective", ["orpo", "dpo"])
def test_recomputing_activations_changes_nothing(model: Path, tmp_path: Path, objective: str, dropout: float) -> None:
    trainer = trainer_of(model, tmp_path, 5, objective=objective, dropout=dropout)
    stir(trainer.decoder.network)
    trainer.remember_reference()
    torch.manual_seed(3)
    plain, gradients = accumulated(trainer)
    trainer.decoder.network.model.recompute = True
    torch.manual_seed(3)
    again, found = accumulated(trainer)
    assert again == plain
    assert all(torch.equal(gradients[name], found[name]) for name in gradients)


@pytest.mark.parametrize("recompute", [False, True])
def test_freed_memory_is_kept_unless_activations_are_computed_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    kept: list[bool] = []
    monkeypatch.setattr("mint.training.keep_freed_memory", kept.append)
    trainer_of(model, tmp_path, 1, recompute=recompute)
    assert kept == [not recompute]


def test_supervised_training_never_computes_a_rejected_answer(model: Path, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, 4, objective="sft")
    found, gradients = accumulated(trainer)
    other = [replace(pair, rejected=[*pair.rejected[: pair.rejected_first], 5]) for pair in trainer.pairs]
    trainer.pairs = other
    again, same = accumulated(trainer)
    assert found == again
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    row = trainer.advance()
    assert row["rewards/chosen"] is None is row["log_odds_chosen"]
    assert row["loss"] == row["nll_loss"] == pytest.approx(-row["logps/chosen"], rel=0.2)


# ---- likelihood and reference ---------------------------------------------------------------------------------------


def token_logps(model: Any, ids: list[int]) -> torch.Tensor:
    """log p of every token but the first, from the logits of transformers."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("objective", ["orpo", "sft"])
@pytest.mark.parametrize("scope", ["prompt+chosen", "chosen"])
def test_the_likelihood_is_pooled_over_the_tokens_of_its_scope(
    model: Path, tmp_path: Path, objective: str, scope: str
) -> None:
    trainer = trainer_of(model, tmp_path, 5, objective=objective, nll=scope)
    found, _ = accumulated(trainer)
    oracle = transformers_of(model)
    firsts = [pair.chosen_first - 1 if scope == "chosen" else 0 for pair in trainer.pairs]
    each = zip(trainer.pairs, firsts, strict=True)
    logps = torch.cat([token_logps(oracle, pair.chosen)[first:] for pair, first in each])
    assert found["nll_loss"] == pytest.approx(-logps.mean().item(), rel=1e-5)


@pytest.mark.parametrize("scope", ["prompt+chosen", "chosen"])
def test_the_first_name_counts_as_often_as_asked(model: Path, tmp_path: Path, scope: str) -> None:
    trainer = trainer_of(model, tmp_path, 5, nll=scope)
    stir(trainer.decoder.network)
    trainer.pairs = [replace(pair, first_end=pair.chosen_first + 2) for pair in trainer.pairs]
    plain, _ = accumulated(trainer)
    whole, gradients = accumulated(trainer, first_weight=4.0)
    pieces, found = accumulated(trainer, first_weight=4.0, tokens_per_batch=1)
    assert pieces["nll_loss"] == pytest.approx(whole["nll_loss"], rel=2e-6)
    assert_same_gradients(gradients, found, 2e-6)
    with torch.no_grad():
        each = {pair.id: trainer.decoder.token_logp(sequence(pair.chosen)) for pair in trainer.pairs}
    total, count = 0.0, 0
    for pair in trainer.pairs:
        start = pair.chosen_first - 1
        weights = torch.ones(len(pair.chosen) - 1)
        weights[:start] = scope == "prompt+chosen"
        weights[start : start + 2] = 4
        total, count = total + (each[pair.id] * weights).sum().item(), count + int(weights.sum())
    assert whole["nll_loss"] == pytest.approx(-total / count, rel=1e-5)
    assert abs(whole["nll_loss"] - plain["nll_loss"]) > 1e-3
    assert whole["log_odds_chosen"] == pytest.approx(plain["log_odds_chosen"], rel=1e-6)  # the odds stay the paper's


def test_orpo_takes_the_prompt_in_and_sft_the_answer_unless_told_otherwise(model: Path, tmp_path: Path) -> None:
    assert trainer_of(model, tmp_path).settings.scope == "prompt+chosen"
    assert trainer_of(model, tmp_path, objective="sft").settings.scope == "chosen"
    assert trainer_of(model, tmp_path, objective="sft", nll="prompt+chosen").settings.scope == "prompt+chosen"


@pytest.mark.parametrize("objective", ["dpo", "ipo"])
def test_with_a_fresh_adapter_the_policy_is_its_reference(model: Path, tmp_path: Path, objective: str) -> None:
    trainer = trainer_of(model, tmp_path, objective=objective, beta=0.5)
    trainer.remember_reference()
    found, _ = accumulated(trainer)
    assert found["loss"] == pytest.approx(math.log(2) if objective == "dpo" else 1.0, abs=1e-6)
    assert found["rewards/chosen"] == found["rewards/rejected"] == pytest.approx(0.0, abs=1e-6)


def test_the_reference_is_the_base_with_the_adapter_off_and_is_computed_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(model, tmp_path, 4, held_out=2, objective="dpo", tokens_per_batch=60, steps=4)
    stir(trainer.decoder.network)
    calls: list[int] = []
    real = trainer.decoder.token_logp

    def counting(tree: Any) -> torch.Tensor:
        calls.append(len([layer for layer in lora.adapted(trainer.decoder.network).values() if not layer.enabled]))
        return real(tree)

    monkeypatch.setattr(trainer.decoder, "token_logp", counting)
    trainer.run()
    off = [at for at, count in enumerate(calls) if count]
    assert off == list(range(len(off)))  # only before the first step
    oracle = transformers_of(model)
    everything = [*trainer.pairs, *trainer.held_out]
    for pair in everything:
        sides = ((pair.chosen, pair.chosen_first), (pair.rejected, pair.rejected_first))
        wanted = torch.stack([token_logps(oracle, ids)[first - 1 :].sum() for ids, first in sides])
        torch.testing.assert_close(trainer.reference[trainer.place[pair.id]], wanted.double(), rtol=1e-5, atol=1e-4)
    tensors, _ = saved(tmp_path)
    assert torch.equal(tensors["reference"], trainer.reference)


# ---- a step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.0, 0.01])
def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_told(
    model: Path, tmp_path: Path, limit: float
) -> None:
    trainer = trainer_of(model, tmp_path, max_grad_norm=limit)
    row = trainer.advance()
    norm = torch.stack([weight.grad.norm() for weight in trainer.weights.values()]).norm().item()
    assert row["grad_norm"] > 0.05
    assert norm == pytest.approx(limit or row["grad_norm"], rel=1e-4)


def test_a_line_of_metrics_has_every_name_and_only_numbers(model: Path, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, 6, steps=5)
    trainer.run()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["epoch"] for row in rows] == [0.5, 1.0, 1.5, 2.0, 2.5]
    facts = {"step", "epoch", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "step_seconds"}
    for row in rows:
        assert set(row) == {*METRICS, *facts, "peak_memory_bytes"}
        assert all(math.isfinite(value) for value in row.values())
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["step_seconds"])
        assert row["peak_memory_bytes"] > 1 << 20
        assert row["loss"] == pytest.approx(row["nll_loss"] - 0.1 * row["log_odds_ratio"], rel=1e-5)
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_learns_in_bfloat16_and_float32(model: Path, tmp_path: Path, objective: str) -> None:
    for dtype in ("bfloat16", "float32"):
        out = tmp_path / dtype
        trainer = trainer_of(model, out, 4, objective=objective, dtype=dtype, steps=8, lr=5e-3, beta=0.5)
        trainer.run()
        rows = read_metrics(out / "metrics.jsonl")
        assert rows[-1]["loss"] < rows[0]["loss"] - 0.01
        assert all(weight.dtype == torch.float32 for weight in trainer.weights.values())


SCHEDULES = {
    ("constant", 0.0): [1, 1, 1, 1],
    ("constant", 0.5): [0.5, 1, 1, 1],
    ("linear", 0.0): [1, 0.75, 0.5, 0.25],
    ("linear", 0.3): [0.5, 1, 1, 0.5],  # 1.2 steps of warm-up are two
    ("cosine", 0.0): [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2],
    ("cosine", 1.0): [0.25, 0.5, 0.75, 1],
}


@pytest.mark.parametrize(("shape", "warmup"), SCHEDULES)
def test_the_learning_rate_rises_and_falls_as_asked(model: Path, tmp_path: Path, shape: str, warmup: float) -> None:
    trainer = trainer_of(model, tmp_path, 3, steps=4, schedule=shape, warmup=warmup, lr=0.01)
    trainer.run()
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rates == pytest.approx([0.01 * share for share in SCHEDULES[shape, warmup]])


# ---- numbers that are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_no_number_stops_with_its_pairs_and_the_checkpoint_is_intact(
    model: Path, tmp_path: Path, value: float
) -> None:
    trainer = trainer_of(model, tmp_path, 6, batch_size=2, epochs=1.0, save_every=1)
    last = step_pairs(trainer.pairs, 2, trainer.settings)
    poisoned = replace(last[0], chosen=[*last[0].chosen[:-1], 250, last[0].chosen[-1]])
    trainer.pairs = [poisoned if pair.id == poisoned.id else pair for pair in trainer.pairs]
    with torch.no_grad():
        table = trainer.decoder.network.model.embed_tokens
        table.weight = torch.nn.Parameter(table.weight.clone(), requires_grad=False)  # the head keeps its own
        table.weight[250] = value
    with pytest.raises(WorkError) as caught:
        trainer.run()
    message = str(caught.value)
    assert message.startswith("step 3: loss ")
    assert f"pairs of the step: {last[0].id!r}, {last[1].id!r}; nothing of it was kept" in message
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    tensors, numbers = saved(tmp_path)
    assert numbers["step"] == 2
    for name, weight in trainer.weights.items():
        assert torch.equal(tensors[name], weight)
        assert weight.isfinite().all()


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_the_best_adapter_on_the_held_out_pairs_is_kept(model: Path, tmp_path: Path) -> None:
    """Held-out answers in other letters get worse in the end: what is kept is the adapter of a run that ended before."""
    settings: dict[str, Any] = {"objective": "sft", "lr": 0.02, "batch_size": 2, "eval_every": 1}
    trainer = trainer_of(model, tmp_path / "long", 4, held_out=4, steps=11, **settings)
    trainer.held_out = [
        replace(pair, chosen=[*pair.chosen[:-1], *range(200, 205), pair.chosen[-1]]) for pair in trainer.held_out
    ]
    trainer.run()
    rows = read_metrics(tmp_path / "long" / "evaluations.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 12))
    losses = [row["loss"] for row in rows]
    turn = losses.index(min(losses)) + 1
    assert 1 < turn < 11
    short = trainer_of(model, tmp_path / "short", 4, steps=turn, **settings)
    short.run()
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "long" / weights).read_bytes() == (tmp_path / "short" / weights).read_bytes()
    kept = load_decoder(model, adapter=tmp_path / "long/adapter", device="cpu", dtype="float32")
    nll = held_out_nll(kept, trainer.held_out)
    assert nll == pytest.approx(min(losses), rel=1e-5)


def held_out_nll(decoder: Any, pairs: Any) -> float:
    """Mean over the tokens of all chosen answers."""
    made = batch(pairs, with_prompt=False, with_rejected=False)
    with torch.no_grad():
        sums = made.tree.path_sums(decoder.token_logp(made.tree))
    return -(sums.sum() / made.tree.path_lengths().sum()).item()


def test_evaluation_changes_nothing_of_the_training(model: Path, tmp_path: Path) -> None:
    rows = []
    for name, held_out in (("with", 3), ("without", 0)):
        trainer = trainer_of(model, tmp_path / name, 5, held_out=held_out, steps=5, dropout=0.3, eval_every=2)
        trainer.run()
        rows.append(untimed(read_metrics(tmp_path / name / "metrics.jsonl")))
    assert rows[0] == rows[1]
    assert [row["step"] for row in read_metrics(tmp_path / "with/evaluations.jsonl")] == [2, 4, 5]
    assert not (tmp_path / "without/evaluations.jsonl").exists()


def test_without_a_held_out_part_the_last_adapter_is_kept(model: Path, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, 4, steps=3)
    trainer.run()
    kept = load_decoder(model, adapter=tmp_path / "adapter", device="cpu", dtype="float32")
    for name, layer in lora.adapted(kept.network).items():
        assert torch.equal(layer.lora_A, trainer.weights[f"{name}.lora_A"])
        assert torch.equal(layer.lora_B, trainer.weights[f"{name}.lora_B"])
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8.0, str(model))


def test_a_run_repeats_bit_for_bit_and_the_seed_matters(model: Path, tmp_path: Path) -> None:
    runs = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        trainer = trainer_of(model, tmp_path / name, 5, steps=4, dropout=0.2, seed=seed)
        torch.rand(len(name))  # what was drawn before does not matter
        trainer.run()
        runs.append(untimed(read_metrics(tmp_path / name / "metrics.jsonl")))
    assert runs[0] == runs[1] != runs[2]


def test_pairs_of_which_all_is_shared_but_the_last_token_still_train(model: Path, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, 1, steps=3, lr=5e-3, objective="simpo", beta=2.0)
    (pair,) = trainer.pairs
    ids = pair.chosen[:-1]
    trainer.pairs = [TokenPair(pair.id, [*ids, 3, 276], [*ids, 4, 276], pair.chosen_first, pair.chosen_first)]
    trainer.run()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["log_odds_chosen"] > rows[0]["log_odds_chosen"]
