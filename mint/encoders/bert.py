"""BERT as a text retriever (bge-base-en-v1.5's layout): a text becomes one vector of length 1, its [CLS] state.

Parameter names are the checkpoint's. Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..devices import pick_device
from ..errors import CheckpointError
from ..files import read_json
from ..tokens import Texts, open_bert_texts
from ..weights import fill, open_checkpoint
from .blocks import ACTIVATIONS, attend, read_section

QUESTION = "Represent this sentence for searching relevant passages: "
"""What bge-base-en-v1.5 was trained to see before a question; passages are read as they are."""


@dataclass(frozen=True, slots=True)
class BertConfig:
    """The keys of config.json that shape the network; the defaults are those of BERT base."""

    vocab_size: int = 30522
    type_vocab_size: int = 2
    max_position_embeddings: int = 512
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    position_embedding_type: str = "absolute"

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str = "config.json") -> BertConfig:
        config = read_section(cls, values, where)
        if config.position_embedding_type != "absolute":
            found = config.position_embedding_type
            raise CheckpointError(f"{where}: position_embedding_type is {found!r}; only 'absolute' is implemented")
        return config


class Embeddings(nn.Module):
    """Word + position + type, then LayerNorm: ids (B, T) -> (B, T, D)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.word_embeddings(ids) + self.token_type_embeddings.weight[0]
        out: Tensor = self.LayerNorm(x + self.position_embeddings.weight[: ids.shape[1]])
        return out


class SelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.heads = config.num_attention_heads

    def forward(self, x: Tensor, mask: Tensor | None, rows: int | None) -> Tensor:
        return attend(self.query(x[:, :rows]), self.key(x), self.value(x), self.heads, mask)


class Output(nn.Module):
    """LayerNorm(x + dense(y)): BERT norms after each sum."""

    def __init__(self, inputs: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dense(y) + x)
        return out


class BertLayer(nn.Module):
    """Attention, then feed-forward, each added and normed. With `rows`, only the first rows come out."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": Output(config.hidden_size, config)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = Output(config.intermediate_size, config)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor, mask: Tensor | None, rows: int | None = None) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, mask, rows), x[:, :rows])
        out: Tensor = self.output(self.activation(self.intermediate["dense"](x)), x)
        return out


class Encoder(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The [CLS] states (B, 1, D), the only ones that are used: the last block computes no others."""
        for layer in self.layer[:-1]:
            x = layer(x, mask)
        out: Tensor = self.layer[-1](x, mask, rows=1)
        return out


class Bert(nn.Module):
    """ids (B, T), mask (B, T) -> vectors (B, D) of length 1."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        seen = mask.bool()
        states = self.encoder(self.embeddings(ids), None if bool(seen.all()) else seen)
        return F.normalize(states[:, 0], dim=-1)


class TextEncoder:
    """Texts to vectors of length 1; those of a question and of a passage that answers it are close."""

    def __init__(self, network: Bert, texts: Texts, device: torch.device) -> None:
        self.network, self.texts, self.device = network.eval(), texts, device

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str]) -> Tensor:
        """n texts -> (n, D) float32; what is longer than the network reads is cut."""
        ids, mask = self.texts(texts)
        vectors: Tensor = self.network(ids.to(self.device), mask.to(self.device))
        return vectors.float().cpu()

    def question(self, text: str) -> Tensor:
        """The vector of a question: (D,)."""
        return self.vectors([QUESTION + text])[0]


def open_text_encoder(name: str | Path, device: str = "auto") -> TextEncoder:
    """A BERT checkpoint, folder or hub name; its pooler and any head are left where they are."""
    checkpoint = open_checkpoint(name)
    where = str(checkpoint.folder / "config.json")
    if checkpoint.config.get("model_type") != "bert":
        raise CheckpointError(f"{where}: model_type is {checkpoint.config.get('model_type')!r}; a retriever is 'bert'")
    _check_pooling(checkpoint.folder / "1_Pooling" / "config.json")
    config, place = BertConfig.read(checkpoint.config, where), pick_device(device)
    with torch.device("meta"):
        network = Bert(config)
    fill(network, checkpoint, device=place, dtype=torch.float32, rename=_renamed)
    return TextEncoder(network, open_bert_texts(checkpoint.folder, config.max_position_embeddings), place)


def _renamed(name: str) -> str | None:
    """The network's name of a tensor; None for what stands on top of it."""
    name = name.removeprefix("bert.")
    unused = name.startswith(("pooler.", "cls.")) or name == "embeddings.position_ids"
    return None if unused else name


def _check_pooling(path: Path) -> None:
    """A checkpoint that says how it pools must pool at [CLS]."""
    if path.is_file():
        found = read_json(path, CheckpointError)
        if not isinstance(found, dict) or not found.get("pooling_mode_cls_token"):
            raise CheckpointError(f"{path}: pooling_mode_cls_token is not true; only [CLS] pooling is implemented")
