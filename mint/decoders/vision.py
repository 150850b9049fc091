"""The image tower of Llama 3.2 Vision: tiles of pixels in, features of every patch out. Names are those on disk.

Shapes: N pictures, M tiles of each, S side of a tile, P patches of a tile with its class token, Z = P and its pads,
D width, H heads, d head width, L = M * Z tokens of a picture: all its tiles are one sequence.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ..errors import RecordError
from ..transfer import sent
from .layers import Embedding
from .vision_config import VisionConfig

_ATTENTION = [
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
]
_KEEP_ATTENTION = partial(create_selective_checkpoint_contexts, _ATTENTION)
"""Attention is half of a layer's work and its result as small as the layer's input: kept, not computed again."""


class VisionTower(nn.Module):
    """Patches with their places, a stack of plain layers, a stack of gated ones; the output is the last state of each
    patch followed by what chosen plain layers gave, interleaved feature by feature.

    `checkpointing` keeps for the backward pass what each layer and its attention gave, and computes the rest again.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.checkpointing = False
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.gated_positional_embedding = PositionEmbedding(config)
        self.pre_tile_positional_embedding = TileEmbedding(config)
        self.post_tile_positional_embedding = TileEmbedding(config)
        self.layernorm_pre = nn.LayerNorm(width)
        self.layernorm_post = nn.LayerNorm(width)
        self.transformer = VisionLayers(config, config.num_hidden_layers, gated=False)
        self.global_transformer = VisionLayers(config, config.num_global_layers, gated=True)

    def forward(self, pixels: Tensor, aspect_ratio_ids: Tensor, aspect_ratio_mask: Tensor) -> Tensor:
        """Pixels (N, M, 3, S, S), ids (N,), mask (N, M) of 0 and 1 -> features (N, M, P, D_out).

        Pictures with the same number of tiles are run together, because their attention has one shape.
        """
        counts = _tile_counts(aspect_ratio_mask)
        kinds = sorted(set(counts))
        if len(kinds) == 1:
            return self._features(pixels, aspect_ratio_ids, kinds[0])
        rows = [torch.tensor([row for row, count in enumerate(counts) if count == kind]) for kind in kinds]
        parts = [
            self._features(pixels[row.to(pixels.device)], aspect_ratio_ids[row.to(aspect_ratio_ids.device)], kind)
            for row, kind in zip(rows, kinds, strict=True)
        ]
        back = torch.argsort(torch.cat(rows))
        return torch.cat(parts)[sent(back, parts[0].device)]

    def _features(self, pixels: Tensor, ids: Tensor, present: int) -> Tensor:
        """The features of pictures that all have `present` tiles."""
        config = self.config
        order = TokenOrder(present, config.max_num_tiles, config.patches, config.pads)
        x = order.arrange(F.pad(self._patches(pixels, ids), (0, 0, 0, config.pads)))  # (N, L, D)
        states = self.transformer(x, order.real, self.checkpointing)
        after = self.post_tile_positional_embedding(ids).expand(-1, -1, config.patches + config.pads, -1)
        x = self.layernorm_post(states[-1]) + order.arrange(after)  # the pads get it too
        x = self.global_transformer(x, order.real, self.checkpointing)[-1]
        between = torch.stack([order.restore(states[i]) for i in config.intermediate_layers_indices], -1)
        return torch.cat([order.restore(x), between.flatten(-2)], -1)  # feature f of layer j of J at D + f * J + j

    def _patches(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Each patch embedded and placed, the class token of its tile first: (N, M, P, D)."""
        weight = self.patch_embedding.weight
        tiles = sent(pixels, weight.device).to(weight.dtype).flatten(0, 1)
        x = self.patch_embedding(tiles).flatten(2).transpose(1, 2).unflatten(0, pixels.shape[:2])
        x = x + self.pre_tile_positional_embedding(ids)
        x = torch.cat([self.class_embedding.expand(*x.shape[:2], 1, -1), x], 2)
        placed: Tensor = self.layernorm_pre(self.gated_positional_embedding(x, ids))
        return placed


def _tile_counts(mask: Tensor) -> list[int]:
    """How many tiles each picture has, from its mask of ones and then zeros."""
    rows = mask.tolist()
    for number, row in enumerate(rows):
        if row[0] != 1 or row != sorted(row, reverse=True):
            raise RecordError(f"picture {number} of the batch: aspect_ratio_mask {row}; wanted ones, then zeros")
    return [int(sum(row)) for row in rows]


class TokenOrder:
    """The tokens of a picture with the real ones in front.

    Attention in the tower masks one thing: a pad does not attend to a pad, where a pad is any token of an absent tile
    or one of the zeros behind a tile's patches. Real tokens attend to everything, pads included. No layer knows a
    token's place in the sequence, so with the real tokens in front that mask is two calls of attention without one.
    """

    def __init__(self, present: int, tiles: int, patches: int, pads: int) -> None:
        self.present, self.absent, self.patches, self.pads = present, tiles - present, patches, pads
        self.real = present * patches

    def arrange(self, x: Tensor) -> Tensor:
        """(N, M, Z, D) -> (N, L, D): patches of the tiles that are there, their pads, then the absent tiles."""
        there, absent = torch.split(x, [self.present, self.absent], 1)
        parts = (there[:, :, : self.patches], there[:, :, self.patches :], absent)
        return torch.cat([part.flatten(1, 2) for part in parts], 1)

    def restore(self, x: Tensor) -> Tensor:
        """(N, L, D) -> (N, M, P, D): the patches of every tile in its place, without the pads."""
        stretch = self.patches + self.pads
        there, _, absent = torch.split(x, [self.real, self.present * self.pads, self.absent * stretch], 1)
        there = there.reshape(len(x), self.present, self.patches, -1)
        absent = absent.reshape(len(x), self.absent, stretch, x.shape[-1])
        return torch.cat([there, absent[:, :, : self.patches]], 1)


class TileEmbedding(nn.Module):
    """What is added to all tokens of a tile, by the arrangement of the picture and the tile's place in it."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embedding = Embedding(config.aspect_ratios + 1, config.max_num_tiles * config.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))
        self.tiles = config.max_num_tiles

    def forward(self, ids: Tensor) -> Tensor:
        """(N,) -> (N, M, 1, D)."""
        rows: Tensor = self.embedding(sent(ids, self.gate.device)) * self.gate.tanh()
        return rows.view(len(rows), self.tiles, 1, -1)


class PositionEmbedding(nn.Module):
    """The place of a patch in its tile, and in its tile of its arrangement; one gate shares them out."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        self.embedding = nn.Parameter(torch.zeros(config.patches, config.hidden_size))
        size = config.max_num_tiles * config.patches * config.hidden_size
        self.tile_embedding = Embedding(config.aspect_ratios + 1, size)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """x (N, M, P, D) with the places of its patches added."""
        gate = self.gate.tanh()
        in_arrangement: Tensor = self.tile_embedding(sent(ids, self.gate.device))
        return x + (1 - gate) * self.embedding + gate * in_arrangement.view_as(x)


class VisionLayers(nn.Module):
    """A stack of layers; gives the output of each."""

    def __init__(self, config: VisionConfig, layers: int, gated: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config, gated) for _ in range(layers))

    def forward(self, x: Tensor, real: int, checkpointing: bool) -> list[Tensor]:
        """x (N, L, D) with `real` real tokens in front -> as many (N, L, D) as there are layers."""
        states = []
        for layer in self.layers:
            if checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, real, use_reentrant=False, context_fn=_KEEP_ATTENTION)
            else:
                x = layer(x, real)
            states.append(x)
        return states


class VisionLayer(nn.Module):
    """Attention, then the perceptron, each normalised before and added after; both gated in the second stack."""

    def __init__(self, config: VisionConfig, gated: bool) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.gated = gated
        if gated:
            self.gate_attn = nn.Parameter(torch.zeros(1))
            self.gate_ffn = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, real: int) -> Tensor:
        attended: Tensor = self.self_attn(self.input_layernorm(x), real)
        x = x + (self.gate_attn.tanh() * attended if self.gated else attended)
        thought: Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + (self.gate_ffn.tanh() * thought if self.gated else thought)


class VisionAttention(nn.Module):
    """Attention of real tokens to all, and of the pads behind them to the real ones."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, real: int) -> Tensor:
        """x (N, L, D) -> (N, L, D)."""
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected)  # (N, H, L, d)
        to_all = F.scaled_dot_product_attention(q[:, :, :real], k, v)
        to_real = F.scaled_dot_product_attention(q[:, :, real:], k[:, :, :real], v[:, :, :real])
        mixed = torch.cat([part.transpose(1, 2).flatten(2) for part in (to_all, to_real)], 1)
        out: Tensor = self.o_proj(mixed)
        return out


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out
