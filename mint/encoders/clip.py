"""CLIP, the dual encoder (PLIP has the same layout): pictures and texts become vectors, compared by their cosine.

Parameter names are the checkpoint's, `pre_layrnorm` included. Shapes: B batch, T tokens, D width, E joint width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from .blocks import ACTIVATIONS, attend, read_section

LEGACY_EOS = 2
"""The end-of-text id that the first CLIP files wrongly state; with it, the token with the largest id is pooled."""


@dataclass(frozen=True, slots=True)
class TextConfig:
    """`text_config` of config.json; the defaults are transformers', for CLIP ViT-B/32."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """`vision_config` of config.json; the defaults are transformers', for CLIP ViT-B/32."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True, slots=True)
class ClipConfig:
    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    projection_dim: int = 512

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str = "config.json") -> ClipConfig:
        """From config.json. Some old files have `text_config_dict` or `vision_config_dict`: where present, they win."""
        text = read_section(TextConfig, _section(values, "text_config", where), f"{where}: text_config")
        vision = read_section(VisionConfig, _section(values, "vision_config", where), f"{where}: vision_config")
        joint = values.get("projection_dim", 512)
        if type(joint) is not int or joint < 1:
            raise CheckpointError(f"{where}: projection_dim is {joint!r}, a positive integer was wanted")
        return cls(text, vision, joint)


def _section(values: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    for key in (f"{name}_dict", name):
        found = values.get(key)
        if found is not None:
            if not isinstance(found, Mapping):
                raise CheckpointError(f"{where}: {key} is {type(found).__name__}, an object was wanted; fetch it again")
            return found
    return {}


class ClipAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.heads = heads

    def forward(self, query: Tensor, x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """query (B, Q, D) over x (B, T, D) -> (B, Q, D)."""
        parts = self.q_proj(query), self.k_proj(x), self.v_proj(x)
        out: Tensor = self.out_proj(attend(*parts, self.heads, mask=mask, causal=causal))
        return out


class ClipMlp(nn.Module):
    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class ClipLayer(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TextConfig | VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.self_attn = ClipAttention(width, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = ClipMlp(width, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        states = self.layer_norm1(x)
        x = x + self.self_attn(states, states, None, causal)
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out

    def one(self, x: Tensor, at: Tensor, causal: bool) -> Tensor:
        """What `forward` has at token `at` (B,) of each row, (B, 1, D), without computing the others."""
        row = torch.arange(len(x), device=x.device)
        seen = torch.arange(x.shape[1], device=x.device) <= at[:, None] if causal else None
        states = self.layer_norm1(x)
        x = x[row, at][:, None] + self.self_attn(states[row, at][:, None], states, seen, causal=False)
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class ClipEncoder(nn.Module):
    def __init__(self, config: TextConfig | VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, at: Tensor, causal: bool = False) -> Tensor:
        """States (B, T, D) -> the last state of token `at` (B,) of each row: (B, D)."""
        for layer in self.layers[:-1]:
            x = layer(x, causal)
        last = self.layers[-1]
        assert isinstance(last, ClipLayer)
        return last.one(x, at, causal)[:, 0]


class TextEmbeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        return out


class TextModel(nn.Module):
    """ids (B, T) -> the state of each text's end token (B, D). Causal: padding after the end changes nothing."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = ClipEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.eos = config.eos_token_id

    def forward(self, ids: Tensor) -> Tensor:
        # argmax finds the first of equals: texts are padded with the end token itself, and the first one is the end.
        end = ids.argmax(1) if self.eos == LEGACY_EOS else (ids == self.eos).int().argmax(1)
        out: Tensor = self.final_layer_norm(self.encoder(self.embeddings(ids), end, causal=True))
        return out


class VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, width = config.patch_size, config.hidden_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=size, stride=size, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // size) ** 2 + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, P, D), row by row
        cls = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([cls, patches], dim=1) + self.position_embedding.weight


class VisionModel(nn.Module):
    """pixels (B, 3, S, S) -> the normed state of the class token (B, D)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = ClipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        first = torch.zeros(len(pixels), dtype=torch.long, device=pixels.device)
        out: Tensor = self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(pixels)), first))
        return out


class ClipModel(nn.Module):
    """Two towers into one space; `forward` gives exp(logit_scale) x cosine of every picture with every text."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextModel(config.text)
        self.vision_model = VisionModel(config.vision)
        self.visual_projection = nn.Linear(config.vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def image_features(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> unit vectors (B, E)."""
        return F.normalize(self.visual_projection(self.vision_model(pixels)), dim=-1)

    def text_features(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> unit vectors (B, E)."""
        return F.normalize(self.text_projection(self.text_model(ids)), dim=-1)

    def match(self, images: Tensor, texts: Tensor) -> Tensor:
        """Unit vectors (B, E) and (C, E) -> scores (B, C)."""
        return self.logit_scale.exp() * images @ texts.T

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        return self.match(self.image_features(pixels), self.text_features(ids))
