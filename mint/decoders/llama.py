"""The Llama 3.x text decoder: token ids in, hidden states out. Module names are the checkpoint's, so loading is a copy.

Shapes: N tokens of all rows in one line, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import CheckpointError
from .layers import Attend, Block, Embedding, Head, RMSNorm, Rope, Turning


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The numbers of `config.json` that shape the network."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, float] | None
    max_position_embeddings: int
    tie_word_embeddings: bool

    @classmethod
    def read(cls, config: dict[str, Any], where: str = "config.json") -> LlamaConfig:
        """The configuration, strictly: what would change the mathematics and is not implemented is refused by name."""
        for name, wanted in _ONLY.items():
            if config.get(name, wanted) not in (wanted, None):
                raise CheckpointError(f"{where}: {name} is {config[name]!r}; only {wanted!r} is implemented")
        heads = _whole(config, "num_attention_heads", where)
        width = _whole(config, "hidden_size", where)
        return cls(
            vocab_size=_whole(config, "vocab_size", where),
            hidden_size=width,
            intermediate_size=_whole(config, "intermediate_size", where),
            num_hidden_layers=_whole(config, "num_hidden_layers", where, most=1000),
            num_attention_heads=heads,
            num_key_value_heads=_divides(_whole(config, "num_key_value_heads", where, heads), heads, where),
            head_dim=_even(_whole(config, "head_dim", where, width // heads), where),
            rms_norm_eps=_number(config, "rms_norm_eps", where, 1e-6),
            max_position_embeddings=_whole(config, "max_position_embeddings", where, 2048),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            **_rope(config, where),
        )


_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "quantization_config": None,
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _number(config: dict[str, Any], name: str, where: str, default: float | None = None) -> float:
    found = config.get(name)
    if found is None and default is not None:
        return default
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < 1e18:
        raise CheckpointError(f"{where}: {name} is {found!r}; wanted a positive number")
    return found


def _whole(config: dict[str, Any], name: str, where: str, default: int | None = None, most: int = 1 << 24) -> int:
    found = _number(config, name, where, default)
    if found != int(found) or found > most:
        raise CheckpointError(f"{where}: {name} is {found!r}; wanted a whole number of at most {most:,}")
    return int(found)


def _divides(kv_heads: int, heads: int, where: str) -> int:
    if heads % kv_heads:
        raise CheckpointError(f"{where}: num_key_value_heads is {kv_heads}; wanted a divisor of the {heads} heads")
    return kv_heads


def _even(head_dim: int, where: str) -> int:
    if head_dim % 2:
        raise CheckpointError(f"{where}: head_dim is {head_dim}; wanted an even number, for positions turn pairs of it")
    return head_dim


def _rope(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Both styles: `rope_theta` beside `rope_scaling`, and everything inside `rope_parameters`."""
    inside = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or inside
    if not isinstance(scaling, dict) or not isinstance(inside, dict):
        raise CheckpointError(f"{where}: rope_scaling is {scaling!r}; wanted an object with rope_type")
    theta = _number({**config, **inside, **scaling}, "rope_theta", where, 10000.0)
    if inside.get("partial_rotary_factor") not in (1.0, None):
        found = inside["partial_rotary_factor"]
        raise CheckpointError(f"{where}: partial_rotary_factor is {found!r}; only 1.0 is implemented")
    kind = scaling.get("rope_type", scaling.get("type", None if "factor" in scaling else "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "llama3":
        raise CheckpointError(f"{where}: rope_type is {kind!r}; only 'default' and 'llama3' are implemented")
    numbers = {name: _number(scaling, name, where) for name in _LLAMA3}
    if not numbers["low_freq_factor"] < numbers["high_freq_factor"]:
        raise CheckpointError(
            f"{where}: rope low_freq_factor is not below high_freq_factor; both stand in rope_scaling"
        )
    return {"rope_theta": theta, "rope_scaling": numbers}


class LlamaModel(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                config.rms_norm_eps,
                layer,
            )
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = Rope(config.head_dim, config.rope_theta, config.rope_scaling)
        self.recompute = False  # activation checkpointing: keep each block's input alone, compute the rest again

    def forward(self, ids: Tensor, position: Tensor, attend: Attend | Turning) -> Tensor:
        """Hidden states after the last norm: ids (N,), position (N,) -> (N, D)."""
        x = self.embed_tokens(ids)
        angles = self.rope(position, x.dtype)
        for block in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, angles, attend, use_reentrant=False, preserve_rng_state=True)
            else:
                x = block(x, angles, attend)
        out: Tensor = self.norm(x)
        return out


class Llama(nn.Module):
    """The decoder with its head, under the names of the official checkpoint (`model.…`, `lm_head.weight`)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def text(self) -> LlamaModel:
        return self.model

    def units(self) -> Iterator[nn.Module]:
        """What computes by itself, inner before outer: where a decoder is spread over ranks, the weights of one such unit
        come together for as long as it does."""
        yield from self.model.layers
        yield self.model

    def forward(self, ids: Tensor, position: Tensor, attend: Attend | Turning) -> Tensor:
        """Hidden states, ready for the head: (N,), (N,) -> (N, D)."""
        out: Tensor = self.model(ids, position, attend)
        return out
