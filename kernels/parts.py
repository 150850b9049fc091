"""What some rows of a head know of log p(label), for a head that is spread over several processes.

Shapes: n rows of hidden states, D width, v rows of the head that are here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .places import on_its_device
from .walk import Head, Walk, Walked, slices, walk


class PartWalk(NamedTuple):
    """After a walk over a part: the logits but for the label's add up to exp(level) total; what other parts know is added
    by whoever holds all of it."""

    level: Tensor  # (n,)
    total: Tensor  # (n,)
    label_logit: Tensor  # (n,); 0 where the label lies in another part
    sums: Tensor | None  # (n, D) sum of exp(logit - level) times the row of the head, of all rows but the label's
    low_sums: Tensor | None  # (n, r) the same with the rows of the adapter's B


@on_its_device
@torch.no_grad()
def part_walk(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    wanted: bool,
    low: Tensor | None = None,
    up: Tensor | None = None,
    kind: type[Walk] = Walk,
) -> PartWalk:
    """hidden (n, D), head (v, D), labels (n,) counted from the first row of this part; sums only if `wanted`.

    logits = hidden headᵀ + low upᵀ, where low (n, r) and up (v, r) are of a LoRA on the head. `kind` computes.
    """
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    sums, low_sums = (torch.zeros_like(x, dtype=exact) if wanted and x is not None else None for x in (hidden, low))
    ends = [(hidden.new_empty(0, dtype=exact),) * 3]
    for rows in slices(len(hidden), kind.rows):
        part, its_low, its_sums, its_low_sums = (None if x is None else x[rows] for x in (hidden, low, sums, low_sums))
        assert part is not None
        walker = kind(part, labels[rows], its_sums, its_low_sums)
        walker.label_logit.zero_()
        walk(walker, part, its_low, Head(head, None, up), kind.width(len(part), len(head), None))
        ends.append((walker.level, walker.total, walker.label_logit))
    level, total, label_logit = (torch.cat(parts) for parts in zip(*ends, strict=True))
    return PartWalk(level, total, label_logit, sums, low_sums)


@on_its_device
@torch.no_grad()
def part_gradient(
    hidden: Tensor,
    head: Tensor,
    low: Tensor,
    up: Tensor,
    labels: Tensor,
    logp: Tensor,
    label_logit: Tensor,
    grad: Tensor,
    kind: type[Walk] = Walk,
) -> Tensor:
    """d loss / d up (v, r), where d loss / d log p is `grad` (n,), and log p and the label's logit are known of all parts."""
    walked = Walked(logp, label_logit, None, None)
    wants = [False, False, True]
    _, _, d_up = kind.again(hidden, low, Head(head, None, up), labels, walked, grad, None, wants)
    assert d_up is not None
    return d_up
