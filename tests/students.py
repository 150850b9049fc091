"""What the tests of alignment share: soft little students, pairs of words, settings, and the peers they are held against."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_llama
from torch import Tensor

from mint.config import AlignSettings
from mint.decoders import student
from mint.training import Trainer, runs
from mint.training.batches import token_pairs
from mint.types import PreferencePair
from mint.weights.states import load_state, read_shapes
from mint.weights.tensorfiles import write_tensors

ROOT = Path(__file__).resolve().parents[1]
WORDS = [
    "red",
    "blue",
    "tall",
    "short",
    "round",
    "thin",
    "eyes",
    "ears",
    "nose",
    "chin",
    "brow",
    "lip",
    "palm",
    "wide",
    "deep",
]


@contextmanager
def peers() -> Iterator[None]:
    """What transformers, PEFT and TRL warn about themselves is not ours to mend; our own code runs outside of this."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def write_student(folder: Path, **changes: Any) -> Path:
    """A tiny Llama with soft weights, so that log-probabilities and losses are of a usual size."""
    return write_llama(folder, **{"std": 0.08, "num_hidden_layers": 2, **changes})


def sentence(draw: random.Random, low: int, high: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))


def text_pairs(count: int, seed: int = 0) -> list[PreferencePair]:
    """Pairs of plain strings; the answers begin with a space, so that no token spans the boundary."""
    draw = random.Random(seed)
    return [
        PreferencePair(f"pair-{n}", sentence(draw, 4, 9), " " + sentence(draw, 2, 5), " not " + sentence(draw, 1, 5))
        for n in range(count)
    ]


def chat_pairs(count: int, seed: int = 0) -> list[PreferencePair]:
    """The same as conversations."""
    return [
        PreferencePair(
            pair.id,
            [{"role": "user", "content": pair.prompt}],
            *([{"role": "assistant", "content": answer.strip()}] for answer in (pair.chosen, pair.rejected)),
        )
        for pair in text_pairs(count, seed)
    ]


def write_pairs_file(path: Path, pairs: list[PreferencePair]) -> Path:
    rows = [{"id": p.id, "prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_settings(**changes: Any) -> AlignSettings:
    """Settings of a short, repeatable run on the processor."""
    usual: dict[str, Any] = {
        "rank": 4, "alpha": 8.0, "batch_size": 4, "lr": 1e-3, "schedule": "constant", "warmup": 0.0,
        "device": "cpu", "dtype": "float32", "date": "26 Jul 2024", "recompute": False,
    }  # fmt: skip
    return AlignSettings(**{**usual, **changes})


def ids_of(rows: int, tokens: int, seed: int = 0) -> Tensor:
    """Token ids (rows, tokens) without special tokens."""
    return torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def stir(network: torch.nn.Module, seed: int = 1, std: float = 0.05) -> None:
    """Give every LoRA matrix, ours or PEFT's, values that a trained one could have."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def peft_of(base: Path, **config: Any) -> Any:
    """transformers' model with a fresh PEFT adapter, stirred."""
    with peers():
        from peft import LoraConfig, get_peft_model

        made = get_peft_model(transformers_of(base), LoraConfig(task_type="CAUSAL_LM", **config))
    stir(made)
    return made.eval()


def transformers_of(folder: Path) -> Any:
    with peers():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def run_cli(*words: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python cli.py …` in a process of its own."""
    return subprocess.run(
        [sys.executable, "cli.py", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set task = messages[0].content | trim %}"
    "{% set turns = messages[1:] %}{% else %}{% set task = '' %}{% set turns = messages %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    "{{ task }}<|eot_id|>{% for turn in turns %}<|start_header_id|>{{ turn.role }}<|end_header_id|>\n\n"
    "{{ turn.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""The format that `mint.chat` writes, for the peers, who know it from a template alone."""


def write_chat_template(folder: Path) -> Path:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "chat_template": CHAT_TEMPLATE}))
    return folder


def trainer_of(model: Path, out: Path, count: int = 6, held_out: int = 0, **changes: Any) -> Trainer:
    """A trainer on plain-string pairs with a fresh adapter, as `align` builds it; the last pairs are held out."""
    settings = run_settings(model=str(model), out=str(out), **changes)
    decoder, config = student.to_train(settings)
    decoder.network.model.recompute = bool(settings.recompute)
    pairs = token_pairs(text_pairs(count + held_out), decoder.tokenizer, settings)
    return Trainer(decoder, settings, out, pairs[:count], pairs[count:], config)


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what differs from run to run."""
    timings = ("tokens_per_second", "step_seconds", "peak_memory_bytes")
    return [{name: value for name, value in row.items() if name not in timings} for row in rows]


def saved(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The whole tensors and the numbers of a run's checkpoint."""
    numbers = runs.read_state(run)
    assert numbers is not None
    return tensors_of(run / runs.CHECKPOINT), numbers


def tensors_of(state: Path) -> dict[str, Tensor]:
    """All tensors of a state on disk, whole."""
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in read_shapes(state).items()}
    load_state(state, tensors)
    return tensors


def write_state_of_two(folder: Path) -> dict[str, Tensor]:
    """A checkpoint as two ranks write it, each half of the rows or columns of a matrix and one tensor alone."""
    whole = {"rows": torch.randn(5, 3), "columns": torch.randn(2, 4), "step": torch.tensor(3.0), "own": torch.arange(4)}
    parts = [
        {"rows": (0, 0, whole["rows"][:3]), "columns": (0, 0, whole["columns"][:, :2]), "step": (whole["step"],)},
        {"rows": (3, 0, whole["rows"][3:]), "columns": (0, 2, whole["columns"][:, 2:]), "own": (0, whole["own"])},
    ]
    folder.mkdir(parents=True)
    for rank, held in enumerate(parts):
        told = json.dumps({name: {"saved_offsets": begin} for name, (*begin, _) in held.items()})
        with (folder / f"rank-{rank}.safetensors").open("wb") as file:
            write_tensors(file, {name: tensor for name, (*_, tensor) in held.items()}, {"DCP_SHARDING_INFO": told})
    (folder / "state.json").write_text(json.dumps({"step": 3, "best": None, "pairs": "x", "ranks": 2}))
    return whole
