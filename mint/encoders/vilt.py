"""ViLT, the fusion encoder: a note and a photo go through one transformer, and a classifier ranks the classes.

The layout is transformers' ViltForQuestionAnswering, which GestaltMML is trained in; parameter names are the
checkpoint's. Shapes: B batch, L text tokens, P patches, T = L + 1 + P tokens, D width, C classes, h x w patch grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import ACTIVATIONS, attend, read_section


@dataclass(frozen=True, slots=True)
class ViltConfig:
    """The keys of config.json that shape the network; the defaults are those of ViLT-B/32."""

    vocab_size: int = 30522
    type_vocab_size: int = 2
    modality_type_vocab_size: int = 2
    max_position_embeddings: int = 40
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: int = 384
    patch_size: int = 32
    num_channels: int = 3
    qkv_bias: bool = True

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str = "config.json") -> ViltConfig:
        """From config.json. `max_image_length` is left out: it draws random patches in training, here all are used."""
        return read_section(cls, values, where)

    @property
    def grid(self) -> int:
        """Patches along one side of the picture that the position table was made for."""
        return self.image_size // self.patch_size


class Dense(nn.Module):
    """One linear map under the name `dense`, as the checkpoint has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dense(x)
        return out


class TextEmbeddings(nn.Module):
    """Word + position + token type, then LayerNorm: ids (B, L) -> (B, L, D)."""

    def __init__(self, config: ViltConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.word_embeddings(ids) + self.token_type_embeddings.weight[0]
        x = x + self.position_embeddings.weight[: ids.shape[1]]
        out: Tensor = self.dropout(self.LayerNorm(x))
        return out


class PatchEmbeddings(nn.Module):
    """Pixels (B, 3, H, W) -> (B, D, h, w)."""

    def __init__(self, config: ViltConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=size, stride=size)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.projection(pixels)
        return out


class ViltEmbeddings(nn.Module):
    """A note and a photo as one sequence (B, T, D), [text | image CLS | patches], and its mask (B, T)."""

    def __init__(self, config: ViltConfig) -> None:
        super().__init__()
        self.text_embeddings = TextEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embeddings = PatchEmbeddings(config)
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.grid**2 + 1, config.hidden_size))
        self.token_type_embeddings = nn.Embedding(config.modality_type_vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.grid = config.grid

    def forward(self, ids: Tensor, text_mask: Tensor, pixels: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        text = self.text_embeddings(ids) + self.token_type_embeddings.weight[0]
        patches, patch_mask = self._patches(pixels, pixel_mask)
        cls = (self.cls_token + self.position_embeddings[:, :1]).expand(len(ids), -1, -1)
        picture = self.dropout(torch.cat([cls, patches], dim=1)) + self.token_type_embeddings.weight[1]
        seen = patch_mask.new_ones(len(ids), 1)
        return torch.cat([text, picture], dim=1), torch.cat([text_mask.bool(), seen, patch_mask], dim=1)

    def _patches(self, pixels: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Patch states with positions (B, P, D) and which are real (B, P), row by row from the top left.

        P is the largest number of patches that one picture has, not the whole grid of the batch: a tall and a wide
        picture together need no more tokens than each alone.
        """
        x = self.patch_embeddings(pixels)  # (B, D, h, w)
        height, width = x.shape[2:]
        valid = F.interpolate(pixel_mask[:, None].float(), size=(height, width))[:, 0] > 0  # nearest: (B, h, w)
        x = x.flatten(2).transpose(1, 2) + self._positions(valid)
        valid = valid.flatten(1)
        longest = int(valid.sum(1).max())
        if longest < valid.shape[1]:
            order = valid.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
            x, valid = x.gather(1, order[..., None].expand(-1, -1, x.shape[2])), valid.gather(1, order)
        return x, valid

    def _positions(self, valid: Tensor) -> Tensor:
        """The position table stretched to each picture's own grid, padded to the batch's: (B, h, w) -> (B, h*w, D)."""
        height, width = valid.shape[1:]
        sizes = torch.stack([valid[:, :, 0].sum(1), valid[:, 0].sum(1)], dim=1).tolist()
        table = self.position_embeddings[0, 1:].T.reshape(-1, self.grid, self.grid)  # (D, g, g)
        made: dict[tuple[int, int], Tensor] = {}
        for rows, columns in sizes:
            if (rows, columns) not in made:
                grid = stretch(self.grid, rows).to(table) @ table @ stretch(self.grid, columns).to(table).T
                made[rows, columns] = F.pad(grid, (0, width - columns, 0, height - rows)).flatten(1).T
        return torch.stack([made[rows, columns] for rows, columns in sizes])


def stretch(old: int, new: int) -> Tensor:
    """Weights (new, old) of linear interpolation from `old` points to `new` between the same two ends.

    As a matrix it has a gradient that is summed in one order on every device, so training repeats bit for bit.
    """
    places = torch.linspace(0, old - 1, new)
    return (1 - (places[:, None] - torch.arange(old)).abs()).clamp_min(0)


class SelfAttention(nn.Module):
    def __init__(self, config: ViltConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.query = nn.Linear(width, width, bias=config.qkv_bias)
        self.key = nn.Linear(width, width, bias=config.qkv_bias)
        self.value = nn.Linear(width, width, bias=config.qkv_bias)
        self.heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, x: Tensor, mask: Tensor | None, rows: int | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return attend(self.query(x[:, :rows]), self.key(x), self.value(x), self.heads, mask, dropout=dropout)


class Attention(nn.Module):
    def __init__(self, config: ViltConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.output = Dense(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None, rows: int | None) -> Tensor:
        out: Tensor = self.output(self.attention(x, mask, rows))
        return out


class ViltLayer(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)). With `rows`, only the first rows come out."""

    def __init__(self, config: ViltConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Dense(config.hidden_size, config.intermediate_size)
        self.output = Dense(config.intermediate_size, config.hidden_size)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor, mask: Tensor | None, rows: int | None = None) -> Tensor:
        x = x[:, :rows] + self.dropout(self.attention(self.layernorm_before(x), mask, rows))
        out: Tensor = x + self.dropout(self.output(self.activation(self.intermediate(self.layernorm_after(x)))))
        return out


class ViltEncoder(nn.Module):
    def __init__(self, config: ViltConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(ViltLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """States of the first token (B, 1, D), the only ones that are pooled: the last block computes no others."""
        for layer in self.layer[:-1]:
            x = layer(x, mask)
        out: Tensor = self.layer[-1](x, mask, rows=1)
        return out


class ViltModel(nn.Module):
    """Note and photo -> the pooled state of the text's [CLS] token (B, D)."""

    def __init__(self, config: ViltConfig) -> None:
        super().__init__()
        self.embeddings = ViltEmbeddings(config)
        self.encoder = ViltEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = Dense(config.hidden_size, config.hidden_size)

    def forward(self, ids: Tensor, text_mask: Tensor, pixels: Tensor, pixel_mask: Tensor) -> Tensor:
        x, mask = self.embeddings(ids, text_mask, pixels, pixel_mask)
        x = self.encoder(x, None if bool(mask.all()) else mask)
        return torch.tanh(self.pooler(self.layernorm(x)[:, 0]))


class ViltForQuestionAnswering(nn.Module):
    """ids (B, L), text mask (B, L), pixels (B, 3, H, W), pixel mask (B, H, W) -> logits (B, C)."""

    def __init__(self, config: ViltConfig, classes: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.vilt = ViltModel(config)
        # The norm in the classifier has PyTorch's own epsilon, 1e-5, whatever config.json says of the others.
        self.classifier = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, classes)
        )

    def forward(self, ids: Tensor, text_mask: Tensor, pixels: Tensor, pixel_mask: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.vilt(ids, text_mask, pixels, pixel_mask))
        return out


@torch.no_grad()
def initialise(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """Fresh weights drawn from `generator`: normal for maps and tables, zero for biases, one for norms."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
