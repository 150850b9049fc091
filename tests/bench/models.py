"""Random Llamas without files: the decoder of ours and the model of transformers, their steps of training, their text.

Shapes: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mint.kernels.checks import DEVICE, DTYPE

from mint.bench import BETA, Network, our_trainer
from mint.decoders import Decoder, lora
from mint.decoders.llama import Llama, LlamaConfig
from mint.training.batches import TokenPair

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Pair = tuple[list[int], list[int], list[int]]


@dataclass(frozen=True, slots=True)
class Size(Network):
    """A model and what is asked of it; `lengths` are tokens of prompt, chosen and rejected answer."""

    lengths: tuple[tuple[int, int, int], ...]
    step_tokens: int
    prompt: int
    prefill: int
    batches: tuple[int, ...]
    labels: int
    ranks: tuple[int, ...] = (16, 256)
    rounds: int = 3
    steps: int = 48

    @property
    def weights(self) -> int:
        """Elements of the linear layers, without the head."""
        square, narrow = self.width * self.heads * self.head, self.width * self.kv_heads * self.head
        return self.layers * (2 * square + 2 * narrow + 3 * self.width * self.inner)

    def adapters(self, rank: int) -> int:
        q, k = self.heads * self.head, self.kv_heads * self.head
        return self.layers * rank * (2 * (self.width + q) + 2 * (self.width + k) + 3 * (self.width + self.inner))


SIZES = {
    "gpu": Size(3072, 8192, 28, 24, 8, 128, 128256, ((700, 200, 200), (300, 150, 150)), 32768, 512, 8192, (1, 64), 528),
    "cpu": Size(384, 1024, 4, 6, 2, 64, 32000, ((128, 32, 32),), 768, 64, 256, (1, 8), 64, (16,), 2, 8),
    "tiny": Size(32, 48, 2, 4, 2, 8, 500, ((9, 4, 3), (5, 2, 2)), 30, 7, 11, (1, 2), 5, (2, 3), 1, 3),
}
"""Llama 3.2 3B; what a processor does in seconds; whether every line runs."""


class Words:
    """In place of a tokenizer: a label is a few random ids that are its own."""

    stop_ids: tuple[int, ...] = ()

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def special(self, _name: str) -> int:
        return 1

    def encode_all(self, texts: Iterable[str]) -> Iterator[list[int]]:
        drawn = torch.Generator().manual_seed(0)
        for at, _ in enumerate(texts):
            yield [*torch.randint(2, self.vocabulary, (7,), generator=drawn).tolist(), 2 + at % 200, 2 + at // 200]


def decoder_of(size: Size) -> Decoder:
    """A decoder whose weights are drawn where they are used."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        network = Llama(LlamaConfig.read(size.numbers)).to(DTYPE).eval().requires_grad_(False)
    fill(network)
    decoder = Decoder(network, None, torch.device(DEVICE), DTYPE)  # type: ignore[arg-type]  # nothing is read from files
    vars(decoder)["tokenizer"] = Words(size.vocabulary)
    return decoder


def fill(network: torch.nn.Module) -> None:
    """Matrices as narrow as trained ones, norms one."""
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.02) if weight.ndim > 1 else weight.fill_(1)


def theirs(size: Size) -> Any:
    """The same network by transformers."""
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    numbers = size.numbers
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": numbers.pop("rope_theta")}}
    with torch.device(DEVICE):
        model = LlamaForCausalLM(Config(**numbers, **theta)).to(DTYPE).eval()
    fill(model)
    return model


def with_liger(model: Any) -> Any:
    """The same model with Liger's norms and SwiGLU, and no model beside it; TRL's ORPO computes the loss from logits, which
    stay."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=False, rope=False)
    vars(modeling_llama).update(before)
    return model


def turning_with_liger(step: Callable[[], float]) -> Callable[[], float]:
    """The step with Liger's rotation, which takes the place of transformers' for all models of a process, for so long."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb
    from transformers.models.llama import modeling_llama

    def side() -> float:
        theirs, modeling_llama.apply_rotary_pos_emb = modeling_llama.apply_rotary_pos_emb, liger_rotary_pos_emb
        try:
            return step()
        finally:
            modeling_llama.apply_rotary_pos_emb = theirs

    return side


def pairs_of(size: Size, lengths: tuple[int, int, int]) -> list[Pair]:
    """Random pairs of exactly so many tokens, as many as a step has room for."""
    drawn = torch.Generator().manual_seed(0)
    count = max(size.step_tokens // sum(lengths), 1)
    return [
        tuple(torch.randint(2, size.vocabulary, (n,), generator=drawn).tolist() for n in lengths) for _ in range(count)
    ]


def our_step(decoder: Decoder, pairs: list[Pair], tokens_per_batch: int = 8800) -> Callable[[], float]:
    """One ORPO step of the adapter that the decoder has."""
    made = [TokenPair(str(at), p + c, p + r, len(p), len(p)) for at, (p, c, r) in enumerate(pairs)]
    trainer = our_trainer(decoder, made, tokens_per_batch)
    return lambda: float(trainer.advance()["loss"])


def attach(decoder: Decoder, rank: int) -> Decoder:
    lora.attach(decoder.network, "all-linear", rank=rank, alpha=2 * rank)
    return decoder


def trl_step(model: Any, pairs: list[Pair], rank: int, part: int = 4) -> Callable[[], float]:
    """The same step by TRL's ORPO trainer and PEFT's adapter, `part` pairs at a time."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from checkpoints import tokenizer
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token="<|eot_id|>", bos_token="<|begin_of_text|>")
    words.pad_token = "<|finetune_right_pad_id|>"
    args = ORPOConfig(output_dir=tempfile.mkdtemp(), beta=BETA, bf16=False,
                      gradient_checkpointing=False, report_to=[], per_device_train_batch_size=part, max_length=4096,
                      use_cpu=DEVICE == "cpu", disable_tqdm=True)  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR, lora_dropout=0.0)
    trainer = ORPOTrainer(model=model, args=args, train_dataset=rows, processing_class=words, peft_config=adapter)
    network = trainer.model.to(DTYPE).train()
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0)
    batches = [trl_batch(pairs[at : at + part]) for at in range(0, len(pairs), part)]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=DEVICE)
        for batch in batches:
            loss, _ = trainer.get_batch_loss_metrics(network, batch, train_eval="train")
            (loss / len(batches)).backward()
            total += loss.detach() / len(batches)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        return float(total)

    return step


def trl_batch(pairs: list[Pair]) -> dict[str, torch.Tensor]:
    """All texts of some pairs of one length, as TRL's collator has them."""
    batch: dict[str, list[list[int]]] = {}
    for prompt, chosen, rejected in pairs:
        for side, answer in (("chosen", chosen), ("rejected", rejected)):
            batch.setdefault(f"{side}_input_ids", []).append(prompt + answer)
            batch.setdefault(f"{side}_attention_mask", []).append([1] * len(prompt + answer))
            batch.setdefault(f"{side}_labels", []).append([-100] * len(prompt) + answer)
    return {name: torch.tensor(rows, device=DEVICE) for name, rows in batch.items()}
