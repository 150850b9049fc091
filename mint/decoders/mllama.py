"""Llama 3.2 Vision: the Llama decoder, some of whose layers look at pictures instead of at the text.

Shapes: N tokens of all texts in one line, D width, H heads, K key-value heads, d head width, S patches of all pictures.
Module names are those that transformers has in memory and adapters use; `in_memory` makes them of the official ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import Attend, Embedding, FeedForward, Head, Linear, RMSNorm, Turning
from .llama import LlamaModel
from .mllama_config import EXTRA_ROWS, MllamaConfig
from .sight import Sight
from .vision import VisionTower


class CrossAttention(nn.Module):
    """Tokens look at patches: no rotary positions, and queries and keys normalised head by head, values not."""

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__()
        width, self.head_width = config.hidden_size, config.head_dim
        self.q_proj = Linear(width, config.num_attention_heads * self.head_width)
        self.k_proj = Linear(width, config.num_key_value_heads * self.head_width)
        self.v_proj = Linear(width, config.num_key_value_heads * self.head_width)
        self.o_proj = Linear(config.num_attention_heads * self.head_width, width)
        self.q_norm = RMSNorm(self.head_width, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_width, config.rms_norm_eps)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States of the patches (S, D) -> keys and values, each (K, S, d)."""
        keys, values = self._heads(self.k_proj(states), self.k_norm), self._heads(self.v_proj(states))
        return keys.transpose(0, 1), values.transpose(0, 1)

    def forward(self, x: Tensor, sight: Sight, keys: Tensor, values: Tensor) -> Tensor:
        """x (N, D) -> (N, D), zero where a token sees nothing."""
        q = self._heads(self.q_proj(x), self.q_norm)
        out: Tensor = self.o_proj(sight.attend(q, keys, values).flatten(1))
        return out

    def _heads(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(N, h * d) -> (N, h, d); a norm is of each head by itself."""
        heads: Tensor = x.unflatten(-1, (-1, self.head_width))
        if norm is not None:
            heads = norm(heads.flatten(0, 1)).view_as(heads)
        return heads


class CrossBlock(nn.Module):
    """x + tanh(gate) looking(norm(x)), then x + tanh(gate) feed-forward(norm(x)) for the tokens after an image."""

    def __init__(self, config: MllamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.cross_attn = CrossAttention(config)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, sight: Sight, keys: Tensor, values: Tensor) -> Tensor:
        looked = self.cross_attn(self.input_layernorm(x), sight, keys, values)
        x = x + self.cross_attn_attn_gate.tanh() * looked
        thought = self.mlp(self.post_attention_layernorm(x)) * sight.after_image(x)
        out: Tensor = x + self.cross_attn_mlp_gate.tanh() * thought
        return out


class MllamaText(LlamaModel):
    """The text decoder with cross-attention in the place of some of its layers, and a few more rows to embed."""

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = Embedding(config.vocab_size + EXTRA_ROWS, config.hidden_size)
        for layer in config.cross_attention_layers:
            self.layers[layer] = CrossBlock(config, layer)

    def forward(self, ids: Tensor, position: Tensor, attend: Attend | Turning, sight: Sight | None = None) -> Tensor:
        """Hidden states after the last norm: ids (N,), position (N,) -> (N, D). Without pictures no layer looks."""
        x = self.embed_tokens(ids)
        angles = self.rope(position, x.dtype)
        for block in self.layers:
            if not isinstance(block, CrossBlock):
                x = self._run(block, x, angles, attend)
            elif sight is not None:
                x = self._run(block, x, sight, *sight.keys_values(block.layer, block.cross_attn.keys_values))
        out: Tensor = self.norm(x)
        return out

    def _run(self, block: nn.Module, *given: Any) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=True)
        else:
            out = block(*given)
        return out


class MllamaModel(nn.Module):
    """The tower, the projector to the decoder's width, the decoder."""

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__()
        self.vision_model = VisionTower(config.vision)
        self.multi_modal_projector = nn.Linear(config.vision.output_size, config.hidden_size)
        self.language_model = MllamaText(config)

    @property
    def embed_tokens(self) -> nn.Embedding:
        return self.language_model.embed_tokens

    @property
    def recompute(self) -> bool:
        """Activation checkpointing, of the decoder's layers and of the tower's."""
        return self.language_model.recompute

    @recompute.setter
    def recompute(self, on: bool) -> None:
        self.language_model.recompute = self.vision_model.checkpointing = on


class Mllama(nn.Module):
    """The decoder with its tower and its head."""

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = MllamaModel(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size)

    @property
    def text(self) -> MllamaText:
        return self.model.language_model

    def units(self) -> Iterator[nn.Module]:
        """As `Llama.units`. Keys and values of the pictures are made outside of the block that they belong to."""
        tower = self.model.vision_model
        yield from (*tower.transformer.layers, *tower.global_transformer.layers, tower)
        yield self.model.multi_modal_projector
        for block in self.text.layers:
            if isinstance(block, CrossBlock):
                yield from (block.cross_attn.k_proj, block.cross_attn.v_proj)
            yield block
        yield self.text

    def forward(self, ids: Tensor, position: Tensor, attend: Attend | Turning, sight: Sight | None = None) -> Tensor:
        """Hidden states, ready for the head: (N,), (N,) -> (N, D)."""
        out: Tensor = self.model.language_model(ids, position, attend, sight)
        return out


class Looking:
    """A network and what its prompts see: the prompts go first, then as many more tokens of each at a time as you like.

    Keys and values of the pictures are made with the prompts and serve all that follows.
    """

    def __init__(self, network: Mllama, sight: Sight) -> None:
        self.network, self.sight, self.lm_head = network, sight, network.lm_head
        self.prompted = False

    def modules(self) -> Iterator[nn.Module]:
        """The parts of the network."""
        return self.network.modules()

    def __call__(self, ids: Tensor, position: Tensor, attend: Attend | Turning) -> Tensor:
        sight = self.sight.following(len(ids)) if self.prompted else self.sight
        self.prompted = True
        out: Tensor = self.network(ids, position, attend, sight)
        return out
