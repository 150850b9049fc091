"""A decoder that is spread over the ranks (`parallel.shards`): built without weights, adapted, cut, and only then read, each
rank its own part. Where ranks have tokens of their own, they take turns (`parallel.turns`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import parallel
from ..devices import pick_device
from ..weights import fill, open_checkpoint
from . import Decoder, build, dtype_of, finished
from .heads import head_weight
from .mllama import Mllama
from .mllama_config import in_memory
from .sight import Sight, Span

Adapt = Callable[[Any], Callable[[Any], None]]
"""Puts adapters on a network without weights; gives what fills them once they have room."""


def load_spread(
    folder_or_name: str | Path,
    adapt: Adapt,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    date: str | None = None,
    meta_masking: bool = False,
    shard: bool = False,
    tensor: int | None = None,
) -> Decoder:
    """A decoder of which this rank holds a part, with adapters on it that are cut like the rest: with `tensor` for so many
    ranks that compute on the same tokens, with `shard` by FSDP2 over those that have others."""
    checkpoint = open_checkpoint(folder_or_name)
    network: Any = build(checkpoint)
    where = pick_device(device)
    kind = dtype_of(dtype, where, checkpoint)
    network.to(kind).requires_grad_(False)
    values = adapt(network)
    parallel.spread(network, where, shard=shard, tensor=tensor or 1)
    adapters = {name for name, _ in network.named_parameters() if ".lora_" in name}
    rename = in_memory if isinstance(network, Mllama) else None
    fill(network, checkpoint, device=where, dtype=kind, rename=rename, lacking=adapters)
    values(network)
    parallel.in_turn().begin(training=any(parameter.requires_grad for parameter in network.parameters()))
    if shard:
        _take_turns(network, where, kind)
    else:
        parallel.settle(network)
    return finished(network, checkpoint, where, kind, date, meta_masking)


def _take_turns(network: Any, device: torch.device, dtype: torch.dtype) -> None:
    """What ranks do together, and how one helps that has nothing to ask: with one token, one patch, no rows."""
    turns, config = parallel.in_turn(), network.config
    one = torch.zeros(1, dtype=torch.int64, device=device)
    none = torch.zeros(0, config.hidden_size, dtype=dtype, device=device)
    network_help = (one, one, lambda _, q, *__: q)
    turns.add("read", lambda: network(*network_help))
    if isinstance(network, Mllama):
        turns.add("look", lambda: network(*network_help, _nothing_seen(network, none)))
        turns.add("look again", lambda: network(*network_help, _nothing_seen(network, none, again=True)))
        vision, tower, project = config.vision, network.model.vision_model, network.model.multi_modal_projector
        pixels = torch.zeros(1, vision.max_num_tiles, 3, vision.image_size, vision.image_size)
        mask = torch.tensor([[1] + [0] * (vision.max_num_tiles - 1)])
        turns.add("tower", lambda: tower(pixels, torch.ones(1, dtype=torch.int64), mask))
        turns.add("project", lambda: project(torch.zeros(1, vision.output_size, dtype=dtype, device=device)))
        turns.around(tower, lambda *_: "tower")
        turns.around(project, lambda *_: "project")
    turns.around(network, lambda *given: _kind(*given[3:]))
    turns.add("looked_up", lambda: parallel.looked_up(one[:0], head_weight(network)))
    turns.add("row_logsumexp", lambda: parallel.row_logsumexp(none, head_weight(network)))
    turns.add("logits", lambda: network.lm_head(none))


def _kind(sight: Sight | None = None) -> str:
    """Keys and values of a picture are made when it is looked at first."""
    return "read" if sight is None else "look again" if sight.kept else "look"


def _nothing_seen(network: Any, none: torch.Tensor, again: bool = False) -> Sight:
    """A token that sees one patch of zeros."""
    config, rows = network.config, [slice(0, 1)]
    own = config.num_key_value_heads * parallel.shares() // parallel.size()  # heads that are here
    keys = none.new_zeros(own, 1, config.head_dim)
    kept = dict.fromkeys(config.cross_attention_layers, (keys, keys)) if again else {}
    return Sight(none.new_zeros(1, config.hidden_size), rows, rows, [Span(0, 1, (0,), ends=True)], kept)
