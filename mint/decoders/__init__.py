"""`load_decoder`: a checkpoint folder or hub name, and an adapter if there is one, as one object that reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import parallel
from ..chat import ChatTokenizer, chat_tokenizer
from ..devices import pick_device, pick_dtype
from ..errors import CheckpointError, ConfigError
from ..images.rules import mllama_settings
from ..kernels import token_logprob, tree_attention, tree_layout
from ..trees import forest, sequence
from ..types import TokenTree
from ..weights import FILES, SMALL_FILES, Checkpoint, fill, open_checkpoint
from ..weights.adapters import Adapter, read_adapter
from . import lora
from .eyes import Eyes, check_counts
from .generation import Sampling, generate
from .llama import Llama, LlamaConfig
from .mllama import Looking, Mllama
from .mllama_config import MllamaConfig, in_memory, on_disk

__all__ = ["Decoder", "load_decoder", "lora", "open_adapter", "stored_dtype"]


@dataclass
class Decoder:
    """A decoder with its tokenizer, and eyes where it has them. Shapes: B rows, T tokens, D width, V vocabulary, E edges."""

    network: Any
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    date: str | None = None
    eyes: Eyes | None = None

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        """Text to ids and back, in the words of the checkpoint's chat template."""
        return chat_tokenizer(self.checkpoint.folder, self.checkpoint.config, date=self.date)

    def hidden(self, tree: TokenTree) -> Tensor:
        """Hidden states of every token of a tree, ready for the head: (T, D)."""
        return self._hidden(tree, tree.to(self.device))

    def _hidden(self, tree: TokenTree, moved: TokenTree) -> Tensor:
        """The same for a tree that was moved to the device; what is to be read of it is read where it was before."""
        layout = tree_layout(moved.end)
        if self.eyes is None:
            self._check_images(tree.images)
        seen = () if self.eyes is None else (self.eyes.look(tree),)
        out: Tensor = self.network(moved.ids, moved.position, lambda _, q, k, v: tree_attention(q, k, v, layout), *seen)
        return out

    def token_logp(self, tree: TokenTree) -> Tensor:
        """Log-probability of each scored edge of a tree: (E,) float32, differentiable; sum them with `tree.path_sums`."""
        moved = tree.to(self.device)
        rows, head = self._hidden(tree, moved).index_select(0, moved.sources), self.network.lm_head
        adapter = head.adapter(rows) if isinstance(head, lora.LoRAHead) and head.enabled else {}
        product = parallel.token_logprob if parallel.is_part(head.weight) else token_logprob
        return product(rows, head.weight, moved.labels, **adapter)

    @torch.inference_mode()
    def logits(self, ids: Tensor | Sequence[Sequence[int]], images: Any = None) -> Tensor:
        """Logits of plain rows: ids (B, T) -> (B, T, V). No padding: rows of unequal length go one by one.

        `images`: for each row, the pictures of its image tokens, in their order.
        """
        rows = self._rows(ids)
        if len({len(row) for row in rows}) > 1:
            raise ConfigError(f"rows of unequal length {[len(row) for row in rows]}; ask for their logits one by one")
        hidden = self.hidden(self._line(rows, images))
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
        """New tokens of each prompt, up to and with its stop token; the prompts may differ in length.

        `images`: for each prompt, the pictures of its image tokens, in their order.
        """
        prompts, stops = self._rows(ids), self.tokenizer.stop_ids
        sampling = Sampling(temperature, top_k, top_p, seed)
        network = self.looking(prompts, images)
        return generate(network, prompts, max_new_tokens, sampling, stops, self.device, on_token)

    @torch.inference_mode()
    def looking(self, prompts: Sequence[Sequence[int]], images: Any) -> Any:
        """The network, with what the prompts and all that follows them see of their images."""
        line = self._line(prompts, images) if all(prompts) and prompts else None
        sight = None if line is None or self.eyes is None else self.eyes.look(line)
        return self.network if sight is None else Looking(self.network, sight)

    def _line(self, rows: Sequence[Sequence[int]], images: Any) -> TokenTree:
        """Rows on one line, with their images."""
        if self.eyes is None:
            self._check_images(images)
            return forest([sequence(row) for row in rows])
        try:
            given = [[]] * len(rows) if images is None else [list(own or ()) for own in images]
        except TypeError:
            raise ConfigError(
                "images are a list of pictures for each row, like [[picture], []]; found another"
            ) from None
        check_counts(rows, given, self.network.config.image_token)
        return replace(forest([sequence(row) for row in rows]), images=tuple(image for own in given for image in own))

    @property
    def picture_tokens(self) -> int:
        """Tokens that the tower computes for a picture; 0 for a decoder without one."""
        vision = None if self.eyes is None else self.network.config.vision
        return 0 if vision is None else vision.max_num_tiles * (vision.patches + vision.pads)

    def stored_name(self, name: str) -> str:
        """A parameter's name in the official files."""
        return name if self.eyes is None else on_disk(name)

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
    meta_masking: bool = False,
) -> Decoder:
    """A decoder from an official checkpoint; `device="meta"` builds it from config.json alone, without weights.

    `meta_masking`: text before an image sees nothing of it, as in Meta's own code, and not as in transformers.
    """
    meta = str(device) == "meta"
    checkpoint = open_checkpoint(folder_or_name, files=SMALL_FILES if meta else FILES)
    network = build(checkpoint)
    where = torch.device("meta") if meta else pick_device(device)
    kind = dtype_of(dtype, where, checkpoint)
    stored = None if adapter is None else open_adapter(network, adapter)  # before the weights: its faults cost no wait
    if not meta:
        fill(network, checkpoint, device=where, dtype=kind, rename=in_memory if isinstance(network, Mllama) else None)
    else:
        network.to(kind)
    network.requires_grad_(False)
    if stored is not None:
        lora.load(network, stored)
    return finished(network, checkpoint, where, kind, date, meta_masking)


def finished(
    network: Any, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, date: str | None, meta_masking: bool
) -> Decoder:
    """The decoder of a network that has its weights, or is on the meta device, with what belongs to it."""
    eyes = _eyes(network, checkpoint, meta_masking) if isinstance(network, Mllama) else None
    decoder = Decoder(network, checkpoint, device, dtype, date, eyes)
    if device.type != "meta":
        decoder.tokenizer.special("<|begin_of_text|>")  # a tokenizer that does not fit is refused now, not later
        _check_image_token(decoder)
    return decoder


def build(checkpoint: Checkpoint) -> nn.Module:
    """The network that config.json describes, on the meta device."""
    with torch.device("meta"):
        return _network(checkpoint).eval()


def _network(checkpoint: Checkpoint) -> nn.Module:
    kind = checkpoint.config.get("model_type")
    where = str(checkpoint.folder / "config.json")
    if kind == "llama":
        return Llama(LlamaConfig.read(checkpoint.config, where))
    if kind == "mllama":
        return Mllama(MllamaConfig.read(checkpoint.config, where))
    raise CheckpointError(f"{where}: model_type is {kind!r}; a decoder is 'llama' or 'mllama'")


def open_adapter(network: nn.Module, folder: str | Path) -> Adapter:
    """An adapter under the network's names; one of Llama 3.2 Vision may have those of the official files."""
    adapter = read_adapter(folder)
    return adapter.renamed(in_memory) if isinstance(network, Mllama) else adapter


def _eyes(network: Mllama, checkpoint: Checkpoint, meta_masking: bool) -> Eyes:
    settings, vision = mllama_settings(checkpoint.folder), network.config.vision
    for name, found, wanted in (
        ("size", settings.size, vision.image_size),
        ("max_image_tiles", settings.max_tiles, vision.max_num_tiles),
    ):
        if found != wanted:
            where = checkpoint.folder / "preprocessor_config.json"
            raise CheckpointError(f"{where}: {name} is {found}; the tower of config.json takes {wanted}")
    return Eyes(network, settings, meta_masking)


def _check_image_token(decoder: Decoder) -> None:
    if decoder.eyes is not None and decoder.tokenizer.image_id() != decoder.network.config.image_token:
        found, wanted = decoder.tokenizer.image_id(), decoder.network.config.image_token
        raise CheckpointError(
            f"{decoder.tokenizer.where}: <|image|> is {found}, but image_token_index in config.json is {wanted}"
        )


def dtype_of(dtype: str | torch.dtype, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype by name; `auto` is that of the checkpoint, where products in it are not slower."""
    kind = pick_dtype(dtype, device, stored=stored_dtype(checkpoint))
    if kind == torch.float64 and device.type == "cuda":
        raise ConfigError(
            "--dtype float64: the kernels of a GPU attend in float32 at most; give float32, or --device cpu"
        )
    return kind


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that holds most of the checkpoint's elements; that of config.json where the weights are not here."""
    sizes: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes // info.dtype.itemsize
    named = str(checkpoint.config.get("torch_dtype", checkpoint.config.get("dtype", "float32")))
    return max(sizes, key=lambda kind: sizes[kind]) if sizes else getattr(torch, named, torch.float32)
