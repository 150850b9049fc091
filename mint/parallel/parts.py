"""Tensors of which each rank holds a part: the door to `shards`, `vocabulary` and `checkpoints`, which are large and so
are imported when they are needed alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from .ranks import grid, in_turn, size

Part = tuple[slice, ...]

SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Where the header of a file that a rank saved says at which place of the whole each of its tensors begins."""


def is_part(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor alone."""
    return size() > 1 and _shards().is_part(tensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all ranks; every rank must ask."""
    return _shards().whole(tensor) if size() > 1 else tensor


def own_part(tensor: Tensor) -> tuple[Tensor, Part]:
    """What this rank holds of a tensor, and which rows (and columns) of the whole that is; (): all of them."""
    return _shards().own_part(tensor) if size() > 1 else (tensor, ())


def put(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor, or what belongs there into this rank's part of it."""
    own, part = own_part(tensor)
    with torch.no_grad():
        own.copy_(value[part] if part else value)


def save_parts(tensors: Mapping[str, Tensor], write: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """Have each rank `write` what it alone holds, or is to write of what several hold, with where in the whole it begins;
    every rank must ask. Ends on all ranks when all have written, or with the error of one."""
    _checkpoints().save_parts(tensors, write)


def load_parts(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, or this rank's parts of them, with what some ranks wrote, however many they were."""
    _checkpoints().load_parts(folder, tensors)


def spread(network: Any, device: torch.device, *, shard: bool, tensor: int) -> None:
    """Cut a decoder on the meta device into the parts of all ranks, and make room for this one's: `tensor` neighbouring
    ranks compute on the same tokens and share each product, and with `shard` the others share what is left (FSDP2)."""
    grid.update(group=_shards().spread(network, device, shard=shard, tensor=tensor), tensor=tensor)


def like(tensor: Tensor, own: Tensor) -> Tensor:
    """A tensor of which this rank holds `own` where it holds a part of `tensor`."""
    out: Tensor = _shards().like(tensor, own) if size() > 1 else own
    return out


def settle(network: Any) -> None:
    """After reading: frozen parts become plain tensors."""
    _shards().settle(network)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a trained matrix, to compute with."""
    out: Tensor = _shards().local(tensor) if size() > 1 else tensor
    return out


def complete(weight: Tensor, total: Tensor) -> None:
    """Add up this rank's sum of the gradients of a matrix over the ranks that compute on the same tokens, in place."""
    if size() > 1:
        _shards().complete(weight, total)


def is_pooled(weight: Tensor) -> bool:
    """Whether backward adds up the gradient of a trained matrix over the ranks that have other tokens."""
    return size() > 1 and bool(_shards().is_pooled(weight))


def kinds(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors, those together that are spread over the same ranks."""
    out: list[list[Tensor]] = _shards().kinds(tensors) if size() > 1 else [list(tensors)]
    return out


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all tensors together, of those in parts the whole."""
    if any(map(is_part, tensors)):
        out: Tensor = _shards().total_norm(tensors)
        return out
    return get_total_norm(tensors)


def head_factor(matrix: Tensor) -> Tensor:
    """The matrix A of an adapter on the head, to compute with: each rank has all of it."""
    out: Tensor = _vocabulary().head_factor(matrix) if size() > 1 else matrix
    return out


def logits(hidden: Tensor, head: Tensor, low: Tensor | None = None, up: Tensor | None = None) -> Tensor:
    """Logits of this rank's rows with a head in parts: (n, D), (V, D) -> (n, V). An adapter as `token_logprob` has it."""
    with in_turn().of("logits"):
        out: Tensor = _vocabulary().logits(hidden, head, low, up)
    return out


def row_logsumexp(hidden: Tensor, head: Tensor) -> Tensor:
    """logsumexp over the vocabulary of this rank's rows with a head in parts: (n, D), (V, D) -> (n,) float32."""
    with in_turn().of("row_logsumexp"):
        out: Tensor = _vocabulary().spread_logsumexp(hidden, head)
    return out


def looked_up(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of a table that is spread over the ranks: (n,), (V, D) -> (n, D); not differentiable, such a table is frozen."""
    with in_turn().of("looked_up"):
        out: Tensor = _vocabulary().looked_up(ids, table)
    return out


def token_logprob(
    hidden: Tensor, head: Tensor, labels: Tensor, *, low: Tensor | None = None, up: Tensor | None = None
) -> Tensor:
    """log p(label) with a head that is spread over the ranks: (n, D), (V, D), (n,) -> (n,); differentiable in `hidden`, and
    in `low` (n, r) and `up`, this rank's rows of the B of an adapter on the head."""
    out: Tensor = _vocabulary().token_logprob(hidden, head, labels, low, up)
    return out


def _checkpoints() -> Any:
    return import_module(f"{__package__}.checkpoints")


def _shards() -> Any:
    return import_module(f"{__package__}.shards")


def _vocabulary() -> Any:
    return import_module(f"{__package__}.vocabulary")
