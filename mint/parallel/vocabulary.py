"""The vocabulary in parts: each rank has some rows of the embeddings and of the head, which never come together.

What meets them is far smaller. Where ranks compute on tokens of their own (FSDP) those go round, and each rank looks at
them through its own rows; where they compute on the same tokens (tensor parallel) each looks at once.
Shapes: n tokens of a rank, D width, V vocabulary, v rows of it on a rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..kernels import part_walk, row_logsumexp
from . import together
from .shards import TENSOR, own_part


def _mesh(table: Any) -> DeviceMesh:
    mesh: DeviceMesh = table.device_mesh
    return mesh


def _same_tokens(mesh: DeviceMesh) -> bool:
    return mesh.mesh_dim_names == (TENSOR,)


def guests(tensor: Tensor, mesh: DeviceMesh) -> Iterator[tuple[int, Tensor]]:
    """The tensors (n, ...) of all ranks, one after another, each on every rank, with its owner; where all ranks have the
    same one, it alone, and every rank owns it."""
    own = mesh.get_local_rank()
    if _same_tokens(mesh):
        yield own, tensor
        return
    counts = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(mesh.size())]
    with together():
        dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device), group=mesh.get_group())
    for owner, count in enumerate(counts):
        here = tensor.contiguous() if owner == own else tensor.new_empty(int(count), *tensor.shape[1:])
        with together():
            dist.broadcast(here, group_src=owner, group=mesh.get_group())
        yield owner, here


def _add_up(tensor: Tensor, owner: int, mesh: DeviceMesh) -> None:
    """The sum over the ranks, for the owner of the rows, in place."""
    with together():
        if _same_tokens(mesh):
            dist.all_reduce(tensor, group=mesh.get_group())
        else:
            dist.reduce(tensor, group_dst=owner, group=mesh.get_group())


def looked_up(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of a table that is spread over the ranks: (n,) -> (n, D). Not differentiable: such a table is frozen."""
    own, part = own_part(table)
    first, mesh = part[0].start, _mesh(table)
    out = own.new_empty(len(ids), table.shape[1])
    for owner, asked in guests(ids, mesh):
        here = (asked >= first) & (asked < first + len(own))
        rows = own.new_zeros(len(asked), table.shape[1])
        rows[here] = own[asked[here] - first]
        _add_up(rows, owner, mesh)
        if owner == mesh.get_local_rank():
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
        first, mesh = part[0].start, _mesh(head)
        logp, direction = hidden.new_empty(0), None
        for (owner, rows), (_, asked) in zip(guests(hidden, mesh), guests(labels, mesh), strict=True):
            found, way = _met(part_walk(rows, own, asked - first, wanted), own, asked - first, owner, mesh)
            if owner == mesh.get_local_rank():
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


def _met(walked: Any, head: Tensor, labels: Tensor, owner: int, mesh: DeviceMesh) -> tuple[Tensor, Tensor | None]:
    """What the parts of all ranks come to: log p (n,) on all of them, and the directions (n, D) on the owner of the rows."""
    level, total, label_logit, sums = walked
    top = level.clone()
    with together():
        dist.all_reduce(top, dist.ReduceOp.MAX, group=mesh.get_group())
        scale = (level - top).exp()
        both = torch.stack([total * scale, label_logit])
        dist.all_reduce(both, group=mesh.get_group())
    margin = both[1] - (top + both[0].log())
    if sums is not None:
        sums.mul_(-(scale / both[0])[:, None])
        here = (labels >= 0) & (labels < len(head))
        sums[here] += head[labels[here]]
        _add_up(sums, owner, mesh)
        sums.mul_(torch.sigmoid(-margin)[:, None])
    return torch.nn.functional.logsigmoid(margin), sums


def logits(hidden: Tensor, head: Tensor) -> Tensor:
    """Logits of the same few rows on all ranks over the whole vocabulary: (n, D), (V, D) -> (n, V)."""
    own, _ = own_part(head)
    mesh, rows = _mesh(head), -(-head.shape[0] // _mesh(head).size())
    found = hidden.new_zeros(len(hidden), rows)
    found[:, : len(own)] = hidden @ own.T
    parts = [torch.empty_like(found) for _ in range(mesh.size())]
    with together():
        dist.all_gather(parts, found, group=mesh.get_group())
    return torch.cat(parts, dim=1)[:, : head.shape[0]]


def spread_logsumexp(hidden: Tensor, head: Tensor) -> Tensor:
    """logsumexp over the vocabulary of the same rows on all ranks: (n, D), (V, D) -> (n,) float32."""
    own, _ = own_part(head)
    total = row_logsumexp(hidden, own)
    top = total.clone()
    with together():
        dist.all_reduce(top, dist.ReduceOp.MAX, group=_mesh(head).get_group())
        share = (total - top).exp()
        dist.all_reduce(share, group=_mesh(head).get_group())
    return top + share.log()
