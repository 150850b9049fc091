"""What some rows of a head know of log p(label), for a head that is spread over several processes.

Shapes: n rows of hidden states, D width, v rows of the head that are here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import Head, Walk, slices, walk


class PartWalk(NamedTuple):
    """After a walk over a part: the logits but for the label's add up to exp(level) total; what other parts know is added
    by whoever holds all of it."""

    level: Tensor  # (n,)
    total: Tensor  # (n,)
    label_logit: Tensor  # (n,); 0 where the label lies in another part
    sums: Tensor | None  # (n, D) sum of exp(logit - level) times the row of the head, of all rows but the label's


@torch.no_grad()
def part_walk(hidden: Tensor, head: Tensor, labels: Tensor, wanted: bool) -> PartWalk:
    """hidden (n, D), head (v, D), labels (n,) counted from the first row of this part; sums only if `wanted`."""
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    sums = torch.empty_like(hidden, dtype=exact) if wanted else None
    ends = [(hidden.new_empty(0, dtype=exact),) * 3]
    for rows in slices(len(hidden), Walk.rows):
        part = hidden[rows]
        walker = Walk(part, labels[rows], None if sums is None else sums[rows], None)
        walk(walker, part, None, Head(head, None, None), Walk.width(len(part), max(len(head), 1), None))
        ends.append((walker.level, walker.total, walker.label_logit))
    level, total, label_logit = (torch.cat(parts) for parts in zip(*ends, strict=True))
    return PartWalk(level, total, label_logit, sums)
