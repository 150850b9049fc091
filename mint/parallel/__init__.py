"""Several processes at one work: the one door to torch.distributed. A process is a rank; alone it is rank 0 of 1, and
nothing here costs it anything.

`group` makes the ranks that torchrun started one group and ends them together; `ranks` says which of them this is,
`messages` carries what goes from one to the others, and `parts` has tensors of which each holds a part.
"""

from __future__ import annotations

from .group import check_gpus, joined
from .messages import add_up, barrier, from_first, highest, shared_out
from .parts import (
    OFFSETS,
    SHARDING,
    complete,
    head_factor,
    is_part,
    is_pooled,
    kinds,
    like,
    load_parts,
    local,
    logits,
    looked_up,
    own_part,
    put,
    row_logsumexp,
    save_parts,
    settle,
    spread,
    token_logprob,
    total_norm,
    whole,
)
from .ranks import apart, first, in_turn, rank, share, shares, size

__all__ = [
    "OFFSETS",
    "SHARDING",
    "add_up",
    "apart",
    "barrier",
    "check_gpus",
    "complete",
    "first",
    "from_first",
    "head_factor",
    "highest",
    "in_turn",
    "is_part",
    "is_pooled",
    "joined",
    "kinds",
    "like",
    "load_parts",
    "local",
    "logits",
    "looked_up",
    "own_part",
    "put",
    "rank",
    "row_logsumexp",
    "save_parts",
    "settle",
    "share",
    "shared_out",
    "shares",
    "size",
    "spread",
    "token_logprob",
    "total_norm",
    "whole",
]
