"""A decoder spread over the ranks: every matrix is cut, and no rank ever holds, or reads from disk, more than its part.

Blocks are cut by FSDP2: a block's parts come together for as long as the block computes. The vocabulary (the table of
embeddings, and the head) never comes together: what meets it is far smaller, so the tokens go round instead, and each
rank looks at them through its own rows of the vocabulary.
Shapes: n tokens of a rank, D width, V vocabulary, v rows of it on a rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..kernels import part_walk
from . import Part, rank, size, together


def is_part(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor alone."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all ranks; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> tuple[Tensor, Part]:
    """What this rank holds of a tensor, and which rows (and columns) of the whole that is; (): all of them."""
    if not isinstance(tensor, DTensor):
        return tensor, ()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor._local_tensor, tuple(slice(at, at + count) for at, count in zip(offset, shape, strict=True))


# ---- cutting --------------------------------------------------------------------------------------------------------


def shard(network: Any, device: torch.device) -> None:
    """Cut a decoder on the meta device into parts: each block by FSDP2, the vocabulary by rows; then make room for them.

    Gradients of the adapters are added up, not averaged: a loss is pooled over all ranks already.
    """
    mesh = init_device_mesh(device.type, (size(),))
    tables = {id(table.weight): table for table in (network.lm_head, network.model.embed_tokens)}
    cut = {key: cut_rows(table.weight, mesh) for key, table in tables.items()}
    for table in (network.lm_head, network.model.embed_tokens):
        table.weight = cut[id(table.weight)]
    for block in (*network.model.layers, network.model):
        made: Any = fully_shard(block, mesh=mesh, ignored_params=set(cut.values()))
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)
    tied = network.lm_head.weight is network.model.embed_tokens.weight
    network.to_empty(device=device)
    if tied:
        network.lm_head.weight = network.model.embed_tokens.weight


def cut_rows(table: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    """A table (V, D) on the meta device as this rank's rows of it."""
    rows = table.shape[0]
    share = -(-rows // mesh.size())
    own = max(0, min(share, rows - share * mesh.get_local_rank()))
    local = table.new_empty(own, *table.shape[1:])
    spread = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=table.shape, stride=table.stride())
    return nn.Parameter(spread, requires_grad=False)


# ---- the vocabulary -------------------------------------------------------------------------------------------------


def guests(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The tensors (n, ...) of all ranks, one after another, each on every rank: as many rounds as there are ranks."""
    counts = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(size())]
    with together():
        dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device))
    for owner, count in enumerate(counts):
        here = tensor.contiguous() if owner == rank() else tensor.new_empty(int(count), *tensor.shape[1:])
        with together():
            dist.broadcast(here, owner)
        yield owner, here


def looked_up(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of a table that is spread over the ranks: (n,) -> (n, D). Not differentiable: such a table is frozen."""
    own, part = own_part(table)
    first = part[0].start
    out = own.new_empty(len(ids), table.shape[1])
    for owner, asked in guests(ids):
        here = (asked >= first) & (asked < first + len(own))
        rows = own.new_zeros(len(asked), table.shape[1])
        rows[here] = own[asked[here] - first]
        with together():
            dist.reduce(rows, owner)
        if owner == rank():
            out = rows
    return out


class SpreadLogprob(torch.autograd.Function):
    """log p(label) where each rank has some rows of the head: the rows of hidden states go round, in turn.

    With m the highest level of any rank, the total of all is T = sum total_r exp(level_r - m), the margin
    label logit - m - log T, and the direction (1 - p) (W[label] - sum_r exp(level_r - m) sums_r / T).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, wanted: bool) -> Tensor:
        own, part = own_part(head)
        first = part[0].start
        logp, direction = hidden.new_empty(0), None
        for (owner, rows), (_, asked) in zip(guests(hidden), guests(labels), strict=True):
            found, way = _met(part_walk(rows, own, asked - first, wanted), own, asked - first, owner)
            if owner == rank():
                logp, direction = found, way
        ctx.save_for_backward(direction)
        ctx.dtype = hidden.dtype
        return logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (direction,) = ctx.saved_tensors
        return (direction * grads[0][:, None]).to(ctx.dtype), None, None, None


def token_logprob(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """log p(label) of each row of this rank: (n, D), head (V, D) in parts, (n,) -> (n,); differentiable in `hidden`."""
    out: Tensor = SpreadLogprob.apply(hidden, head, labels, torch.is_grad_enabled())
    return out


def _met(walked: Any, head: Tensor, labels: Tensor, owner: int) -> tuple[Tensor, Tensor | None]:
    """What the parts of all ranks come to: log p (n,) on all of them, and the directions (n, D) on the owner of the rows."""
    level, total, label_logit, sums = walked
    top = level.clone()
    with together():
        dist.all_reduce(top, dist.ReduceOp.MAX)
        scale = (level - top).exp()
        both = torch.stack([total * scale, label_logit])
        dist.all_reduce(both)
    margin = both[1] - (top + both[0].log())
    if sums is not None:
        sums.mul_(-(scale / both[0])[:, None])
        here = (labels >= 0) & (labels < len(head))
        sums[here] += head[labels[here]]
        with together():
            dist.reduce(sums, owner)
        sums.mul_(torch.sigmoid(-margin)[:, None])
    return torch.nn.functional.logsigmoid(margin), sums
