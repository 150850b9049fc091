"""`bench`: the kernels, and a whole step of training, on this machine, as ratios to plain PyTorch.

The step is ORPO on a random Llama with an adapter. Beside ours it is made in the obvious way, which is also its check:
each answer is a row with its prompt before it, padded to the longest; all logits are written out; autograd does the rest.

Shapes: B pairs, T tokens of a row, D width, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import AlignSettings
from .decoders import Decoder, lora
from .decoders.llama import Llama, LlamaConfig
from .errors import ConfigError
from .losses import orpo_loss
from .progress import say
from .training import Trainer
from .training.batches import TokenPair

_kernels, _checks, _measures, _timing = (
    import_module(f".kernels.{name}", __package__) for name in ("bench", "checks", "measures", "timing")
)  # type checkers do not see the folder behind mint.kernels
DEVICE, DTYPE, GPU = _checks.DEVICE, _checks.DTYPE, _checks.GPU

HERE = ("-m", "mint.bench")
BETA, RANK = 0.1, 16
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far the losses of the two ways may be apart, relative to the loss."""


@dataclass(frozen=True, slots=True)
class Network:
    """The size of a random Llama."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int

    @property
    def numbers(self) -> dict[str, Any]:
        """As config.json has them."""
        return {
            "vocab_size": self.vocabulary, "hidden_size": self.width, "intermediate_size": self.inner,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "head_dim": self.head,
            "num_key_value_heads": self.kv_heads, "rope_theta": 500000.0, "tie_word_embeddings": True,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Size(Network):
    """A network, and the tokens of prompt, chosen and rejected answer of each of its pairs."""

    lengths: tuple[int, int, int]
    pairs: int


SIZES = {
    "gpu": Size(2048, 8192, 16, 32, 8, 64, 128256, (512, 128, 128), 8),
    "cpu": Size(384, 1536, 8, 6, 2, 64, 32000, (256, 64, 64), 2),
    "tiny": Size(32, 48, 2, 4, 2, 8, 500, (9, 4, 3), 2),
}
"""Llama 3.2 1B, what a processor does in seconds, and whether it runs."""


def training_step(name: str, _rate: dict[str, float]) -> Iterator[dict[str, Any]]:
    """The losses of both ways on the same weights, and then their time."""
    size = SIZES[name]
    decoder, pairs = random_decoder(size), random_pairs(size)
    first = plain_loss(decoder.network, pairs).item()
    ours = our_step(decoder, pairs)
    apart = abs(ours() / first - 1)
    yield {"check": "training step, loss", "error": apart, "limit": CLOSE[DTYPE], "right": apart <= CLOSE[DTYPE]}
    sides = {"ours": ours, "plain PyTorch": plain_step(decoder.network, pairs)}
    case = f"{size.pairs} pairs of {'/'.join(map(str, size.lengths))}, r {RANK}"
    yield from _timing.compared("training step", case, sides, count=(size.pairs, "pairs"))


def random_decoder(size: Size) -> Decoder:
    """Matrices that keep the size of what goes through, norms one, an adapter that is not zero."""
    with torch.device(DEVICE):
        network = Llama(LlamaConfig.read(size.numbers)).to(DTYPE).requires_grad_(False)
        lora.attach(network, lora.ALL_LINEAR, rank=RANK, alpha=2 * RANK)
        with torch.no_grad():
            for weight in network.parameters():
                weight.normal_(std=size.width**-0.5) if weight.ndim > 1 else weight.fill_(1)
    return Decoder(network, None, torch.device(DEVICE), DTYPE)  # type: ignore[arg-type]  # it was read from no file


def random_pairs(size: Size) -> list[TokenPair]:
    """Pairs of exactly so many tokens."""
    prompts, chosen, rejected = (torch.randint(size.vocabulary, (size.pairs, n)).tolist() for n in size.lengths)
    return [
        TokenPair(str(at), [*p, *c], [*p, *r], len(p), len(p))
        for at, (p, c, r) in enumerate(zip(prompts, chosen, rejected, strict=True))
    ]


def our_step(decoder: Decoder, pairs: Sequence[TokenPair]) -> Callable[[], float]:
    """A step on all pairs at once; gives its loss."""
    trainer = our_trainer(decoder, pairs, sum(pair.size for pair in pairs))
    return lambda: float(trainer.advance()["loss"])


def our_trainer(decoder: Decoder, pairs: Sequence[TokenPair], tokens_per_batch: int) -> Trainer:
    """A trainer whose every step takes all pairs, and that nothing ends."""
    settings = AlignSettings(
        batch_size=len(pairs), steps=10**6, schedule="constant", warmup=0, save_every=0, beta=BETA,
        tokens_per_batch=tokens_per_batch,
    )  # fmt: skip
    decoder.network.train()
    return Trainer(decoder, settings, Path("unused"), pairs)


def plain_step(network: Llama, pairs: Sequence[TokenPair]) -> Callable[[], None]:
    """The same step in the obvious way."""
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=AlignSettings().lr, weight_decay=0.0, fused=GPU or None)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        plain_loss(network, pairs).backward()
        nn.utils.clip_grad_norm_(trained, AlignSettings().max_grad_norm)
        optimizer.step()

    return step


def plain_loss(network: Llama, pairs: Sequence[TokenPair]) -> Tensor:
    """ORPO with the likelihood of prompt and chosen answer, as its official code has it."""
    texts = [(pair.chosen, pair.chosen_first) for pair in pairs]
    texts += [(pair.rejected, pair.rejected_first) for pair in pairs]
    rows = [torch.tensor(ids, device=DEVICE) for ids, _ in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (2 B, T)
    logits = F.linear(plain_hidden(network, ids[:, :-1]), network.lm_head.weight).float()
    logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    answers = (each[p - 1 : len(row) - 1] for each, row, (_, p) in zip(logp, rows, texts, strict=True))
    told = torch.cat([each[: len(row) - 1] for each, row in zip(logp, rows[: len(pairs)], strict=False)])
    chosen, rejected = torch.stack([answer.mean() for answer in answers]).split(len(pairs))
    return orpo_loss(chosen, rejected, nll=-told.mean(), beta=BETA)


def plain_hidden(network: Llama, ids: Tensor) -> Tensor:
    """Hidden states after the last norm, by torch's own functions: (2 B, T) -> (2 B, T, D)."""
    model, eps = network.model, network.config.rms_norm_eps
    x = F.embedding(ids, model.embed_tokens.weight)
    cos, sin = (part[:, 0] for part in model.rope(torch.arange(ids.shape[1], device=DEVICE), x.dtype))  # (T, d / 2)
    blocks: Any = model.layers
    for block in blocks:
        own, mlp = block.self_attn, block.mlp
        normal = F.rms_norm(x, x.shape[-1:], block.input_layernorm.weight, eps)
        q, k, v = (
            adapted(layer, normal).unflatten(-1, (-1, own.head_width)).transpose(1, 2)
            for layer in (own.q_proj, own.k_proj, own.v_proj)
        )
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + adapted(own.o_proj, out.transpose(1, 2).flatten(2))
        normal = F.rms_norm(x, x.shape[-1:], block.post_attention_layernorm.weight, eps)
        x = x + adapted(mlp.down_proj, F.silu(adapted(mlp.gate_proj, normal)) * adapted(mlp.up_proj, normal))
    return F.rms_norm(x, x.shape[-1:], model.norm.weight, eps)


def adapted(layer: Any, x: Tensor) -> Tensor:
    """x Wᵀ + scale (x Aᵀ) Bᵀ."""
    low = F.linear(x, layer.lora_A.to(x.dtype))
    out: Tensor = F.linear(x, layer.weight) + layer.scale * F.linear(low, layer.lora_B.to(x.dtype))
    return out


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: (2 B, H, T, d), cos and sin (T, d / 2)."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


PARTS = {**_measures.PARTS, "step": _timing.Part(training_step, 90)}


@dataclass(frozen=True)
class Results:
    """The report of all parts, as it is printed."""

    report: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return self.report

    def __str__(self) -> str:
        return str(_kernels.table(self.report))

    @property
    def faults(self) -> list[str]:
        """What is not right in it, or came to no end."""
        return list(_kernels.faults(self.report))


def results(out: str | None, seed: int = 0, device: str = "auto", dtype: str = "auto") -> Results:
    """The report of all parts, written to `out` if that is given."""
    measured = {"--device": (device, DEVICE), "--dtype": (dtype, str(DTYPE).removeprefix("torch."))}
    for option, (asked, held) in measured.items():
        if asked not in ("auto", held):
            raise ConfigError(f"{option} {asked}: bench measures {held} on this machine; leave {option} out")
    command = [*HERE, "--seed", str(seed)]
    report: dict[str, Any] = _kernels.run(PARTS, list(PARTS), "gpu" if GPU else "cpu", command, say=say)
    if out is not None:
        _kernels.write(out, report)
    return Results(report)


if __name__ == "__main__":
    sys.exit(_kernels.main(PARTS, HERE, __doc__))
