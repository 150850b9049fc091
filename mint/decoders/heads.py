"""Log-probabilities of chosen tokens alone, for scoring. Shapes: B prompts, n rows of each, E edges, D width, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import parallel
from ..kernels import row_logsumexp
from . import lora

_EDGES = 4096  # rows of the head gathered together


def head_weight(network: Any) -> Tensor:
    """The head (V, D), its adapter added where it has one."""
    head = network.lm_head
    weight: Tensor = head.merged() if isinstance(head, lora.LoRALinear) and head.enabled else head.weight
    return weight


def edge_logp(hidden: Tensor, weight: Tensor, source: Any, token: Any) -> Tensor:
    """Log-probability of the token of each edge after row `source` of hidden (B, n, D), over the whole vocabulary:
    (B, E) float64 on the processor, for sums. A row's logsumexp is shared by all its edges."""
    summed = parallel.row_logsumexp if parallel.is_part(weight) else row_logsumexp
    total = summed(hidden.flatten(0, 1), weight).view(hidden.shape[:2])
    rows, labels = (torch.as_tensor(x, device=hidden.device) for x in (source, token))
    step = max(1, _EDGES // len(hidden))
    own = [_dots(hidden, weight, rows[at : at + step], labels[at : at + step]) for at in range(0, len(rows), step)]
    return (torch.cat(own, dim=1) - total[:, rows]).clamp(max=0.0).cpu().double()


def logits_of(hidden: Tensor, weight: Tensor, token: Any) -> Tensor:
    """The logits of some tokens after one row: (D,), (V, D), (E,) -> (E,) in float32 at least."""
    rows = torch.zeros(len(token), dtype=torch.int64, device=hidden.device)
    return _dots(hidden[None, None], weight, rows, torch.as_tensor(token, device=hidden.device))[0]


def _dots(hidden: Tensor, weight: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """The logits of the labels alone: (B, e) in float32 at least."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    wanted = parallel.looked_up(labels, weight) if parallel.is_part(weight) else weight[labels]
    return (hidden[:, rows].to(exact) * wanted.to(exact)).sum(dim=-1)
