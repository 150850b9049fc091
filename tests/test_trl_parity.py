"""Alignment against TRL and PEFT: one checkpoint, one adapter, the same pairs in the same order, float32.

The first step agrees to 1e-5 in loss, likelihood, log odds and rewards; 20 steps of training follow TRL's loss curve.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from students import (
    chat_pairs,
    peers,
    run_settings,
    stir,
    text_pairs,
    transformers_of,
    write_chat_template,
    write_student,
)

from mint.config import AlignSettings
from mint.decoders import load_decoder, lora
from mint.pipeline import align
from mint.training.batches import step_pairs, token_pairs
from mint.training.runs import read_metrics
from mint.types import PreferencePair
from mint.weights.adapters import write_adapter

STEPS, SIZE, COUNT = 20, 4, 32  # every step is full, as TRL's are
CLIP = 0.7  # low enough that the gradients of some steps are clipped
Rows = list[dict[str, Any]]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_template(write_student(tmp_path_factory.mktemp("student")))


@pytest.fixture(scope="session")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both sides start: not at zero, so that policy and reference differ from the first step on."""
    network = load_decoder(model, device="cpu", dtype="float32").network
    lora.attach(network, "all-linear", rank=4, alpha=8.0)
    stir(network, std=0.03)
    folder = tmp_path_factory.mktemp("start") / "adapter"
    write_adapter(folder, {"r": 4, "lora_alpha": 8.0, "target_modules": TARGETS}, lora.tensors(network), model)
    return folder


def settings_of(model: Path, adapter: Path, out: Path, objective: str, **changes: Any) -> AlignSettings:
    usual: dict[str, Any] = {
        "model": str(model), "adapter": str(adapter), "out": str(out), "objective": objective, "beta": 0.3,
        "batch_size": SIZE, "steps": STEPS, "lr": 2e-3, "max_grad_norm": CLIP, "tokens_per_batch": 90, "save_every": 0,
    }  # fmt: skip
    return run_settings(**{**usual, **changes})


def in_order(pairs: list[PreferencePair], settings: AlignSettings) -> list[PreferencePair]:
    """The pairs of all steps, one after the other, as our run takes them."""
    by_id = {pair.id: pair for pair in pairs}
    tokens = token_pairs(pairs, load_decoder(settings.model, device="cpu", date=settings.date).tokenizer, settings)
    return [by_id[pair.id] for step in range(STEPS) for pair in step_pairs(tokens, step, settings)]


def trl_run(pairs: list[PreferencePair], settings: AlignSettings, **changes: Any) -> list[dict[str, float]]:
    """The metrics of each step of TRL's trainer, from the same start; `loss` as computed, not as rounded for the log."""
    with peers():
        import trl
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoTokenizer
        from trl.experimental import orpo

        kinds = {
            "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig, {"beta": settings.beta}),
            "dpo": (trl.DPOTrainer, trl.DPOConfig, {"beta": settings.beta}),
            "ipo": (trl.DPOTrainer, trl.DPOConfig, {"beta": settings.beta, "loss_type": ["ipo"]}),
            "sft": (trl.SFTTrainer, trl.SFTConfig, {"completion_only_loss": settings.scope == "chosen"}),
        }
        trainer_kind, config_kind, own = kinds[settings.objective]
        config = config_kind(
            output_dir=str(Path(settings.out).with_suffix(".trl")), per_device_train_batch_size=SIZE, max_steps=STEPS,
            learning_rate=settings.lr, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
            max_grad_norm=CLIP, optim="adamw_torch", logging_steps=1, bf16=False, gradient_checkpointing=False,
            report_to=[], save_strategy="no", use_cpu=True, max_length=512, train_sampling_strategy="sequential",
            disable_tqdm=True, **{**own, **changes},
        )  # fmt: skip
        trainer = trainer_kind(
            model=transformers_of(Path(settings.model)),
            args=config,
            train_dataset=Dataset.from_list([trl_row(pair, settings.objective) for pair in in_order(pairs, settings)]),
            processing_class=AutoTokenizer.from_pretrained(settings.model, pad_token="<|finetune_right_pad_id|>"),
            peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
        )
        start_from(trainer.model, Path(str(settings.adapter)))
        losses = recorded_losses(trainer)
        trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [{**row, "loss": loss} for row, loss in zip(rows, losses, strict=True)]


def trl_row(pair: PreferencePair, objective: str) -> dict[str, Any]:
    if objective == "sft":
        return {"prompt": pair.prompt, "completion": pair.chosen}
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def start_from(model: Any, adapter: Path) -> None:
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * len(TARGETS)


def recorded_losses(trainer: Any) -> list[float]:
    losses: list[float] = []
    real = trainer.compute_loss

    def compute_loss(*args: Any, **words: Any) -> Any:
        loss = real(*args, **words)
        losses.append(loss.item())
        return loss

    trainer.compute_loss = compute_loss
    return losses


FIRST = {
    "orpo": ("loss", "nll_loss", "log_odds_ratio", "log_odds_chosen", "rewards/chosen", "rewards/rejected",
             "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "grad_norm"),
    "dpo": ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "grad_norm"),
    "ipo": ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "grad_norm"),
    "sft": ("loss", "grad_norm"),
}  # fmt: skip


def assert_parity(ours: list[dict[str, Any]], theirs: list[dict[str, float]], objective: str) -> None:
    assert len(ours) == len(theirs) == STEPS
    for name in FIRST[objective]:
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-5, abs=1e-5), name
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4), f"step {step}"
    assert max(row["grad_norm"] for row in ours) > CLIP
    assert ours[0]["loss"] - ours[-1]["loss"] > 0.05  # it has learned something to follow


CASES = [
    pytest.param("orpo", text_pairs, {}, {}, id="orpo-strings"),
    pytest.param("orpo", chat_pairs, {}, {}, id="orpo-chats"),
    pytest.param("dpo", text_pairs, {}, {}, id="dpo-strings"),
    pytest.param("dpo", chat_pairs, {}, {}, id="dpo-chats"),
    pytest.param("ipo", text_pairs, {}, {}, id="ipo-strings"),
    pytest.param("sft", text_pairs, {}, {}, id="sft-strings"),
    pytest.param("sft", chat_pairs, {"nll": "prompt+chosen"}, {}, id="sft-chats-all-tokens"),
]


@pytest.mark.parametrize(("objective", "kind", "ours", "theirs"), CASES)
def test_a_run_follows_that_of_trl(
    model: Path, adapter: Path, tmp_path: Path, objective: str, kind: Any, ours: Any, theirs: Any
) -> None:
    settings = settings_of(model, adapter, tmp_path / "run", objective, **ours)
    pairs = kind(COUNT)
    align(settings, pairs)
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert_parity(rows, trl_run(pairs, settings, **theirs), objective)


@pytest.fixture(scope="session")
def plain_run(model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    out = tmp_path_factory.mktemp("plain") / "run"
    align(settings_of(model, adapter, out, "orpo"), text_pairs(COUNT))
    return read_metrics(out / "metrics.jsonl")


@pytest.mark.parametrize(
    ("change", "name", "least"),
    [
        pytest.param({"beta": 0.31}, "loss", 1e-3, id="beta"),
        pytest.param({"nll": "chosen"}, "loss", 1e-2, id="scope"),
        pytest.param({"max_grad_norm": 0.0}, "curve", 1e-3, id="clipping"),
        pytest.param({"lr": 2.1e-3}, "curve", 1e-3, id="rate"),
        pytest.param({"weight_decay": 0.5}, "curve", 1e-3, id="decay"),
        pytest.param({"seed": 1}, "loss", 1e-3, id="order"),
    ],
)
def test_the_parity_would_see_another_run(
    model: Path, adapter: Path, plain_run: Rows, tmp_path: Path, change: dict[str, Any], name: str, least: float
) -> None:
    """Each of these makes a difference that is larger than what the parity allows."""
    align(settings_of(model, adapter, tmp_path / "run", "orpo", **change), text_pairs(COUNT))
    found = read_metrics(tmp_path / "run/metrics.jsonl")
    apart = [abs(one["loss"] - other["loss"]) for one, other in zip(found, plain_run, strict=True)]
    assert (apart[0] if name == "loss" else max(apart)) > least
