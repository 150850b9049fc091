"""The vocabulary in parts: each rank has some rows of the embeddings and of the head, which never come together.

What meets them is far smaller. Where ranks compute on tokens of their own (FSDP) those go round, and each rank looks at
them through its own rows; where they compute on the same tokens (tensor parallel) each looks at once. No GPU is waited for:
how many rows come from whom the processors tell each other, and what a rank has not is zero there, not left out.
Shapes: n tokens of a rank, D width, V vocabulary, v rows of it on a rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from ..kernels import part_gradient, part_walk, row_logsumexp
from .ranks import together
from .shards import TENSOR, own_part


def _mesh(table: Any) -> DeviceMesh:
    mesh: DeviceMesh = table.device_mesh
    return mesh


def _same_tokens(mesh: DeviceMesh) -> bool:
    return mesh.mesh_dim_names == (TENSOR,)


def head_factor(matrix: Tensor) -> Tensor:
    """The matrix A of an adapter on the head, which every rank has. Where ranks have the same tokens each finds its whole
    gradient (see `SpreadLogprob`), else that of its own tokens."""
    if not isinstance(matrix, DTensor):
        return matrix
    return matrix.to_local(grad_placements=[Replicate() if _same_tokens(_mesh(matrix)) else Partial()])


def row_counts(own: Tensor, mesh: DeviceMesh) -> list[int]:
    """How many rows each rank has; where all ranks have the same rows, of this one alone."""
    if _same_tokens(mesh):
        return [len(own)]
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(mesh.size())]
    with together():
        dist.all_gather(counts, torch.tensor([len(own)]), group=mesh.get_group())
    return [int(count) for count in counts]


def guests(mesh: DeviceMesh, counts: Sequence[int], *tensors: Tensor | None) -> Iterator[list[Any]]:
    """The rows of tensors (n, ...) of all ranks, one rank's after another's, each on every rank, with their owner before
    them; where all ranks have the same rows these alone, and every rank owns them."""
    if _same_tokens(mesh):
        yield [mesh.get_local_rank(), *tensors]
        return
    for owner, count in enumerate(counts):
        yield [owner, *(_from(owner, count, tensor, mesh) for tensor in tensors)]


def _own_rows(table: Tensor, asked: Tensor) -> Tensor:
    """Rows of this rank's part of a table, 0 where what is asked, counted from its first row, is not among them."""
    if not len(table):
        return table.new_zeros(len(asked), table.shape[1])
    here = (asked >= 0) & (asked < len(table))
    return torch.where(here[:, None], table[asked.clamp(0, len(table) - 1)], 0)


def _from(owner: int, count: int, tensor: Tensor | None, mesh: DeviceMesh) -> Tensor | None:
    """The rows of a tensor that the owner has, so many, on every rank."""
    if tensor is None:
        return None
    here = tensor.contiguous() if owner == mesh.get_local_rank() else tensor.new_empty(count, *tensor.shape[1:])
    with together():
        dist.broadcast(here, group_src=owner, group=mesh.get_group())
    return here


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
    for owner, asked in guests(mesh, row_counts(ids, mesh), ids):
        rows = _own_rows(own, asked - first)
        _add_up(rows, owner, mesh)
        if owner == mesh.get_local_rank():
            out = rows
    return out


class SpreadLogprob(torch.autograd.Function):
    """log p(label) where each rank has some rows of the head: the rows of hidden states go round, in turn.

    With m the highest level of any rank, the total of all is T = sum total_r exp(level_r - m), the margin
    label logit - m - log T, and the direction (1 - p) (W[label] - sum_r exp(level_r - m) sums_r / T). With an adapter on
    the head, logits + low upᵀ, `low` (n, r) has a direction of the same form with the rows of `up` (V, r), each rank's own
    (v, r); these get their gradient by a second walk in backward, for which the rows go round again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, low: Tensor | None, up: Tensor | None, head: Tensor, labels: Tensor, wanted: bool
    ) -> Tensor:
        own, part = own_part(head)
        first, mesh = part[0].start, _mesh(head)
        mine, counts = [hidden.new_empty(0)] * 4, row_counts(hidden, mesh)
        for owner, rows, its_low, asked in guests(mesh, counts, hidden, low, labels):
            found = _met(part_walk(rows, own, asked - first, wanted, its_low, up), own, up, asked - first, owner, mesh)
            if owner == mesh.get_local_rank():
                mine = found
        logp, label_logit, *directions = mine
        again = (None,) * 4 if up is None else (hidden, low, up, own)
        ctx.save_for_backward(*again, labels, logp, label_logit, *directions)
        ctx.first, ctx.mesh, ctx.counts, ctx.dtype = first, mesh, counts, hidden.dtype
        return logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, low, up, own, labels, logp, label_logit, *ways = ctx.saved_tensors
        d_up = None
        if up is not None:
            exact = torch.zeros_like(up, dtype=logp.dtype)
            again = guests(ctx.mesh, ctx.counts, hidden, low, labels, logp, label_logit, grads[0])
            for _, rows, its_low, asked, *scales in again:
                exact += part_gradient(rows, own, its_low, up, asked - ctx.first, *scales)
            d_up = exact.to(up.dtype)
        d_hidden, d_low = (None if way is None else (way * grads[0][:, None]).to(ctx.dtype) for way in ways)
        return d_hidden, d_low, d_up, None, None, None


def token_logprob(hidden: Tensor, head: Tensor, labels: Tensor, low: Tensor | None, up: Tensor | None) -> Tensor:
    """log p(label) of each row of this rank: (n, D), head (V, D) in parts, (n,) -> (n,); differentiable in `hidden`, and in
    `low` (n, r) and `up` (v, r)."""
    out: Tensor = SpreadLogprob.apply(hidden, low, up, head, labels, torch.is_grad_enabled())
    return out


def _met(walked: Any, head: Tensor, up: Tensor | None, labels: Tensor, owner: int, mesh: DeviceMesh) -> list[Any]:
    """What the parts of all ranks come to: log p and label logit (n,) on all of them, and the directions (n, D), (n, r) on
    the owner of the rows."""
    level, total, label_logit, sums, low_sums = walked
    top = level.clone()
    with together():
        dist.all_reduce(top, dist.ReduceOp.MAX, group=mesh.get_group())
        scale = (level - top).exp()
        both = torch.stack([total * scale, label_logit])
        dist.all_reduce(both, group=mesh.get_group())
    margin = both[1] - (top + both[0].log())
    for way, rows in ((sums, head), (low_sums, up)):
        if way is not None and rows is not None:
            way.mul_(-(scale / both[0])[:, None])
            way.add_(_own_rows(rows, labels))
            _add_up(way, owner, mesh)
            way.mul_(torch.sigmoid(-margin)[:, None])
    return [torch.nn.functional.logsigmoid(margin), both[1], sums, low_sums]


def logits(hidden: Tensor, head: Tensor, low: Tensor | None, up: Tensor | None) -> Tensor:
    """Logits of the few rows of this rank over the whole vocabulary: (n, D), (V, D) -> (n, V)."""
    own, _ = own_part(head)
    mesh, share = _mesh(head), -(-head.shape[0] // _mesh(head).size())
    mine = hidden.new_empty(0)
    for owner, rows, its_low in guests(mesh, row_counts(hidden, mesh), hidden, low):
        found = rows.new_zeros(len(rows), share)
        found[:, : len(own)] = rows @ own.T if up is None else torch.addmm(rows @ own.T, its_low, up.T)
        parts = [torch.empty_like(found) for _ in range(mesh.size())]
        with together():
            dist.all_gather(parts, found, group=mesh.get_group())
        if owner == mesh.get_local_rank():
            mine = torch.cat(parts, dim=1)[:, : head.shape[0]]
    return mine


def spread_logsumexp(hidden: Tensor, head: Tensor) -> Tensor:
    """logsumexp over the vocabulary of the rows of this rank: (n, D), (V, D) -> (n,) float32."""
    own, _ = own_part(head)
    mesh, mine = _mesh(head), hidden.new_empty(0)
    for owner, rows in guests(mesh, row_counts(hidden, mesh), hidden):
        total = row_logsumexp(rows, own)
        top = total.clone()
        with together():
            dist.all_reduce(top, dist.ReduceOp.MAX, group=mesh.get_group())
            share = (total - top).exp()
            dist.all_reduce(share, group=mesh.get_group())
        if owner == mesh.get_local_rank():
            mine = top + share.log()
    return mine
