"""What goes from rank to rank: tensors and JSON, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .ranks import first, grid, share, shares, size, together

T = TypeVar("T")

IN_TURN = 32
"""Items that a rank works on before all show what they have."""


def barrier() -> None:
    """Wait until every rank is here."""
    highest(0.0)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes its sum over the shares of the work, in place; those of one dtype travel as one."""
    if shares() == 1 or not tensors:
        return
    for kind in dict.fromkeys(tensor.dtype for tensor in tensors):  # in one order on all ranks
        same = [tensor for tensor in tensors if tensor.dtype == kind]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        with together():
            dist.all_reduce(flat, group=grid["group"])
        for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def highest(*numbers: float) -> list[float]:
    """The highest of each number over the ranks."""
    if size() == 1:
        return list(numbers)
    found = torch.tensor(numbers, dtype=torch.float64)
    with together():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def gathered(value: Any) -> list[Any]:
    """The JSON values of all ranks, in their order, on every rank."""
    if size() == 1:
        return [value]
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
    with together():
        dist.all_gather(lengths, torch.tensor([len(own)]))
        longest = max(int(length) for length in lengths)
        rows = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
        dist.all_gather(rows, torch.cat([own, own.new_zeros(longest - len(own))]))
    return [json.loads(row[:length].numpy().tobytes()) for row, length in zip(rows, lengths, strict=True)]


def from_first(value: Any) -> Any:
    """The JSON value of rank 0, on every rank."""
    return gathered(value if first() else None)[0]


def shared_out(
    items: Iterable[T],
    work: Callable[[list[T], list[str] | None], Iterable[Any]],
    skipped: list[str] | None = None,
    turn: int = IN_TURN,
) -> Iterator[Any]:
    """What `work` makes of the items, in their order and on every rank, each of which has worked on its share alone.

    Every rank sees all items and takes `turn` of them in turn, so that no more than a round is held. What `work` makes
    is JSON; what it appends to the list it is given is appended to `skipped`.
    """
    items = iter(items)
    while held := list(islice(items, turn * shares())):
        left_out: list[str] | None = None if skipped is None else []
        made = list(work(held[share() * turn : (share() + 1) * turn], left_out))
        for rows, faults in gathered([made, left_out])[:: size() // shares()]:
            if skipped is not None:
                skipped.extend(faults)
            yield from rows
