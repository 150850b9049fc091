"""A text decoder that is spread over the ranks (`parallel.shards`): built without weights, adapted, cut, and only then read,
each rank its own part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from .. import parallel
from ..devices import pick_device, pick_dtype
from ..errors import ConfigError
from ..weights import fill, open_checkpoint
from . import Decoder, build, lora, stored_dtype
from .llama import Llama

Adapt = Callable[[Llama], Callable[[Llama], None]]
"""Puts adapters on a network without weights; gives what fills them once they have room."""


def load_spread(
    folder_or_name: str | Path,
    adapt: Adapt,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    date: str | None = None,
    tensor: int | None = None,
) -> Decoder:
    """A decoder of which this rank holds a part, with adapters on it that are cut like the rest: by FSDP2, or with
    `tensor` for so many ranks that compute on the same tokens."""
    checkpoint = open_checkpoint(folder_or_name)
    network = build(checkpoint)
    if not isinstance(network, Llama):
        raise ConfigError(f"{checkpoint.name}: reads pictures; text decoders alone are spread over processes")
    where = pick_device(device)
    kind = pick_dtype(dtype, where, stored=stored_dtype(checkpoint))
    network.to(kind).requires_grad_(False)
    values = adapt(network)
    if isinstance(network.lm_head, lora.LoRALinear):
        raise ConfigError(
            "--targets: lm_head is spread over the processes and takes no adapter; leave it out of --targets"
        )
    if tensor is None:
        parallel.shard(network, where)
    else:
        parallel.split(network, where, tensor)
    adapters = {name for name, _ in network.named_parameters() if ".lora_" in name}
    fill(network, checkpoint, device=where, dtype=kind, lacking=adapters)
    values(network)
    if tensor is not None:
        parallel.settle(network)
    decoder = Decoder(network, checkpoint, where, kind, date)
    decoder.tokenizer.special("<|begin_of_text|>")
    return decoder
