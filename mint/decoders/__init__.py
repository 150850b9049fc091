"""`load_decoder`: a checkpoint folder or hub name, and an adapter if there is one, as one object that reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..chat import ChatTokenizer, chat_tokenizer
from ..devices import pick_device, pick_dtype
from ..errors import CheckpointError, ConfigError
from ..kernels import token_logprob, tree_attention, tree_layout
from ..trees import forest, sequence
from ..types import TokenTree
from ..weights import FILES, SMALL_FILES, Checkpoint, fill, open_checkpoint
from ..weights.adapters import read_adapter
from . import lora
from .generation import Sampling, generate
from .llama import Llama, LlamaConfig

__all__ = ["Decoder", "load_decoder", "lora", "stored_dtype"]


@dataclass
class Decoder:
    """A text decoder with its tokenizer. Shapes: B rows, T tokens, D width, V vocabulary, E scored edges."""

    network: Any
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    date: str | None = None

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        """Text to ids and back, in the words of the checkpoint's chat template."""
        return chat_tokenizer(self.checkpoint.folder, self.checkpoint.config, date=self.date)

    def hidden(self, tree: TokenTree) -> Tensor:
        """Hidden states of every token of a tree, ready for the head: (T, D)."""
        tree = tree.to(self.device)
        layout = tree_layout(tree.end)
        out: Tensor = self.network(tree.ids, tree.position, lambda _, q, k, v: tree_attention(q, k, v, layout))
        return out

    def token_logp(self, tree: TokenTree) -> Tensor:
        """Log-probability of each scored edge of a tree: (E,) float32, differentiable; sum them with `tree.path_sums`."""
        tree = tree.to(self.device)
        rows, head = self.hidden(tree).index_select(0, tree.sources), self.network.lm_head
        if isinstance(head, lora.LoRALinear) and head.enabled:
            return token_logprob(rows, head.weight, tree.labels, low=head.low(rows), up=head.lora_B.to(rows.dtype))
        return token_logprob(rows, head.weight, tree.labels)

    @torch.inference_mode()
    def logits(self, ids: Tensor | Sequence[Sequence[int]], images: Any = None) -> Tensor:
        """Logits of plain rows: ids (B, T) -> (B, T, V). No padding: rows of unequal length go one by one."""
        self._check_images(images)
        rows = self._rows(ids)
        if len({len(row) for row in rows}) > 1:
            raise ConfigError(f"rows of unequal length {[len(row) for row in rows]}; ask for their logits one by one")
        hidden = self.hidden(forest([sequence(row) for row in rows]))
        out: Tensor = self.network.lm_head(hidden).unflatten(0, (len(rows), -1))
        return out

    def generate(
        self,
        ids: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        *,
        images: Any = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """New tokens of each prompt, up to and with its stop token; the prompts may differ in length."""
        self._check_images(images)
        sampling = Sampling(temperature, top_k, top_p, seed)
        stops = self.tokenizer.stop_ids
        return generate(self.network, self._rows(ids), max_new_tokens, sampling, stops, self.device, on_token)

    def _check_images(self, images: Any) -> None:
        if images is not None and any(images):
            raise ConfigError(f"{self.checkpoint.name}: reads text alone; images need a Llama 3.2 Vision model")

    def _rows(self, ids: Any) -> list[list[int]]:
        """Token ids (B, T), or rows of unequal length, as lists; each an id that the model has."""
        try:
            rows = [[index(token) for token in _plain(row)] for row in _plain(ids)]
        except TypeError:
            raise ConfigError("ids are (B, T), rows of whole numbers; found something else") from None
        found, count = [token for row in rows for token in row], self.network.model.embed_tokens.num_embeddings
        if found and not 0 <= min(found) <= max(found) < count:
            raise ConfigError(f"token ids {min(found)}..{max(found)}; {self.checkpoint.name} has ids 0..{count - 1}")
        return rows


def _plain(values: Any) -> Any:
    """A tensor or array as lists."""
    return values.tolist() if hasattr(values, "tolist") else values


def load_decoder(
    folder_or_name: str | Path,
    *,
    adapter: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    date: str | None = None,
) -> Decoder:
    """A decoder from an official checkpoint; `device="meta"` builds it from config.json alone, without weights."""
    meta = str(device) == "meta"
    checkpoint = open_checkpoint(folder_or_name, files=SMALL_FILES if meta else FILES)
    with torch.device("meta"):
        network = _network(checkpoint).eval()
    where = torch.device("meta") if meta else pick_device(device)
    kind = pick_dtype(dtype, where, stored=stored_dtype(checkpoint))
    if not meta:
        fill(network, checkpoint, device=where, dtype=kind)
    else:
        network.to(kind)
    network.requires_grad_(False)
    if adapter is not None:
        lora.load(network, read_adapter(adapter))
    decoder = Decoder(network, checkpoint, where, kind, date)
    if not meta:
        decoder.tokenizer.special("<|begin_of_text|>")  # a tokenizer that does not fit is refused now, not later
    return decoder


def _network(checkpoint: Checkpoint) -> nn.Module:
    kind = checkpoint.config.get("model_type")
    where = str(checkpoint.folder / "config.json")
    if kind == "llama":
        return Llama(LlamaConfig.read(checkpoint.config, where))
    raise CheckpointError(f"{where}: model_type is {kind!r}; a decoder is 'llama' or 'mllama'")


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that holds most of the checkpoint's elements; that of config.json where the weights are not here."""
    sizes: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes // info.dtype.itemsize
    named = str(checkpoint.config.get("torch_dtype", checkpoint.config.get("dtype", "float32")))
    return max(sizes, key=lambda kind: sizes[kind]) if sizes else getattr(torch, named, torch.float32)
